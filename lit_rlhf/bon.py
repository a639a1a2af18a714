"""The command `bon`: N samples of a policy per prompt, made once, and what the best of n of them is worth for every n.

Responses, scores and gold are streamed to a run folder in this order, each file once; curves are then made of the files
alone. So a killed run goes on where it was, and another `ns`, selector or reward costs no new samples.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from lit_rlhf.bon_curves import Selector, Standardise, check_selectors, write_curves
from lit_rlhf.bon_store import Progress, new_folder, old_folder, resumable
from lit_rlhf.bon_work import RESPONSES, PromptLine, Work
from lit_rlhf.errors import UserError
from lit_rlhf.models.digest import weights_digest
from lit_rlhf.specs import plain
from lit_rlhf.types import Sampling, Scorer

GOLD, SCORES = "gold.jsonl", "scores"
SAMPLING = Sampling()


def bon(  # noqa: PLR0913 - one argument for each key of the config
    *,
    policy: str = "builtin:policy",
    prompts: str = "builtin:world",
    split: Literal["train", "validation", "test"] = "validation",
    n_prompts: int = 40,
    n_samples: int = 512,
    ns: list[int] | None = None,
    sampling: Sampling = SAMPLING,
    rewards: dict[str, Scorer] | None = None,
    selectors: dict[str, Selector] | None = None,
    standardise: Standardise = "overall",
    gold: Scorer | None = None,
    seed: int = 0,
    batch_size: int = 256,
    label: str | None = None,
    out: str = "runs/bon",
    resume: str | None = None,
) -> None:
    """Best-of-n: N samples per prompt once, scored by proxies and gold, and the curve over n by the unbiased estimator.

    Args:
        policy: run folder, checkpoint, model folder, hub id or builtin: name that the samples are drawn from.
        prompts: rows with a `prompt`: a file, a folder, a hub id or builtin:world.
        split: which split to take where `prompts` has several.
        n_prompts: different prompts at most, in the order of a hash of their text.
        n_samples: N, samples of each prompt.
        ns: the grid of n, from 1 to at most N; powers of two and N when left out.
        sampling: temperature, top_p, top_k, max_new_tokens.
        rewards: name to reward model; an ensemble's members are scored in one pass. builtin:proxy-0 when left out.
        selectors: label to how responses are picked; each reward by its total when left out.
        standardise: members before they are combined, on all samples (which are those of n = 1). "overall": less their
            mean, over their standard deviation; "prompt": less their mean over the prompt's samples, over what standard
            deviation remains; "raw": as they are.
        gold: the believed reward; the built-in world's own for its prompts when left out.
        seed: of the samples: row (prompt, sample) has a generator of its own, whatever the batch.
        batch_size: responses drawn at once.
        label: name of the run for people, before the selectors' own; tells runs apart in a report.
        out: folder for run folders.
        resume: run folder to continue, or "last" for the newest under `out`.
    """
    grid = _grid(ns, n_samples)
    scorers = _rewards(rewards)
    chosen = selectors or {name: Selector(name) for name in scorers}
    check_selectors(chosen, scorers)
    for name, count in {"n_prompts": n_prompts, "n_samples": n_samples, "batch_size": batch_size}.items():
        if count < 1:
            raise UserError(f"{name} must be >= 1, got {count}")
    settings = {
        "policy": policy, "prompts": prompts, "split": split, "n_prompts": n_prompts, "n_samples": n_samples,
        "ns": grid, "sampling": dict(vars(sampling)), "rewards": plain(scorers),
        "selectors": {label: {"reward": s.reward, "by": plain(s.by)} for label, s in chosen.items()},
        "standardise": standardise, "gold": plain(gold), "seed": seed, "batch_size": batch_size,
        "label": label, "out": out,
    }  # fmt: skip
    judge = gold or _worlds_gold(prompts)
    with Progress("models loaded and tried", 1 + len(scorers)) as progress:
        module = _policy(policy)
        progress.add(1)
        rows = _prompts(module, settings, sampling)
        _try(scorers, judge, rows[0], chosen, progress)
    folder = old_folder(out, resume, RESPONSES) if resume else new_folder(out)
    print(f"{'continuing' if resume else 'writing to'} {folder}", flush=True)
    with resumable(folder):
        files = {Path(SCORES) / f"{name}.jsonl": scorer for name, scorer in scorers.items()}
        files |= {} if judge is None else {Path(GOLD): judge}
        work = Work(folder, rows, n_samples, settings, weights_digest(module))
        for file, scorer in files.items():
            work.open(file, scorer)
        (folder / "config.yaml").write_text(_yaml(settings), encoding="utf-8")
        if judge is None:
            print("no gold scorer is configured, and these prompts bring none: curves will show the proxy alone")
        work.generate(module, sampling, seed, batch_size)
        del module
        for file, scorer in files.items():
            work.score(file, scorer, f"scores by {file.stem}")
        found = {file.stem: work.columns(file) for file in files if file.parent.name}
        write_curves(folder, settings, chosen, found, work.columns(Path(GOLD)) if judge else None, work)


def _grid(ns: list[int] | None, n_samples: int) -> list[int]:
    if ns is None:
        return sorted({*(2**k for k in range(n_samples.bit_length()) if 2**k <= n_samples), n_samples})
    if not ns or ns != sorted(set(ns)) or ns[0] != 1 or ns[-1] > n_samples:
        raise UserError(f"ns must rise from 1 to at most n_samples ({n_samples}), got {ns}")
    return ns


def _rewards(rewards: dict[str, Scorer] | None) -> dict[str, Scorer]:
    if rewards is None:
        from lit_rlhf.models.scorers import HFRewardModel

        return {"proxy": HFRewardModel("builtin:proxy-0")}
    if not rewards:
        raise UserError("rewards must name at least one reward model, got none")
    for name in rewards:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"rewards: {name!r} names a file; expected letters, digits, `_`, `-` and `.`")
    return rewards


def _policy(policy: str) -> Any:
    import torch

    from lit_rlhf.loading import load_policy

    return load_policy(policy).to("cuda" if torch.cuda.is_available() else "cpu")


def _prompts(module: Any, settings: dict[str, Any], sampling: Sampling) -> list[PromptLine]:
    """Read different prompts that leave room for a response, in the order of a hash of their text."""
    from lit_rlhf.data.prompts import PromptData
    from lit_rlhf.data.rows import digest

    split, source = settings["split"], settings["prompts"]
    encoder = module.text_encoder()
    data = PromptData(
        module.model_name_or_path,
        max_new_tokens=min(sampling.max_new_tokens, encoder.max_length - 1),
        joiner=encoder.joiner,
        validation_fraction=0.0,
        **({"train": source} if split == "train" else {"train": source, split: source}),
    )
    found = data.examples(split)
    print(f"prompts ({source}, {split}): {found.summary()}")
    rows = sorted((item.row for item in found.items), key=lambda row: digest(row.group))
    return [PromptLine(row.prompt, row.category) for row in rows[: settings["n_prompts"]]]


def _worlds_gold(prompts: str) -> Scorer | None:
    from lit_rlhf.data.sources import WORLD
    from lit_rlhf.data.synthetic import WorldGold

    return WorldGold() if prompts == WORLD else None


def _try(
    scorers: dict[str, Scorer],
    gold: Scorer | None,
    line: PromptLine,
    selectors: dict[str, Selector],
    progress: Progress,
) -> None:
    """Let every scorer show what it gives before hours of sampling depend on it."""
    if gold is not None:
        gold.score([line.prompt], ["yes"], [line.category])
    for name, scorer in scorers.items():
        members = scorer.score([line.prompt], ["yes"], [line.category]).members
        for label, selector in selectors.items():
            if selector.reward == name and selector.by != "total" and members is None:
                raise UserError(f"selectors.{label}: the reward {name!r} has no members; expected `by: total`")
        progress.add(1)


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
