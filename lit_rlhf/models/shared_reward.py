"""LoRA reward models that live on the policy's own base: one copy of the weights for both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.assets import resolve
from lit_rlhf.encoding import Encoder
from lit_rlhf.models.backbone import Backbone, evaluating
from lit_rlhf.models.loading import LoRA, adapter_base
from lit_rlhf.models.scorers import score_rows
from lit_rlhf.types import Prompt, Scorer, Scores, Sequences, UserError


class SharedAdapterReward(Scorer):
    """A LoRA reward model folder, run as one more frozen adapter on the policy's base.

    Scores are raw and equal those of `HFRewardModel` on the same folder. Nothing of it is trained, or saved in
    checkpoints. The policy must have LoRA adapters itself (its base is frozen) and the base that the folder names.

    Args:
        path: folder that `RewardModel.export` wrote for a LoRA model: adapter and score head.
        batch_size: rows in one forward pass; >= 1.
        joiner: text between a string prompt and its response.
        max_length: window in tokens; None takes the model's, at most 1024.

    Raises:
        UserError: `path` is no adapter folder with a score head.
    """

    def __init__(self, path: str, batch_size: int = 64, joiner: str = " ", *, max_length: int | None = None) -> None:
        if batch_size < 1:
            raise UserError(f"SharedAdapterReward: batch_size must be >= 1, got {batch_size}")
        self.path, self.batch_size, self.joiner, self.max_length = path, batch_size, joiner, max_length
        self._model: _AdapterScore | None = None
        self._encoder: Encoder | None = None

    def attach(self, policy: Backbone) -> None:
        """Load the adapter into the policy's model, before it is sharded.

        Raises:
            UserError: the folder names another base than the policy's.
        """
        base = adapter_base(self.path)
        if base is None:
            raise UserError(f"SharedAdapterReward: {self.path!r} holds no adapter; HFRewardModel reads whole models")
        if _place(base) != _place(policy.path):
            raise UserError(
                f"SharedAdapterReward: {self.path!r} is an adapter of {base!r}, and the policy's base is"
                f" {policy.path!r}; HFRewardModel loads a base of its own"
            )
        self._model = _AdapterScore(policy, self.path)
        self._encoder = Encoder.from_pretrained(self.path, joiner=self.joiner, max_length=self.max_length)
        self._encoder.pad_id = self._encoder.eos_id  # the folder's padding token may have no embedding; masks hide any

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        categories: Sequence[str | None] | None = None,  # noqa: ARG002 - one reward model for all categories
    ) -> Scores:
        """Score each response; categories are not read.

        Raises:
            UserError: no policy was attached, or a prompt fills the window alone.
        """
        if self._model is None or self._encoder is None:
            raise UserError(f"SharedAdapterReward: {self.path!r} needs a PPO policy to share its base with")
        return Scores(score_rows(self._model.followed(), self._encoder, prompts, responses, self.batch_size))


class _AdapterScore(nn.Module):
    """A frozen adapter and score head; the policy is none of its parts."""

    def __init__(self, policy: Backbone, path: str) -> None:
        from safetensors.torch import load_file

        super().__init__()
        self.name = f"reward-{len(policy.model.peft_config) if policy.options.lora else 0}"
        self._policy = [policy]
        weights = load_file(Path(path) / "adapter_model.safetensors")
        head = [key for key in weights if key.endswith("score.weight")]
        if len(head) != 1:
            raise UserError(f"SharedAdapterReward: {path!r} holds {len(head)} score heads; expected one")
        self.head = nn.Parameter(weights.pop(head[0]).float(), requires_grad=False)
        policy.add_adapter(self.name, _described(path), trainable=False)
        _fill(policy.model, self.name, weights, path)

    def followed(self) -> _AdapterScore:
        """Return this, on the policy's device."""
        return self.to(next(self._policy[0].parameters()).device)

    def forward(self, sequences: Sequences) -> Tensor:
        """Return raw scores [N], read at the last real token."""
        policy = self._policy[0]
        with evaluating(policy), policy.adapter(self.name):
            states = policy.states(_asking_after_the_last(sequences))
        return (states.float() @ self.head.T)[:, 0]


def _asking_after_the_last(sequences: Sequences) -> Sequences:
    """Add a column and mark, in each row, the column after its last real token, which its state would predict."""
    ids, real = (nn.functional.pad(x, (0, 1)) for x in (sequences.ids, sequences.attention_mask))
    last = (real * torch.arange(real.shape[1], device=real.device)).argmax(-1)
    mask = torch.zeros_like(real)
    mask[torch.arange(len(mask), device=mask.device), last + 1] = True
    return Sequences(ids, real, mask)


def _described(path: str) -> LoRA:
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(path)
    targets = config.target_modules if isinstance(config.target_modules, str) else tuple(sorted(config.target_modules))
    return LoRA(r=config.r, alpha=config.lora_alpha, dropout=0.0, target_modules=targets)


def _fill(model: nn.Module, name: str, weights: dict[str, Tensor], path: str) -> None:
    """Copy an adapter's weights to where the policy's model keeps those called `name`.

    Raises:
        UserError: a weight has no place, or a place no weight.
    """
    ending = {side: f".{side}.{name}.weight" for side in ("lora_A", "lora_B")}
    own = {key: parameter for key, parameter in model.named_parameters() if key.endswith(tuple(ending.values()))}
    renamed = {
        key.replace(f".{side}.weight", end): value for key, value in weights.items() for side, end in ending.items()
        if key.endswith(f".{side}.weight")
    }  # fmt: skip
    if own.keys() != renamed.keys() or len(renamed) != len(weights):
        odd = sorted(own.keys() ^ renamed.keys())[:3]
        raise UserError(f"SharedAdapterReward: {path!r} does not fit the policy's model, as at {', '.join(odd)}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(renamed[key])


def _place(path: str) -> str:
    found = Path(resolve(path))
    return str(found.resolve()) if found.exists() else path
