"""A DMoERM on disk: ordinary reward model and adapter folders, and one file that says how they belong together.

    reward.json                    form, base, order of categories and points, scales, what the score is
    category-0/                    phase 1 of the first category: a LoRA reward model ("backbones": a whole one)
    category-0/point-0/            its first point: a LoRA reward model of its own, the category's update included
    category-0/mixture.safetensors phase 3: Linear(k H, H), PReLU, Linear(H, 1)
    router/                        a sequence classifier

Each category and point folder is scored by plain transformers or peft too, with phase 1's and the point's raw score.
What a phase has not trained yet is not written. The folder may be moved: `read_moe` finds its parts where it is, and
needs the base of the shared form alone. Only the points' folders of "backbones", loaded each by itself, name their
category's folder by its first place, since peft has no relative names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.assets import MODELS, PREFIX, resolve
from lit_rlhf.models.expert_folders import ExpertFolder, write_experts
from lit_rlhf.models.experts import ExpertBody
from lit_rlhf.models.loading import LoRA, ModelOptions, full_state_dict, is_writer
from lit_rlhf.models.moe import INNERS, Inner, MoE
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.models.router import RouterModel
from lit_rlhf.types import UserError

FORM = "reward_moe"
DESCRIPTION = "reward.json"
_MIXTURE = "mixture.safetensors"


def write_moe(
    moe: MoE,
    folder: str | Path,
    tokenizer: Any,
    *,
    inner: Inner,
    phases: Collection[str] = ("task", "capability", "mixture"),
    router: RouterModel | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write everything that the phases done have trained; call it on all ranks, rank 0 writes.

    Args:
        moe: what to write.
        folder: where to; made if absent.
        tokenizer: saved beside each part.
        inner: which phase's score is the model's.
        phases: those done.
        router: written beside, where there is one.
        settings: further entries of `reward.json`, such as joiner and window.
    """
    folder = Path(folder)
    with_points = not {"capability", "mixture"}.isdisjoint(phases)
    for c in range(len(moe.categories)):
        _write_category(moe, c, folder / f"category-{c}", tokenizer, with_points=with_points)
        mixture = full_state_dict(moe.mixtures[c])
        if "mixture" in phases and is_writer():
            from safetensors.torch import save_file

            save_file(mixture, folder / f"category-{c}" / _MIXTURE)
    if router is not None:
        router.export(folder / "router", tokenizer)
    if is_writer():
        described = _described(moe, with_points=with_points) | {"inner": inner, "phases": list(phases)}
        described |= {"router": None if router is None else "router"} | (settings or {})
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder)


def read_description(folder: str | Path) -> dict[str, Any]:
    """Return the content of `reward.json`.

    Raises:
        UserError: there is none, or it describes something else.
    """
    file = Path(folder) / DESCRIPTION
    if not file.is_file():
        raise UserError(f"{str(folder)!r} holds no {DESCRIPTION}; expected a DMoERM folder")
    described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if described.get("form") != FORM:
        raise UserError(f"{str(file)!r} describes form {described.get('form')!r}; expected {FORM!r}")
    return described


def read_moe(folder: str | Path, options: ModelOptions | None = None) -> MoE:
    """Return the model of a folder, its own adapter settings in place of those of `options`.

    The form "backbones" reads its bodies from the folder and has no need of what they were trained from.
    """
    described = read_description(folder)
    points = {entry["name"]: [point["name"] for point in entry["points"]] for entry in described["categories"]}
    settings = described["lora"]
    targets = settings["target_modules"]
    lora = LoRA(**(settings | {"target_modules": targets if isinstance(targets, str) else tuple(targets)}))
    options = replace(options or ModelOptions(), lora=lora)
    bodies = [str(Path(folder) / entry["folder"]) for entry in described["categories"]]
    own = described["body"] == "backbones"
    moe = MoE(bodies if own else described["base"], points, options, form=described["body"])
    moe.path = resolve(described["base"])
    fill_moe(moe, folder)
    return moe


def scaled(described: dict[str, Any]) -> bool:
    """Say whether a folder's scores were brought to one scale; those of a single category need none."""
    inner, categories = described["inner"], described["categories"]
    return len(categories) == 1 or all((c["mean"][inner], c["std"][inner]) != (0.0, 1.0) for c in categories)


