"""The report's section on constraints: the table's numbers, the figure, and runs that have none."""

import re

import pytest

from lit_rlhf import records, report, report_constraints


def probes(values, weight=0.5, name="helpful", threshold=0.8):
    """Probe records of one run whose constraint took these values."""
    entries = [{"value": v, "threshold": threshold, "multiplier": 0.0, "weight": weight} for v in values]
    return [{"step": 40 * i, "constraints": {name: entry}} for i, entry in enumerate(entries)]


def test_late_values_are_means_over_the_last_quarter():
    (one,) = report_constraints.held({"xi": [probes([0, 5, 5, 5, 5, 5, 0.6, 1.0], weight=0.25)]})
    assert (one.method, one.name) == ("xi", "helpful")
    assert one.late("value") == "+0.80"  # of 0.6 and 1.0
    assert one.late("threshold") == "+0.80"
    assert one.late("weight") == "+0.25"


def test_seeds_give_an_interval():
    (one,) = report_constraints.held({"xi": [probes([0.7]), probes([0.9])]})
    assert one.late("value") == "+0.80 ± 1.27"  # 12.706 x 0.1414 / sqrt(2)


def test_what_was_not_measured_is_left_out():
    (one,) = report_constraints.held({"xi": [probes([None, 0.5])], "dpo": [[{"step": 0, "constraints": None}]]})
    assert [entry["step"] for entry in one.runs[0]] == [40]
    assert report_constraints.held({"xi": [probes([None])]}) == []


def test_no_constraints_no_section():
    assert report_constraints.section({"dpo": [[{"step": 0, "constraints": None}, {"step": 1}]]}) == ""


def test_names_are_escaped_and_lines_drawn_for_every_seed():
    page = report_constraints.section({"a <b>": [probes([0, 1], name="<i>x</i>"), probes([0, 2], name="<i>x</i>")]})
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;i&gt;x" in page
    assert page.count("<svg") == 1


@pytest.mark.parametrize("constrained", [True, False])
def test_the_report_holds_it_where_there_is_one(tmp_path, constrained):
    found = probes([0.0, 0.7, 0.9])
    for record in found:
        if not constrained:
            record["constraints"] = None
        record.update(method="ppo_xi", label="xi", seed=0, config_hash="a", kl_k1=record["step"] / 40)
        record.update(dict.fromkeys(("gold", "gold_se", "gold_z", "proxy", "proxy_se", "proxy_z", "win_rate")))
    records.append(tmp_path / records.PROBE, found)
    page = report.html(report.load([tmp_path]), "title")
    assert ("Held at thresholds" in page) == constrained
    assert bool(re.search(r"<td>\+0\.90</td>\s*<td>\+0\.80</td><td>\+0\.50</td>", page)) == constrained
