"""The small commands: sample, predict, label, export. Each is a plain function of its arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lit_rlhf.errors import UserError
from lit_rlhf.judge import JudgeOptions
from lit_rlhf.types import Prompt, Sampling, Scores

SplitName = Literal["train", "validation", "test"]

SAMPLING = Sampling()
NOBODY = JudgeOptions()


def sample(
    model: str,
    prompts: list[str] | None = None,
    *,
    file: str | None = None,
    n: int = 1,
    sampling: Sampling = SAMPLING,
    seed: int = 0,
) -> None:
    """Print responses of a policy.

    Args:
        model: run folder, checkpoint, model folder, hub id or builtin: name.
        prompts: the prompts; without them and without a file, prompts are typed in, one a line.
        file: JSONL (any row kind with a `prompt`) to take the prompts from.
        n: responses a prompt.
        sampling: temperature, top_p, top_k, max_new_tokens.
        seed: seed of the draws.
    """
    from lit_rlhf.loading import load_policy

    policy = load_policy(model)
    for index, prompt in enumerate(_prompts(prompts, file)):
        for response in Draw(sampling, seed, index * n).responses(policy, [prompt] * n):
            print(f"> {_shown(prompt)}\n{response}\n", flush=True)


def predict(
    model: str, data: str, out: str, *, batch_size: int = 32, sampling: Sampling = SAMPLING, seed: int = 0
) -> None:
    """Score a file of responses with a reward model, or answer a file of prompts with a policy.

    Scored pairs are summed up as well: a table of accuracies by category is printed, and written beside `out` with the
    ending `.summary.json`.

    Args:
        model: run folder, checkpoint, model folder, hub id or builtin: name.
        data: rows with `prompt` and `response`, or preference rows (reward model); rows with `prompt` (policy). The
            category of a pair is its `category` or, as in RewardBench, its `subset`.
        out: JSONL to write; one row in, one row out, in order; a ranked row gives one row for each of its pairs.
        batch_size: rows at a time.
        sampling: for a policy: temperature, top_p, top_k, max_new_tokens.
        seed: seed of a policy's draws.
    """
    from lit_rlhf import evaluation
    from lit_rlhf.data.sources import read

    module = _predictor(model)
    records = list(read(data))
    answer = _scored if hasattr(module, "score") else _answered
    pairs, count = [], 0
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with Path(out).open("w", encoding="utf-8") as file:
        for start in range(0, len(records), batch_size):
            chunk = records[start : start + batch_size]
            rows = list(answer(module, chunk, Draw(sampling, seed, first=start)))
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            pairs += [row for row in rows if "chosen" in row]
            count += len(rows)
    print(f"{count} rows written to {out}")
    if pairs:
        summary = {"model": model, "data": data, **evaluation.evaluate(pairs)}
        print(evaluation.table(summary))
        print(f"summary: {evaluation.write(out, summary)}")


def label(  # noqa: PLR0913 - one argument for each key of the command
    out: str,
    *,
    source: str = "builtin:world",
    noise: float | None = None,
    aspect_noise: float = 0.0,
    n: int = 8000,
    split: SplitName = "train",
    seed: int = 0,
    gold: str | None = None,
    judge: JudgeOptions = NOBODY,
) -> None:
    """Write labels onto pairs: preferences by the gold reward, a stated share wrong, or aspects by an LLM judge.

    Args:
        out: JSONL to write.
        source: preference rows to label anew, or `builtin:world` for fresh pairs of the built-in world.
        noise: gold labels: share of wrong ones in [0, 0.5]; exactly that share is flipped; 0.25 unless set.
        aspect_noise: gold labels: share of wrong ones among the rows' `aspects`, in [0, 0.5].
        n: how many pairs at most.
        split: of the built-in world; no two share a prompt, whatever their seeds.
        seed: of the world's pairs and, apart, of the flips.
        gold: class path of the scorer that labels; lit_rlhf.data.synthetic.WorldGold unless set.
        judge: with `judge.url`, a judge's `aspects` are added and the order of each pair stays as it is.
    """
    if n < 1:
        raise UserError(f"n must be >= 1 pairs, got {n}")
    if judge.url:
        if noise is not None or gold is not None or aspect_noise:
            raise UserError("noise, aspect_noise and gold belong to gold labels; expected none with judge.url")
        _label_by_judge(_pairs(source, n, split, seed), judge, out)
    else:
        scorer = _scorer(gold or "lit_rlhf.data.synthetic.WorldGold")
        shares = (0.25 if noise is None else noise, aspect_noise)
        _label_by_gold(_pairs(source, n, split, seed), scorer, out, shares, seed)


def _pairs(source: str, n: int, split: SplitName, seed: int) -> list[dict[str, Any]]:
    from lit_rlhf.data.rows import preference_rows
    from lit_rlhf.data.sources import read
    from lit_rlhf.data.synthetic import World

    if source == "builtin:world":
        return World(seed).preference_rows(n, noise=0.0, split=split)
    found = list(islice(((record, row) for record in read(source) for row in preference_rows(record)), n + 1))
    if len(found) > n:
        print(f"{source} has more than {n} pairs; the first {n} are labelled, a larger --n takes more")
    texts = ("prompt", "chosen", "rejected")
    return [dict(record.values) | {key: getattr(row, key) for key in texts} for record, row in found[:n]]


def _label_by_gold(rows: list[dict[str, Any]], gold: Any, out: str, noise: tuple[float, float], seed: int) -> None:
    from lit_rlhf.labelling import label_pairs

    labelled = label_pairs(rows, gold, noise[0], seed, aspect_noise=noise[1])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in labelled), encoding="utf-8")
    flipped = sum(row["flipped"] for row in labelled)
    print(f"{len(labelled)} pairs written to {out}: {flipped} labels wrong, {len(rows) - len(labelled)} ties left out")


def _label_by_judge(rows: list[dict[str, Any]], judge: JudgeOptions, out: str) -> None:
    from lit_rlhf.judge import label_aspects, table

    summary = label_aspects(rows, judge, out)
    print(table(summary["points"]))
    notes = [f"{summary['pairs_without_labels']} of them without any label"]
    if summary["pairs_without_points"]:
        notes.append(f"{summary['pairs_without_points']} in categories without points")
    if summary["this_run"]["failed"]:
        failed = summary["this_run"]["failed"]
        notes.append(f"{failed} questions stayed without an answer (the same command asks them again)")
    print(f"{len(rows)} pairs written to {out}: {', '.join(notes)}")


def export(checkpoint: str, out: str, *, merge: bool = False) -> None:
    """Turn a checkpoint into a folder that plain transformers (or peft, for adapters) loads.

    Args:
        checkpoint: run folder or checkpoint.
        out: folder to write.
        merge: fold adapters into the weights, so that transformers alone loads it.
    """
    from lit_rlhf.loading import load

    module = load(checkpoint)
    module.export(out, merge=merge)
    print(f"exported to {out}")


def _predictor(model: str) -> Any:
    """Return what scores, or what samples: a scorer for a folder that describes one, else a module."""
    from lit_rlhf.assets import resolve
    from lit_rlhf.loading import load
    from lit_rlhf.models import reward
    from lit_rlhf.modules.policy import PolicyModule

    if (Path(resolve(model)) / "reward.json").is_file():
        return reward.load(model)
    module = load(model)
    if not hasattr(module, "score") and not isinstance(module, PolicyModule):
        raise UserError(f"{model!r} is a {type(module).__name__}: it neither scores responses nor samples any")
    return module


def _scorer(class_path: str) -> Any:
    from jsonargparse import ArgumentParser

    from lit_rlhf.types import Scorer

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--gold", type=Scorer)
    try:
        return parser.instantiate(parser.parse_args([f"--gold={class_path}"])).gold
    except Exception as error:
        raise UserError(f"gold: {class_path!r} is no Scorer that can be built without arguments") from error


def _prompts(prompts: Sequence[str] | None, file: str | None) -> Iterator[Prompt]:
    if file is not None:
        from lit_rlhf.data.rows import prompt_rows
        from lit_rlhf.data.sources import read

        yield from (row.prompt for record in read(file) for row in prompt_rows(record))
    elif prompts:
        yield from prompts
    else:
        if sys.stdin.isatty():
            print("one prompt a line; end with Ctrl-D", file=sys.stderr)
        yield from (line.strip() for line in sys.stdin if line.strip())


@dataclass(frozen=True)
class Draw:
    """How a chunk of responses is drawn: row i has the generator of (seed, 0, first + i, 0)."""

    sampling: Sampling
    seed: int
    first: int = 0

    def responses(self, policy: Any, prompts: list[Prompt]) -> list[str]:
        """Draw one response per prompt."""
        from lit_rlhf.functional.sequence import row_generator

        generators = [row_generator(self.seed, 0, self.first + i, 0) for i in range(len(prompts))]
        found: list[str] = policy.sample(prompts, generators, self.sampling).responses
        return found


def _answered(module: Any, records: Sequence[Any], draw: Draw) -> Iterator[dict[str, Any]]:
    from lit_rlhf.data.rows import prompt_rows

    prompts = [row.prompt for record in records for row in prompt_rows(record)]
    for prompt, response in zip(prompts, draw.responses(module, prompts), strict=True):
        yield {"prompt": prompt, "response": response}


def _scored(module: Any, records: Sequence[Any], _draw: Draw) -> Iterator[dict[str, Any]]:
    """Score `response`, or `chosen` and `rejected`, of every row."""
    from lit_rlhf.data.rows import preference_rows, sft_rows

    single = all(record.get("response") is not None for record in records)
    rows = [row for record in records for row in (sft_rows if single else preference_rows)(_with_category(record))]
    keys = ("response",) if single else ("chosen", "rejected")
    prompts, categories = [r.prompt for r in rows], [r.category for r in rows]
    scores = {key: module.score(prompts, [getattr(r, key) for r in rows], categories) for key in keys}
    for i, row in enumerate(rows):
        texts = {key: getattr(row, key) for key in keys}
        named = {} if row.category is None else {"category": row.category}
        found = {key: _scores_row(scores[key], i) for key in keys}
        yield {"prompt": row.prompt} | texts | named | (found["response"] if single else {"scores": found})


def _with_category(record: Any) -> Any:
    subset = record.get("subset")
    if record.get("category") is not None or not isinstance(subset, str):
        return record
    return replace(record, values={**record.values, "category": subset})


def _scores_row(scores: Scores, i: int) -> dict[str, Any]:
    members = None if scores.members is None else scores.members[i].tolist()
    return {
        "total": scores.total[i].item(),
        "members": members,
        "parts": {n: part[i].item() for n, part in scores.parts.items() if not part[i].isnan()},  # NaN: no such part
    }


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
