"""A scalar reward model: any sequence classifier of transformers with one score, read at the last real token."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.models.loading import (
    ModelOptions,
    adapter_base,
    add_lora,
    checkpoint_activations,
    decoder_layers,
    full_state_dict,
    is_writer,
    load_config,
    load_model,
    merge_adapter,
    run_transformer,
)
from lit_rlhf.types import Scorer, Sequences, UserError

DESCRIBED = "score.json"  # beside an adapter: what `config.json` holds beside full weights
SCALE = ("score_mean", "score_std")
FORM_FILE = "reward.json"  # over the folders of a model of several parts
FORMS = {  # form to scorer; imported when asked for
    "reward": "lit_rlhf.models.scorers.HFRewardModel",
    "reward_ensemble": "lit_rlhf.models.scorers.EnsembleRewardModel",
    "reward_moe": "lit_rlhf.models.moe_scorer.MoERewardModel",
}


class RewardModel(nn.Module):
    """score = w . h[last real token], one number a sequence, in the model's own raw units.

    The head is new where the folder is a causal LM: normal with standard deviation 1 / sqrt(d + 1), d the width
    (Stiennon et al. 2020, arXiv:2009.01325, appendix B.1). It works in float32 whatever the body's precision.

    Args:
        path: causal LM folder, reward model folder (also a LoRA one written by `export`), or hub id.
        options: dtype, attention, checkpointing, LoRA (the head is then trained in full beside the adapters).
        fresh_head: whether a causal LM gets a new head; a scorer refuses one, its scores would be noise.

    Attributes:
        model: the transformers model, or peft's wrapper of it.
        score_mean: [], mean score on held-out responses; NaN until set.
        score_std: [], their standard deviation; NaN until set.
        sharded: whether `shard` was called.

    Raises:
        UserError: no such model, missing weights, or a classifier that does not give exactly one score.
    """

    score_mean: Tensor
    score_std: Tensor

    def __init__(self, path: str, options: ModelOptions | None = None, *, fresh_head: bool = True) -> None:
        super().__init__()
        from lit_rlhf.assets import resolve

        self.path = resolve(path)
        self.options = options or ModelOptions()
        model, _ = load_classifier(self.path, self.options, fresh_head=fresh_head)
        for name, value in zip(("score_mean", "score_std"), score_scale(vars(model.config)), strict=True):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        self.model: Any = add_lora(model, self.options.lora, "SEQ_CLS") if self.options.lora else model
        if self.options.activation_checkpointing:
            checkpoint_activations(self.classifier)
        self.sharded = False

    @property
    def classifier(self) -> Any:
        """The transformers model inside, its layers carrying the adapters where there are any."""
        return self.model.get_base_model() if self.options.lora else self.model

    @property
    def head(self) -> nn.Linear:
        """The score layer that is trained and read."""
        head: Any = self.classifier.score
        return head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head

    def forward(self, sequences: Sequences) -> Tensor:
        """Score N sequences, padded on either side: raw scores [N], float32."""
        hidden = run_transformer(
            self.classifier.base_model, sequences.ids, sequences.attention_mask, sequences.position_ids
        )
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), last_token(sequences.attention_mask)]
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled.to(self.head.weight.dtype))[:, 0].float()

    def standardise(self, scores: Tensor) -> Tensor:
        """Return raw scores less their mean, over their standard deviation.

        Raises:
            UserError: the model keeps neither.
        """
        if not self.score_std.isfinite():
            raise UserError(
                f"{self.path} keeps no mean and standard deviation of its scores, so they cannot be normalised: a `fit`"
                " measures them in its validation; expected such a model, or normalise: false"
            )
        return (scores - self.score_mean.to(scores)) / self.score_std.to(scores)

    @torch.no_grad()
    def set_scale(self, mean: float | Tensor, std: float | Tensor) -> None:
        """Keep the mean and standard deviation of the scores on held-out responses; NaN and NaN for none.

        Raises:
            UserError: a spread that is not a positive number.
        """
        mean, std = float(mean), float(std)
        none = math.isnan(mean) and math.isnan(std)
        if not none and not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise UserError(f"the scores' mean must be finite and their std positive, got mean {mean} and std {std}")
        self.score_mean.fill_(mean)
        self.score_std.fill_(std)

    def shard(self, mesh: Any, mp_policy: Any = None) -> None:
        """Shard the parameters over a device mesh by FSDP2; the head stays in float32 whatever `mp_policy` says."""
        from torch.distributed.fsdp import fully_shard

        how = {"mesh": mesh} | ({"mp_policy": mp_policy} if mp_policy is not None else {})
        model = self.classifier
        for layer in decoder_layers(model.base_model, model.config.get_text_config().num_hidden_layers):
            fully_shard(layer, **how)
        fully_shard(self.head, mesh=mesh)
        fully_shard(self, **how)
        self.sharded = True

    def export(self, folder: str | Path, tokenizer: Any, *, merged: bool = False) -> None:
        """Write a folder that plain transformers (or peft, for adapters) scores with; call it on all ranks.

        Plain transformers finds the last token by the padding id, so a padding token apart from the end token is
        chosen; a tokenizer without one gets a new token and the model one more embedding row. `config.json` carries
        `score_mean` and `score_std` where they were measured; an adapter folder keeps them, and the vocabulary's size,
        in `score.json`, since a `config.json` beside an adapter would pass for a whole model.

        Args:
            folder: where to; made if absent.
            tokenizer: of this model; saved too, with the padding token in use.
            merged: with LoRA, write the full model with the updates added in, in place of the adapter alone; always so
                where the model itself came from an adapter folder.
        """
        state = full_state_dict(self.model)
        if not is_writer():
            return
        merged = merged or adapter_base(self.path) is not None  # an adapter folder can name no merged base
        model = self.model
        if self.options.lora and merged:
            copy = RewardModel(self.path, self.options)
            copy.model.load_state_dict(state)
            model = copy.model.merge_and_unload()
            state = model.state_dict()
        config = self._export_config(tokenizer)
        if self.options.lora and not merged:
            model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
            _save_described(config, folder)
        else:
            _save_classifier(model, state, config, folder)
        tokenizer.save_pretrained(folder)

    def _export_config(self, tokenizer: Any) -> Any:
        """Return the config to write, and see to it that `tokenizer` pads with a token of its own."""
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
        config = type(self.classifier.config).from_dict(self.classifier.config.to_dict())
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, tokenizer.pad_token_id + 1)
        config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
        config.architectures = [type(self.classifier).__name__]
        for name in SCALE:
            vars(config).pop(name, None)
            if self.score_std.isfinite():
                setattr(config, name, float(getattr(self, name)))
        return config


def load(path: str, **options: Any) -> Scorer:
    """Return the scorer of a reward model folder of any form, by the `form` in its `reward.json`.

    Args:
        path: folder, hub id or `builtin:` name; without `reward.json` it is an ordinary reward model.
        options: further arguments of that scorer.

    Raises:
        UserError: an unknown form.
    """
    content = described(path)
    form = "reward" if content is None else content["form"]
    if form not in FORMS:
        raise UserError(f"{path}: {FORM_FILE} names the form {form!r}; expected one of {', '.join(FORMS)}")
    module, _, name = FORMS[form].rpartition(".")
    scorer: Scorer = getattr(importlib.import_module(module), name)(path, **options)
    return scorer


def described(path: str) -> dict[str, Any] | None:
    """Return what a folder of several parts says of itself in `reward.json`; None for any other model.

    Raises:
        UserError: the file is no JSON object with a `form`.
    """
    file = Path(path) / FORM_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(content, dict) or "form" not in content:
        raise UserError(f"{file}: expected a JSON object with `form`, got {content!r}")
    return content


def score_scale(described: Mapping[str, Any]) -> tuple[float, float]:
    """Return the mean and standard deviation of scores that a folder's description keeps; NaN where it keeps none.

    Folders of earlier versions say 0 and 1 where nothing was measured.
    """
    mean, std = (float(described.get(name, math.nan)) for name in SCALE)
    return (math.nan, math.nan) if (mean, std) == (0.0, 1.0) else (mean, std)


def last_token(attention_mask: Tensor) -> Tensor:
    """Return the column of each row's last real token, [N], by the mask and never by ids."""
    columns = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (attention_mask * columns).argmax(-1)