@torch.no_grad()
def fill_moe(moe: MoE, folder: str | Path) -> list[str]:
    """Load a folder into a model of the same categories, points and adapters, and return the phases that were done.

    Raises:
        UserError: the folder's categories, points, form, adapters, shapes or, if shared, base are others.
    """
    folder, described = Path(folder), read_description(folder)
    theirs = {entry["name"]: tuple(point["name"] for point in entry["points"]) for entry in described["categories"]}
    if list(theirs.items()) != list(moe.points.items()) or described["body"] != moe.form:
        raise UserError(
            f"{str(folder)!r} holds form {described['body']!r} of {theirs}; expected form {moe.form!r} of {moe.points}"
        )
    _check_adapters(folder, described["lora"], _lora(moe))
    if moe.form == "shared" and _place(described["base"]) != _place(moe.path):
        raise UserError(f"{str(folder)!r} stands on the model {described['base']!r}, expected {moe.path!r}")
    for c, entry in enumerate(described["categories"]):
        _fill_category(moe, c, folder, entry)
    return list(described["phases"])


def _check_adapters(folder: Path, theirs: dict[str, Any], lora: LoRA) -> None:
    """Compare what an adapter's weights mean nothing without."""
    own = vars(lora)
    for name, word in (("r", "rank"), ("alpha", "alpha"), ("target_modules", "target_modules")):
        found, expected = (list(v) if isinstance(v, tuple) else v for v in (theirs[name], own[name]))
        if found != expected and not (isinstance(found, list) and sorted(found) == sorted(expected)):
            raise UserError(f"{str(folder)!r} has adapters of {word} {found}, expected {expected}")


def _place(path: str) -> str:
    """Return one spelling of a model's name: the real path of a folder, a hub id as it is."""
    found = Path(resolve(path))
    return str(found.resolve()) if found.is_dir() else path


def _portable(path: str) -> str:
    """Return the `builtin:` name of a model that ships with the package, wherever that is installed; else the path."""
    return next((name for name in (PREFIX + model for model in MODELS) if _is_builtin(name, path)), path)


def _is_builtin(name: str, path: str) -> bool:
    return Path(path).name == name.removeprefix(PREFIX) and Path(resolve(name)) == Path(path)


def _lora(moe: MoE) -> LoRA:
    assert moe.options.lora is not None
    return moe.options.lora


def _described(moe: MoE, *, with_points: bool) -> dict[str, Any]:
    lora = _lora(moe)
    targets = lora.target_modules
    categories = []
    for c, (name, points) in enumerate(moe.points.items()):
        first = int(moe.offsets[c])
        categories.append(
            {
                "name": name,
                "folder": f"category-{c}",
                "mean": dict(zip(INNERS, moe.score_mean[:, c].tolist(), strict=True)),
                "std": dict(zip(INNERS, moe.score_std[:, c].tolist(), strict=True)),
                "points": [
                    {
                        "name": point,
                        "folder": f"category-{c}/point-{i}" if with_points else None,
                        "mean": moe.point_mean[first + i].item(),
                        "std": moe.point_std[first + i].item(),
                    }
                    for i, point in enumerate(points)
                ],
            }
        )
    return {
        "form": FORM,
        "version": 1,
        "body": moe.form,
        "base": _portable(moe.path),
        "lora": vars(lora) | {"target_modules": targets if isinstance(targets, str) else list(targets)},
        "categories": categories,
    }


