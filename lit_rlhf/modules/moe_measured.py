"""What is measured of a DMoERM on held-out pairs, and how it scores, whichever phase it has reached."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.functional.preference import bradley_terry
from lit_rlhf.models.backbone import evaluating
from lit_rlhf.models.moe import INNERS, Inner, MoE
from lit_rlhf.models.moe_scorer import MoEScores, Routing, encoded_rows, gate_of, named_parts, score_rows
from lit_rlhf.models.router import RouterModel, routing_probabilities
from lit_rlhf.modules.moe_metrics import MoEMetrics
from lit_rlhf.modules.moe_routing import Gated, gated, mixed_states, own_gate
from lit_rlhf.modules.phased import PhasedModule
from lit_rlhf.modules.reward import graded
from lit_rlhf.modules.router import RouterMetrics, router_losses
from lit_rlhf.types import CategoryBatch, ExpertBatch, Prompt, Scores


class MeasuredMoE(PhasedModule):
    """A DMoERM that is validated, tested and asked for scores.

    Args:
        inner: see `RewardMoEModule`, as for all other arguments.
        routing: see there.
        l2: see there.
        phased: arguments of `PhasedModule`.
    """

    def __init__(self, *, inner: Inner, routing: Routing, l2: float, **phased: Any) -> None:
        super().__init__(**phased)
        self.inner, self.routing, self.l2 = inner, routing, l2
        self.points: dict[str, list[str]] | None = None
        self.router_path: str | None = None
        self.moe: MoE | None = None
        self.router: RouterModel | None = None
        self.metrics: MoEMetrics
        self.router_metrics: RouterMetrics
        self._states: dict[int, Tensor] = {}  # training pair to its points' states, [2, K, H]
        self._held_out_states: dict[int, Tensor] = {}
        self._routed: list[tuple[Gated, Tensor]] = []  # routed held-out pairs and their labels

    def on_validation_epoch_start(self) -> None:
        """Forget what the last validation collected."""
        self.metrics.reset()
        self._routed = []

    def validation_step(self, batch: CategoryBatch | ExpertBatch, batch_idx: int) -> dict[str, Any] | None:
        """Collect what the phase has reached: the router's confusions, or accuracies by category and point.

        Returns:
            `scores`: a function that gives those of the 2B rows, chosen first, on the scale that the whole validation
            finds, as `routing` says where the score reached is that of `inner`, else by the row's own category; their
            parts `gate/CATEGORY` are the weights. `logits`: [B], of the probability that `chosen` is the better one.
        """
        assert self.moe is not None
        if isinstance(batch, CategoryBatch):
            assert self.router is not None
            logits, loss = router_losses(self.router, batch)
            self.router_metrics.update(logits, batch.label)
            self.log_validation({"loss": loss})
            return None
        inner = self._measured()
        raw, points = self._held_out_scores(batch, inner)
        chosen, rejected = raw.chunk(2)
        output = bradley_terry(chosen, rejected, l2=self.l2, label=batch.label)
        right = graded(output.metrics["reward/accuracy"], batch.label)
        self.log_validation({"loss": output.loss, **output.metrics, "reward/accuracy": right})
        self.metrics.update(batch, raw, points)
        found = self._gated(batch, raw, inner)
        return {"scores": partial(found.scores, self.moe, inner), "logits": found.logits()}

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start

    def _held_out_scores(self, batch: ExpertBatch, inner: Inner) -> tuple[Tensor, Tensor | None]:
        """Return raw scores [2B] and those of the points, by the rows' own categories."""
        assert self.moe is not None
        category = batch.category.repeat(2)
        if self.trainer.state.fn == "fit" and self.current_phase == "mixture":
            return self.moe.score_states(self._mixed_states(batch, self._held_out_states), category, inner)
        return self.moe.score(batch.sequences, category, inner)

    def _gated(self, batch: ExpertBatch, raw: Tensor, inner: Inner) -> Gated:
        """Return the scores as they are in use, and count how often the router agrees with the data."""
        assert self.moe is not None
        names = list(self.moe.categories)
        gate = own_gate(batch.category, len(names))
        if not self.router_trained:
            return gated(self.moe, batch, raw, gate, inner, self._anywhere)
        assert self.router is not None
        assert batch.questions is not None
        logits = self.router(batch.questions)
        self.router_metrics.update(logits, batch.category)
        routed = self.routing != "oracle" and inner == self.inner
        if routed:
            gate = gate_of(logits.softmax(-1).cpu(), [None] * len(logits), names, self.routing).to(gate)
        found = gated(self.moe, batch, raw, gate, inner, self._anywhere)
        if routed:
            self._routed.append((found, batch.label))
        return found

    def settle(self) -> None:
        """Keep mean and spread of the scores of all held-out responses by category, where this is a `fit`.

        Callbacks that need the scale call it: Lightning runs their epoch-end hooks before the module's. All processes
        take part.
        """
        assert self.moe is not None
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.metrics.keep_scale(self.moe, self._measured())

    def on_validation_epoch_end(self) -> None:
        """Keep the scale, and log what was collected."""
        assert self.moe is not None
        self.settle()
        stage = "test" if self.trainer.testing else "val"
        if self.router is not None:
            self.router_metrics.report(self, f"{stage}/moe/router_")
        self.log_dict({f"{stage}/{name}": value for name, value in self.metrics.compute().items()})
        if self._routed:
            right = [self._accuracy(found, label) for found, label in self._routed]
            self.log_validation({"reward/accuracy_routed": torch.cat(right)})

    on_test_epoch_end = on_validation_epoch_end

    def _accuracy(self, found: Gated, label: Tensor) -> Tensor:
        assert self.moe is not None
        chosen, rejected = found.scores(self.moe, self._measured()).total.chunk(2)
        return graded(bradley_terry(chosen, rejected).metrics["reward/accuracy"], label)

    def _measured(self) -> Inner:
        """Return which score is looked at: the phase's own during training, else the best that was trained."""
        if self.trainer.state.fn == "fit":
            return {"task": INNERS[0], "capability": INNERS[1]}.get(self.current_phase, self.inner)
        return self.trained_inner

    @property
    def router_trained(self) -> bool:
        """Whether there is a router that was trained, here or before."""
        return self.router is not None and ("router" in self.done or self.router_path is not None)

    @property
    def trained_inner(self) -> Inner:
        """`inner`, or what comes before it where its phase has not ended yet."""
        reached = {"mixture": 2, "capability": 1}
        level = max([reached.get(phase, 0) for phase in self.done], default=0)
        return INNERS[min(level, INNERS.index(self.inner))]

    def _mixed_states(self, batch: ExpertBatch, kept: dict[int, Tensor]) -> Tensor:
        """Return the states of the batch's rows, [2B, K, H]; without a phase 2, phase 3 trains the experts too."""
        assert self.moe is not None
        if "capability" not in self.done:
            return self.moe.states(batch.sequences, batch.category.repeat(2))
        return mixed_states(self.moe, batch, kept, self._anywhere)

    def _anywhere(self, needed: bool) -> bool:
        """Say whether any process needs a forward pass, in which all take part where parameters are sharded."""
        if self._device_mesh is None:
            return needed
        count = torch.tensor(float(needed), device=self.device)
        return bool(self.trainer.strategy.reduce(count, reduce_op="sum") > 0)

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], categories: Sequence[str | None] | None = None
    ) -> Scores:
        """Score responses, their parts by capability point."""
        found = self.details(prompts, responses, categories)
        return named_parts(found, {c: tuple(names) for c, names in (self.points or {}).items()})

    def details(
        self, prompts: Sequence[Prompt], responses: Sequence[str], categories: Sequence[str | None] | None = None
    ) -> MoEScores:
        """Score responses, with the gate and all points."""
        assert self.moe is not None
        encoder = self.text_encoder()
        rows = encoded_rows(encoder, prompts, responses)
        with evaluating(self):
            probabilities = None
            if self.router is not None and self.router_trained:
                probabilities = routing_probabilities(self.router, encoder, prompts)
            routing = "oracle" if probabilities is None else self.routing
            gate = gate_of(probabilities, categories or [None] * len(rows), list(self.points or ()), routing)
            return score_rows(self.moe, encoder, rows, gate, self.trained_inner)
