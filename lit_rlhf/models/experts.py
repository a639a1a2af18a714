"""Many LoRA experts on one frozen transformer, and a forward pass in which every row names the experts it uses.

Legend: N rows, L tokens, E experts, S experts summed for a row, G groups of rows, H width, r rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.functional.sequence import row_generator
from lit_rlhf.models.loading import (
    LoRA,
    ModelOptions,
    add_lora,
    checkpoint_activations,
    decoder_layers,
    run_transformer,
)
from lit_rlhf.models.reward import init_head, last_token, load_classifier, score_scale
from lit_rlhf.types import Sequences, UserError

_ADAPTER, _HEAD = 0, 1  # what a generator of (seed, expert) draws


class Routing:
    """Which experts the rows of the forward pass under way use; one object is shared by all layers of a body."""

    def __init__(self) -> None:
        self.slots: Tensor | None = None

    @contextmanager
    def using(self, slots: Tensor | None) -> Iterator[None]:
        """Route by `slots` for a while."""
        before, self.slots = self.slots, slots
        try:
            yield
        finally:
            self.slots = before

    def again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed layer's forward pass and of its recomputation, which routes alike."""
        return nullcontext(), self.using(self.slots)


class ExpertLinear(nn.Module):
    """A frozen linear layer with E low-rank updates, of which every group of rows uses its own.

    y = base(x) + (alpha / r) sum_{e in slots of the row} dropout(x) A_e B_e

    Hu et al. 2021, arXiv:2106.09685, section 3; initialised as `peft` does it: A uniform within 1 / sqrt(in), B zero.

    Args:
        base: linear layer (or GPT-2's transposed one).
        experts: E.
        lora: rank, scale and dropout.
        routing: where the forward pass under way says which experts are used.

    Attributes:
        A: [E, in, r], float32.
        B: [E, r, out], float32.
    """

    def __init__(self, base: nn.Module, experts: int, lora: LoRA, routing: Routing) -> None:
        super().__init__()
        weight: Any = base.weight
        n_out, n_in = weight.shape if isinstance(base, nn.Linear) else weight.shape[::-1]
        self.base = base
        self.scale = lora.alpha / lora.r
        self.dropout = nn.Dropout(lora.dropout)
        self.A = nn.Parameter(torch.zeros(experts, n_in, lora.r, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(experts, lora.r, n_out, dtype=torch.float32))
        self.routing = routing

    @torch.no_grad()
    def draw(self, expert: int, generator: torch.Generator) -> None:
        """Initialise one expert."""
        down = torch.empty_like(self.A[expert].T.contiguous())
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.A[expert] = down.T

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, L, in] (or the same rows flattened) to [N, L, out]."""
        y: Tensor = self.base(x)
        slots = self.routing.slots
        if slots is None:
            return y
        # summed experts are one expert of rank S r
        down = self.A[slots].transpose(1, 2).flatten(2)  # [G, in, S r]
        up = self.B[slots].flatten(1, 2)  # [G, S r, out]
        grouped = self.dropout(x).reshape(len(slots), -1, x.shape[-1]).to(down.dtype)
        wide = y.reshape(len(slots), -1, y.shape[-1]).to(down.dtype)
        return torch.baddbmm(wide, torch.bmm(grouped, down), up, alpha=self.scale).reshape(y.shape).to(y.dtype)


class ExpertBody(nn.Module):
    """One transformer without a head, its linear layers carrying E stacked LoRA experts.

    With experts the transformer is frozen and A and B train; without, the transformer trains. Every parameter of an
    expert comes from the generator of (seed, expert number), whatever the other experts are. An expert that no row
    used gets a gradient of zero, not none: optimizers with momentum or decay still move it.

    Args:
        path: causal LM or reward model folder, LoRA adapter folder (merged), or hub id.
        options: how to load; `lora` gives the experts' rank, scale, dropout and targets.
        experts: how many, numbered from 0, or their numbers; 0 for none.
        seed: of the experts and of new heads.

    Attributes:
        transformer: the transformers model without its head.
        numbers: the experts' numbers, which only seed them; slots count from 0.
        width: H.
        sharded: whether `shard` was called.

    Raises:
        UserError: no such model, experts without `options.lora` or the other way round, or targets that are no linear
            layers of the transformer.
    """

    def __init__(
        self, path: str, options: ModelOptions | None = None, experts: int | Sequence[int] = 0, *, seed: int = 0
    ) -> None:
        super().__init__()
        from lit_rlhf.assets import resolve

        self.path, self.options, self.seed = resolve(path), options or ModelOptions(), seed
        self.numbers = tuple(range(experts) if isinstance(experts, int) else experts)
        if bool(self.numbers) != (self.options.lora is not None):
            raise UserError(
                f"{path}: {len(self.numbers)} LoRA experts with lora={self.options.lora}; expected both or none"
            )
        classifier, self._own_head = load_classifier(self.path, self.options, fresh_head=True)
        self._score: list[nn.Linear] = [classifier.score]  # in a list, so that it is no part of this module
        self.prefix: str = classifier.base_model_prefix
        self.transformer: Any = classifier.base_model
        self.width: int = classifier.score.in_features
        self.routing = Routing()
        if self.options.lora is not None:
            self._add_experts(classifier, self.options.lora)
        if self.options.activation_checkpointing:
            checkpoint_activations(self.transformer, context_fn=self.routing.again)
        self.sharded = False

    @property
    def expert_layers(self) -> dict[str, ExpertLinear]:
        """The layers that carry experts, by their names inside the transformer."""
        return {n: m for n, m in self.transformer.named_modules() if isinstance(m, ExpertLinear)}

    @property
    def folder_scale(self) -> tuple[float, float]:
        """Mean and standard deviation that a reward model folder keeps of its scores; NaN where it keeps none."""
        return score_scale(vars(self.transformer.config))

    def new_head(self, number: int) -> nn.Linear:
        """Return a trainable score head in float32: a copy of the folder's own, or one drawn from (seed, number)."""
        head = copy.deepcopy(self._score[0]).requires_grad_(requires_grad=True)
        if not self._own_head:
            init_head(head, row_generator(self.seed, 0, number, _HEAD))
        return head

    def forward(self, sequences: Sequences, slots: Tensor | None = None) -> Tensor:
        """Return the state of each row's last real token.

        Args:
            sequences: N rows, padded on either side.
            slots: [G, S], the experts whose updates are summed for each of G equal groups of successive rows; with
                G = N every row has its own. None runs the body alone.

        Returns:
            [N, H], float32.
        """
        if slots is not None and len(sequences.ids) % len(slots):
            raise ValueError(f"{len(sequences.ids)} rows cannot form {len(slots)} equal groups")
        with self.routing.using(slots):
            hidden = run_transformer(self.transformer, sequences.ids, sequences.attention_mask, sequences.position_ids)
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, last_token(sequences.attention_mask)].float()

    def shard(self, mesh: Any, mp_policy: Any = None) -> None:
        """Shard the parameters over a device mesh by FSDP2: each decoder layer with its experts, then the rest."""
        from torch.distributed.fsdp import fully_shard

        how = {"mesh": mesh} | ({"mp_policy": mp_policy} if mp_policy is not None else {})
        layers = self.transformer.config.get_text_config().num_hidden_layers
        for layer in decoder_layers(self.transformer, layers):
            fully_shard(layer, **how)
        fully_shard(self, **how)
        self.sharded = True

    def _add_experts(self, classifier: Any, lora: LoRA) -> None:
        """Put experts where peft would put adapters, and freeze the rest."""
        found = add_lora(classifier, lora, "SEQ_CLS").base_model.targeted_module_names
        generators = [row_generator(self.seed, 0, number, _ADAPTER) for number in self.numbers]
        self.requires_grad_(requires_grad=False)
        for name in found:
            inner = name.removeprefix(f"{self.prefix}.")
            base = classifier.get_submodule(name).get_base_layer()
            if inner == name or not _is_linear(base):
                raise UserError(
                    f"lora.target_modules: {name} is no linear layer of the body, so it cannot carry experts"
                )
            layer = ExpertLinear(base, len(self.numbers), lora, self.routing)
            for slot, generator in enumerate(generators):
                layer.draw(slot, generator)
            self.transformer.set_submodule(inner, layer)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