def load_classifier(path: str, options: ModelOptions, *, fresh_head: bool) -> tuple[Any, bool]:
    """Load a body with one score head, adapters merged, and say whether the head is the folder's own.

    Args:
        path: causal LM, classifier or adapter folder, or hub id.
        options: how to load; new adapters are not added here.
        fresh_head: whether a causal LM gets a new head.

    Raises:
        UserError: see `RewardModel`.
    """
    base = adapter_base(path)
    file = Path(path) / DESCRIBED
    model, own_head = _load_full(base or path, options, fresh_head=fresh_head or file.is_file())
    if base is None:
        return model, own_head
    described = json.loads(file.read_text()) if file.is_file() else {}
    vocabulary = described.pop("vocab_size", 0)
    if vocabulary > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model = merge_adapter(model, path)
    model.config.update(described)
    return model, own_head or file.is_file()


def _load_full(path: str, options: ModelOptions, *, fresh_head: bool) -> tuple[Any, bool]:
    from transformers import AutoModelForSequenceClassification

    config = load_config(path, options)
    classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if classifier and config.num_labels != 1:
        raise UserError(f"{path}: this classifier gives num_labels={config.num_labels} scores; a reward model gives 1")
    if not classifier and not fresh_head:
        raise UserError(f"{path}: this is no reward model (a sequence classifier with one score was expected)")
    config.num_labels = 1
    new = () if classifier else ("score.weight", "score.bias")
    model = load_model(AutoModelForSequenceClassification, path, options, config, new)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{path}: {type(model).__name__} has no linear head called `score`")
    model.score.float()
    if not classifier:
        init_head(model.score)
    return model, classifier


def init_head(head: nn.Linear, generator: torch.Generator | None = None) -> None:
    """Draw a score head anew: normal with standard deviation 1 / sqrt(d + 1), d the width, and no bias."""
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1), generator=generator)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def _save_classifier(model: Any, state: dict[str, Tensor], config: Any, folder: str | Path) -> None:
    """Write full weights, with embedding rows for ids that the body never had."""
    embeddings = model.get_input_embeddings()
    name = next(key for key, module in model.named_modules() if module is embeddings) + ".weight"
    missing = config.get_text_config().vocab_size - state[name].shape[0]
    if missing > 0:  # a padding row, which every mask hides
        state = state | {name: torch.cat([state[name], state[name].new_zeros(missing, state[name].shape[1])])}
    model.save_pretrained(folder, state_dict=state)
    config.save_pretrained(folder)


def _save_described(config: Any, folder: str | Path) -> None:
    size = config.get_text_config().vocab_size
    described = {name: vars(config)[name] for name in SCALE if name in vars(config)} | {"vocab_size": size}
    (Path(folder) / DESCRIBED).write_text(
        json.dumps(described | {"pad_token_id": config.pad_token_id}, indent=2) + "\n"
    )