def _write_category(moe: MoE, c: int, folder: Path, tokenizer: Any, *, with_points: bool) -> None:
    first, count = int(moe.offsets[c]), len(moe.points[moe.categories[c]])
    scale = float(moe.score_mean[0, c]), float(moe.score_std[0, c])
    head = moe.task_heads[c]
    slots: list[tuple[int, ...]]
    body = moe.body if moe.form == "shared" else moe.bodies[c]
    assert isinstance(body, ExpertBody)
    assert isinstance(head, nn.Linear)
    if moe.form == "shared":
        write_experts(body, [ExpertFolder(folder, head, (c,), *scale)], tokenizer)
        slots = [(c, len(moe.categories) + first + i) for i in range(count)]
    else:
        _write_body(body, head, folder, tokenizer, scale)
        slots = [(i,) for i in range(count)]
    if not with_points:
        return
    items = [
        ExpertFolder(
            folder / f"point-{i}",
            moe.point_heads[first + i],  # type: ignore[arg-type]
            slots[i],
            moe.point_mean[first + i].item(),
            moe.point_std[first + i].item(),
        )
        for i in range(count)
    ]
    with _standing_on(body, folder if moe.form == "backbones" else None):
        write_experts(body, items, tokenizer)


def _write_body(body: ExpertBody, head: nn.Linear, folder: Path, tokenizer: Any, scale: tuple[float, float]) -> None:
    """Write a body that was trained as a whole, with phase 1's head and without its points."""
    state, own = full_state_dict(body.transformer), full_state_dict(head)
    if not is_writer():
        return
    model = RewardModel(body.path, replace(body.options, lora=None))
    model.classifier.base_model.load_state_dict(_without_experts(state))
    model.head.load_state_dict(own)
    model.set_scale(*scale)
    model.export(folder, tokenizer)


@contextmanager
def _standing_on(body: ExpertBody, folder: Path | None) -> Iterator[None]:
    """Let adapters name the folder of their category's body as their base, while they are written."""
    before = body.path
    body.path = before if folder is None else str(folder.resolve())
    try:
        yield
    finally:
        body.path = before


def _fill_category(moe: MoE, c: int, folder: Path, entry: dict[str, Any]) -> None:
    first = int(moe.offsets[c])
    for level, inner in enumerate(INNERS):
        moe.score_mean[level, c], moe.score_std[level, c] = entry["mean"][inner], entry["std"][inner]
    own = folder / entry["folder"]
    shared = moe.form == "shared"
    body = moe.body if shared else moe.bodies[c]
    assert isinstance(body, ExpertBody)
    if shared:
        _fill_expert(body, c, moe.task_heads[c], own)
    else:
        _fill_body(body, moe.task_heads[c], own)
    for i, point in enumerate(entry["points"]):
        moe.point_mean[first + i], moe.point_std[first + i] = point["mean"], point["std"]
        if point["folder"] is not None:
            slot = len(moe.categories) + first + i if shared else i
            _fill_expert(body, slot, moe.point_heads[first + i], folder / point["folder"])
    if (own / _MIXTURE).is_file():
        from safetensors.torch import load_file

        moe.mixtures[c].load_state_dict(load_file(own / _MIXTURE))


def _fill_expert(body: ExpertBody, slot: int, head: nn.Module, folder: Path) -> None:
    """Copy an adapter folder into a slot; of summed experts the last one is the slot's own."""
    from peft import load_peft_weights

    state = load_peft_weights(str(folder), device="cpu")
    for name, layer in body.expert_layers.items():
        key, r = f"base_model.model.{body.prefix}.{name}", layer.A.shape[-1]
        layer.A[slot] = state[f"{key}.lora_A.weight"][-r:].T
        layer.B[slot] = state[f"{key}.lora_B.weight"][:, -r:].T
    head.load_state_dict({name: state[f"base_model.model.score.{name}"] for name in head.state_dict()})


def _fill_body(body: ExpertBody, head: nn.Module, folder: Path) -> None:
    model = RewardModel(str(folder), replace(body.options, lora=None), fresh_head=False)
    theirs = model.classifier.base_model.state_dict()
    own = body.transformer.state_dict()
    for name, value in _without_experts(own).items():
        found = theirs[name][: len(value)] if name in theirs else None  # it may have a row for a padding token
        if found is None or found.shape != value.shape:
            shape = None if found is None else tuple(found.shape)
            raise UserError(
                f"{str(folder)!r}: {name} has shape {shape}, expected {tuple(value.shape)} as in {body.path!r}"
            )
        value.copy_(found)
    head.load_state_dict(model.head.state_dict())


def _without_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a plain transformer, under its own names."""
    return {n.replace(".base.", "."): v for n, v in state.items() if not n.endswith((".A", ".B"))}
