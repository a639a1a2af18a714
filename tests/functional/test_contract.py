"""What every member of a family must do; newcomers are found by themselves and tested unasked.

A newcomer is tried on its rows in the tables of `test_preference.py`, `test_aggregation.py`, `test_constrained.py` and
`test_control.py`, and must have one.
"""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest
import torch
from jsonargparse import ArgumentParser

import lit_rlhf.functional
from lit_rlhf.functional.aggregation import RewardAggregator
from lit_rlhf.functional.constrained import Constraint
from lit_rlhf.functional.control import KLController, MultiplierControl
from lit_rlhf.functional.preference import PreferenceLoss
from lit_rlhf.specs import build, plain
from lit_rlhf.types import PairLogps
from tests.functional.test_aggregation import AGGREGATORS
from tests.functional.test_constrained import CONSTRAINTS
from tests.functional.test_control import KL_CONTROLLERS, MULTIPLIER_CONTROLS
from tests.functional.test_preference import LOSSES, pairs, swap

for module in pkgutil.iter_modules(lit_rlhf.functional.__path__):
    importlib.import_module(f"lit_rlhf.functional.{module.name}")


def family(base):
    """All concrete classes of the package under an abstract base."""
    below = {kind for child in base.__subclasses__() for kind in ({child} | family(child))}
    return {kind for kind in below if not inspect.isabstract(kind) and kind.__module__.startswith("lit_rlhf.")}


ROWS = {
    PreferenceLoss: LOSSES,
    RewardAggregator: AGGREGATORS,
    Constraint: CONSTRAINTS,
    KLController: KL_CONTROLLERS,
    MultiplierControl: MULTIPLIER_CONTROLS,
}
PIECES = [(base, row) for base, rows in ROWS.items() for row in rows]
each_piece = pytest.mark.parametrize(("base", "piece"), PIECES, ids=[repr(piece) for _, piece in PIECES])
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
each_aggregator = pytest.mark.parametrize("aggregator", AGGREGATORS, ids=repr)


@pytest.mark.parametrize(("base", "rows"), ROWS.items())
def test_every_class_has_a_row(base, rows):
    without = {kind.__name__ for kind in family(base)} - {type(row).__name__ for row in rows}
    assert len(family(base)) >= 2
    assert not without, f"give {without} a row in CASES"


def test_a_newcomer_without_a_row_is_noticed():
    @dataclasses.dataclass(frozen=True)
    class Newcomer(RewardAggregator):
        __module__ = "lit_rlhf.functional.planted"

        def combine(self, scores):
            return scores[:, 0]

    assert Newcomer in family(RewardAggregator)
    with pytest.raises(AssertionError, match="Newcomer"):
        test_every_class_has_a_row(RewardAggregator, AGGREGATORS)
    Newcomer.__module__ = "elsewhere"  # classes outlive this test; the other one must not see it


@each_piece
def test_frozen_and_documented(base, piece):
    assert dataclasses.is_dataclass(piece)
    for field in dataclasses.fields(piece):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(piece, field.name, None)
        assert f"{field.name}:" in type(piece).__doc__, f"{field.name} is not in the docstring"
    assert hash(piece) == hash(dataclasses.replace(piece))


@each_piece
def test_configs_and_checkpoints_bring_it_back(base, piece):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--piece", type=base)
    config = parser.parse_object({"piece": plain(piece)})
    again = parser.parse_string(parser.dump(config))
    assert parser.instantiate(config).piece == parser.instantiate(again).piece == piece
    assert build(plain(piece), base) == piece


@each_loss
def test_losses_are_per_example_and_finite_far_out(loss):
    ratio = torch.tensor([100.0, -100.0, 0.0])
    lengths = (torch.tensor([1, 5, 9]), torch.tensor([9, 5, 1]))
    policy = PairLogps(ratio.requires_grad_(), -ratio, *lengths)
    reference = PairLogps(torch.zeros(3), torch.zeros(3), *lengths)
    output = loss(policy, reference, label=torch.tensor([1.0, 0.5, 0.0]))
    assert all(value.shape == (3,) and value.isfinite().all() for value in (output.loss, *output.metrics.values()))
    output.loss.sum().backward()
    assert ratio.grad.isfinite().all()


@each_loss
def test_loss_gradients_by_finite_differences(loss):
    policy, reference = pairs(seed=3)
    label = torch.linspace(0.1, 1, 6, dtype=torch.float64)

    def total(chosen, rejected):
        lengths = (policy.chosen_length, policy.rejected_length)
        return loss(PairLogps(chosen, rejected, *lengths), reference, label=label).loss

    assert torch.autograd.gradcheck(total, (policy.chosen, policy.rejected))


@each_loss
def test_swapping_a_pair_mirrors_it(loss):
    """The preference part with label p equals that of the swapped pair with label 1 - p; margins and wins mirror."""
    policy, reference = pairs()
    label = torch.linspace(0, 1, 6, dtype=torch.float64)
    given = loss(policy, reference, label=label).metrics
    mirrored = loss(swap(policy), swap(reference), label=1 - label).metrics
    torch.testing.assert_close(given["loss/preference"], mirrored["loss/preference"])
    torch.testing.assert_close(given["rewards/margins"], -mirrored["rewards/margins"])
    torch.testing.assert_close(given["rewards/accuracies"], 1 - mirrored["rewards/accuracies"])


@each_loss
def test_rows_of_a_batch_are_strangers(loss):
    policy, reference = pairs()
    whole = loss(policy, reference).loss
    one = [PairLogps(*(value[2:3] for value in vars(p).values())) for p in (policy, reference)]
    assert torch.equal(loss(*one).loss, whole[2:3])


@each_loss
def test_a_larger_margin_never_costs_more_near_zero(loss):
    """All losses of the family push the margin up where policy and reference agree."""
    zero, lengths = torch.zeros(1, dtype=torch.float64), (torch.tensor([3]), torch.tensor([3]))
    chosen = zero.clone().requires_grad_()
    loss(PairLogps(chosen, zero, *lengths), PairLogps(zero, zero, *lengths)).loss.sum().backward()
    assert float(chosen.grad) < 0


@each_aggregator
def test_aggregators_are_per_example(aggregator):
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    combined = aggregator(scores)
    assert combined.shape == (5,)
    assert torch.equal(aggregator(scores[2:3]), combined[2:3])
    assert aggregator(100 * scores).isfinite().all()
    assert aggregator(scores.bfloat16()).dtype == torch.float32


@each_aggregator
def test_aggregator_gradients_by_finite_differences(aggregator):
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(aggregator, (scores,))
