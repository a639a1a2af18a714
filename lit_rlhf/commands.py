"""The small commands: sample, predict, label, export. Each is a plain function of its arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.types import Prompt, Sampling, Scores

SAMPLING = Sampling()


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
    policy = _policy(model)
    for index, prompt in enumerate(_prompts(prompts, file)):
        for response in Draw(sampling, seed, index * n).responses(policy, [prompt] * n):
            print(f"> {_shown(prompt)}\n{response}\n", flush=True)


def predict(
    model: str, data: str, out: str, *, batch_size: int = 32, sampling: Sampling = SAMPLING, seed: int = 0
) -> None:
    """Score a file of responses with a reward model, or answer a file of prompts with a policy.

    Args:
        model: run folder, checkpoint, model folder, hub id or builtin: name.
        data: rows with `prompt` and `response`, or preference rows (reward model); rows with `prompt` (policy).
        out: JSONL to write; one row in, one row out, in order.
        batch_size: rows at a time.
        sampling: for a policy: temperature, top_p, top_k, max_new_tokens.
        seed: seed of a policy's draws.
    """
    from lit_rlhf.data.sources import read
    from lit_rlhf.loading import load
    from lit_rlhf.modules import RewardModule

    module = load(model)
    records = list(read(data))
    answer = _scored if isinstance(module, RewardModule) else _answered
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with Path(out).open("w", encoding="utf-8") as file:
        for start in range(0, len(records), batch_size):
            chunk = records[start : start + batch_size]
            rows = answer(module, chunk, Draw(sampling, seed, first=start))
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(records)} rows written to {out}")


def label(
    out: str,
    *,
    source: str = "builtin:world",
    noise: float = 0.25,
    n: int = 8000,
    seed: int = 0,
    gold: str = "lit_rlhf.data.synthetic.WorldGold",
) -> None:
    """Write preference labels onto pairs by the gold reward, a stated share of them wrong.

    Args:
        out: JSONL to write.
        source: preference rows to label anew, or `builtin:world` for fresh pairs of the built-in world.
        noise: share of wrong labels in [0, 0.5]; exactly that share is flipped.
        n: how many pairs at most.
        seed: of the world's pairs and, apart, of the flips.
        gold: class path of the scorer that labels.
    """
    from lit_rlhf.data.rows import preference_rows
    from lit_rlhf.data.sources import read
    from lit_rlhf.data.synthetic import World
    from lit_rlhf.labelling import label_pairs

    if n < 1:
        raise UserError(f"n must be >= 1 pairs, got {n}")
    if source == "builtin:world":
        rows = World(seed).preference_rows(n, noise=0.0)
    else:
        found = islice(((record, row) for record in read(source) for row in preference_rows(record)), n)
        texts = ("prompt", "chosen", "rejected")
        rows = [dict(record.values) | {key: getattr(row, key) for key in texts} for record, row in found]
    labelled = label_pairs(rows, _scorer(gold), noise, seed)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in labelled), encoding="utf-8")
    flipped = sum(row["flipped"] for row in labelled)
    print(f"{len(labelled)} pairs written to {out}: {flipped} labels wrong, {len(rows) - len(labelled)} ties left out")


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


def _policy(model: str) -> Any:
    from lit_rlhf.loading import load
    from lit_rlhf.modules.policy import PolicyModule

    module = load(model)
    if not isinstance(module, PolicyModule):
        raise UserError(f"{model!r} is a reward model: it scores responses (`predict`) and samples none")
    return module


def _scorer(class_path: str) -> Any:
    from jsonargparse import ArgumentParser

    from lit_rlhf.types import Scorer

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--gold", type=Scorer)
    try:
        return parser.instantiate_classes(parser.parse_args([f"--gold={class_path}"])).gold
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
    rows = [row for record in records for row in (sft_rows if single else preference_rows)(record)]
    keys = ("response",) if single else ("chosen", "rejected")
    scores = {key: module.score([r.prompt for r in rows], [getattr(r, key) for r in rows]) for key in keys}
    for i, row in enumerate(rows):
        texts = {key: getattr(row, key) for key in keys}
        found = {key: _scores_row(scores[key], i) for key in keys}
        yield {"prompt": row.prompt} | texts | (found["response"] if single else {"scores": found})


def _scores_row(scores: Scores, i: int) -> dict[str, Any]:
    members = None if scores.members is None else scores.members[i].tolist()
    return {
        "total": scores.total[i].item(),
        "members": members,
        "parts": {name: part[i].item() for name, part in scores.parts.items()},
    }


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
