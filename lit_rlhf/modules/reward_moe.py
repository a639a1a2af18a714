"""DMoERM: experts by category and capability point, trained in phases by one fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_rlhf.functional.preference import bradley_terry
from lit_rlhf.models.backbone import LoRA, evaluating
from lit_rlhf.models.moe import INNERS, Form, Inner, MoE, select
from lit_rlhf.models.moe_folders import fill_moe, read_description, write_moe
from lit_rlhf.models.moe_scorer import MoEScores, Routing, encoded_rows, gate_of, named_parts, score_rows
from lit_rlhf.models.router import Router, RouterModel, routing_probabilities
from lit_rlhf.modules.moe_metrics import MoEMetrics
from lit_rlhf.modules.phased import PhasedModule
from lit_rlhf.modules.router import RouterMetrics
from lit_rlhf.types import CategoryBatch, ExpertBatch, LossOutput, Prompt, Scores, UserError

Phases = Literal["router", "task", "capability", "mixture", "all"]


class RewardMoEModule(PhasedModule):
    """Trains a DMoERM (Quan 2024, arXiv:2403.01197) on pairs with categories and point labels.

    router:      cross-entropy of the category, the user's turns alone
    task:        each category's adapter (or body) and head, on human labels of 60 % of the prompts
    capability:  each point's adapter and head, the rest frozen, on point labels of the same prompts
    mixture:     each category's MLP alone, on human labels of the other prompts, from states computed once

    loss = sum_i w_i -log sigmoid(chosen_i - rejected_i) / sum_i w_i, w_i = 1 / pairs of the prompt (at this point)

    The data module says which epochs belong to which phase and ends the run. At the end of each phase its result is
    written to `phases/NAME` in the run folder, from where a later run can `start`. Each phase has a fresh optimizer
    state, its own learning rate, and its own warm-up and schedule.

    Args:
        phase: train this one alone, its predecessors' result taken from `start`; "all" trains every phase in turn.
        start: folder to start from: `phases/NAME` of a run, or an export.
        form: "shared" (one frozen body, an adapter a category) or "backbones" (the paper's body a category).
        inner: "mixture"; "mean" of the points in place of the MLP; "none" for phase 1's score alone.
        routing: of validation, tests and `score` once the mixture trains: "router", "soft" (top two) or "oracle".
        router: folder of a trained router, in place of training one; it also routes training rows without a category.
        lrs: phase to learning rate; `optimizer.lr` for the others.
        l2: weight of the squared scores; 0.001 in 2310.02743.
        points: category to capability points in order; None takes the data module's.
        base: arguments of `BaseModule`; `lora` describes all adapters.
    """

    method = "reward_moe"

    def __init__(  # noqa: PLR0913  # flat keys on the command line
        self,
        *,
        phase: Phases = "all",
        start: str | None = None,
        form: Form = "shared",
        inner: Inner = "mixture",
        routing: Routing = "router",
        router: str | None = None,
        lrs: dict[str, float] | None = None,
        l2: float = 0.0,
        points: dict[str, list[str]] | None = None,
        **base: Any,
    ) -> None:
        super().__init__(phase=phase, lrs=lrs, **base)
        self.options = replace(self.options, lora=self.options.lora or LoRA())
        own = {"phase": phase, "start": start, "form": form, "inner": inner, "routing": routing, "router": router}
        self.start, self.form, self.inner, self.routing = start, form, inner, routing
        self.router_path, self.l2, self.points = router, l2, points
        self.moe: MoE | None = None
        self.router: RouterModel | None = None
        self._states: dict[int, Tensor] = {}  # training pair to its points' states, [2, K, H]
        self._held_out_states: dict[int, Tensor] = {}
        self.keep_hyper_parameters(**own, lrs=self.lrs, l2=l2, points=points)

    # building

    def setup(self, stage: str) -> None:
        """Take encoder, categories and points of the data, and let its phases rule the epochs."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        found = {category: list(names) for category, names in data.points.items()}
        if self.points is not None and list(self.points.items()) != list(found.items()):
            raise UserError(f"the model's points are {self.points}, and the data's are {found}")
        self.points = self.hparams["points"] = found
        if stage == "fit":
            self.plan_phases(data)

    def plan_phases(self, data: Any) -> None:
        """Check too that the phases train what `inner` scores with."""
        if self.router_path is not None or len(data.categories) == 1:
            data.epochs["router"] = 0
        super().plan_phases(data)
        needed = {"none": "task", "mean": "capability", "mixture": "mixture"}[self.inner]
        if self.phase == "all" and not data.epochs[needed] and needed not in self._started()["phases"]:
            raise UserError(f"inner {self.inner!r} needs phase {needed!r}, which has 0 epochs and no `start`")

    def _started(self) -> dict[str, Any]:
        """Return what the folder to start from says of itself; a checkpoint that is loaded needs none any more."""
        nothing: dict[str, Any] = {"phases": [], "router": None}
        return nothing if self.start is None or self._trainer is None else read_description(self.start)

    def build_models(self) -> None:
        """Load the bodies, put experts on them, and take over what earlier phases left."""
        assert self.points is not None
        if self.inner != "none" and not all(self.points.values()):
            empty = next(category for category, names in self.points.items() if not names)
            raise UserError(f"category {empty!r} has no capability points (`aspects`); expected some, or inner: none")
        self.moe = MoE(self.model_name_or_path, self.points, self.options, form=self.form)
        self.metrics = MoEMetrics(self.points)
        if len(self.points) > 1:
            self.router = self._build_router(list(self.points))
            self.router_metrics = RouterMetrics(list(self.points))
        if self.start is not None and self._trainer is not None:
            self.done = fill_moe(self.moe, self.start)

    def _build_router(self, categories: list[str]) -> RouterModel | None:
        started = self._started()["router"]
        path = self.router_path or (str(Path(self.start or "") / started) if started else None)
        if path is not None:
            router = RouterModel(path, None).requires_grad_(requires_grad=False)
            if list(router.categories) != categories:
                raise UserError(f"router {path!r} knows {list(router.categories)}, and the data has {categories}")
            return router
        return RouterModel(self.model_name_or_path, categories, replace(self.options, lora=None))

    def backbones(self) -> list[Any]:
        """Return the loaded models."""
        return [model for model in (self.moe, self.router) if model is not None]

    @property
    def route(self) -> Callable[[Sequence[Prompt]], list[str]] | None:
        """What gives training rows without a listed category one; None without a trained router."""
        return None if self.router_path is None else Router(self.router_path).route

    # training

    def training_step(self, batch: CategoryBatch | ExpertBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the step's weighted mean."""
        if isinstance(batch, CategoryBatch):
            logits, loss = self._router_losses(batch)
            self.log_means({"moe/router_accuracy": (logits.argmax(-1) == batch.label).float()}, loss)
            return loss.sum() / batch.share.examples
        output = self.losses(batch)
        self.log_means(output.metrics, output.loss)
        usage = torch.bincount(batch.category, minlength=len(self.points or ())) / len(batch.category)
        self.log_dict({f"moe/usage/{name}": usage[c] for c, name in enumerate(self.points or ())}, batch_size=1)
        return (batch.weight * output.loss).sum() / batch.divisor

    def losses(self, batch: ExpertBatch) -> LossOutput:
        """Return the loss of each pair, [B], unweighted, by the experts of the batch's phase."""
        assert self.moe is not None
        category = batch.category.repeat(2)
        if batch.phase == "task":
            scores = self.moe.task(batch.sequences, category)
        elif batch.phase == "capability":
            scores = self.moe.point(batch.sequences, category, batch.point.repeat(2))
        else:
            scores = self.moe.mixture(self._mixed_states(batch, self._states), category)
        chosen, rejected = scores.chunk(2)
        output = bradley_terry(chosen, rejected, l2=self.l2, label=batch.label)
        margin = ("reward/margin", chosen - rejected)
        return LossOutput(output.loss, output.metrics | {f"{batch.phase}/{margin[0]}": margin[1].detach()})

    def _mixed_states(self, batch: ExpertBatch, kept: dict[int, Tensor]) -> Tensor:
        """Return the states of the batch's rows, [2B, K, H]: once a process and without dropout, if experts are frozen.

        Without a phase 2, phase 3 trains the experts too, and the states are computed anew.
        """
        assert self.moe is not None
        category = batch.category.repeat(2)
        if "capability" not in self.done:
            return self.moe.states(batch.sequences, category)
        numbers = batch.index.tolist()
        if self._anywhere(any(number not in kept for number in numbers)):
            with torch.no_grad(), evaluating(self.moe):
                found = self.moe.states(batch.sequences, category)
            kept.update(zip(numbers, torch.stack(found.chunk(2), 1).cpu(), strict=True))
        return torch.stack([kept[number] for number in numbers], 1).flatten(0, 1).to(category.device)

    def _anywhere(self, needed: bool) -> bool:
        """Say whether any process needs a forward pass, in which all take part where parameters are sharded."""
        if self._device_mesh is None:
            return needed
        count = torch.tensor(float(needed), device=self.device)
        return bool(self.trainer.strategy.reduce(count, reduce_op="sum") > 0)

    def _router_losses(self, batch: CategoryBatch) -> tuple[Tensor, Tensor]:
        assert self.router is not None
        logits = self.router(batch.sequences)
        return logits, cross_entropy(logits, batch.label, reduction="none")

    # phases

    def enter_phase(self, phase: str) -> None:
        """Let the paper's bodies learn in phase 1 alone."""
        assert self.moe is not None
        self.moe.train_bodies(trained=phase == "task")

    def begin_phase(self, phase: str) -> None:
        """Copy the categories' heads to their points as phase 2 begins."""
        self._states, self._held_out_states = {}, {}
        if phase == "capability":
            assert self.moe is not None
            self.moe.copy_heads()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the experts of the other phases where they are."""
        assert self.moe is not None
        if self.current_phase != "router":
            self.moe.keep_experts(categories=self.current_phase != "task")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the stacked experts, whose resting slots no decay may touch, and everything else that learns."""
        assert self.moe is not None
        stacked = self.moe.experts()
        known = {id(parameter) for parameter in stacked}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return [{"params": stacked, "weight_decay": 0.0}, {"params": rest}]

    # evaluation

    def on_validation_epoch_start(self) -> None:
        """Forget what the last validation collected."""
        self.metrics.reset()

    def validation_step(self, batch: CategoryBatch | ExpertBatch, batch_idx: int) -> dict[str, Any] | None:
        """Collect what the phase has reached: the router's confusions, or accuracies by category and point.

        Returns the scores of the 2B rows by the experts of their own category, chosen first, for who observes.
        """
        assert self.moe is not None
        if isinstance(batch, CategoryBatch):
            logits, loss = self._router_losses(batch)
            self.router_metrics.update(logits, batch.label)
            self.log_validation({"loss": loss})
            return None
        inner, category = self._measured(), batch.category.repeat(2)
        raw: Tensor
        points: Tensor | None
        if self.trainer.state.fn == "fit" and self.current_phase == "mixture":
            states = self._mixed_states(batch, self._held_out_states)
            raw, points = self.moe.score_states(states, category, inner)
        else:
            raw, points = self.moe.score(batch.sequences, category, inner)
        chosen, rejected = raw.chunk(2)
        output = bradley_terry(chosen, rejected, l2=self.l2, label=batch.label)
        self.log_validation({"loss": output.loss, **output.metrics})
        self.metrics.update(batch, raw, points)
        if self.router_trained:
            self._validate_routing(batch, raw, inner)
        return {"scores": Scores(self.moe.standardised(raw, category, inner))}

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start

    def _validate_routing(self, batch: ExpertBatch, raw: Tensor, inner: Inner) -> None:
        """Log how often the router agrees with the data, and the accuracy behind it."""
        assert self.moe is not None
        assert self.router is not None
        assert batch.questions is not None
        logits = self.router(batch.questions)
        self.router_metrics.update(logits, batch.category)
        if self.routing != "oracle" and inner == self.inner:
            names = list(self.points or ())
            gate = gate_of(logits.softmax(-1).cpu(), [None] * len(logits), names, self.routing).to(logits.device)
            total = self._gated(batch, raw, gate.repeat(2, 1), inner)
            chosen, rejected = total.chunk(2)
            right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
            self.log_validation({"reward/accuracy_routed": right})

    def _gated(self, batch: ExpertBatch, raw: Tensor, gate: Tensor, inner: Inner) -> Tensor:
        """Mix the scores that the gate [2B, C] asks for; `raw` [2B] are those of the rows' own categories."""
        assert self.moe is not None
        rows, category = gate.nonzero(as_tuple=True)
        found = raw[rows]
        other = (category != batch.category.repeat(2)[rows]).nonzero()[:, 0]
        if self._anywhere(len(other) > 0):
            other = other if len(other) else other.new_zeros(1)  # for the other processes' sake; the score stays
            found[other] = self.moe.score(select(batch.sequences, rows[other]), category[other], inner)[0]
        score = self.moe.standardised(found, category, inner) * gate[rows, category]
        return score.new_zeros(len(gate)).index_add(0, rows, score)

    def on_validation_epoch_end(self) -> None:
        """Log what was collected, and keep mean and spread of the scores of all held-out responses by category."""
        assert self.moe is not None
        stage = "test" if self.trainer.testing else "val"
        if self.router is not None:
            self.router_metrics.report(self, f"{stage}/moe/router_")
        found = self.metrics.compute()
        self.log_dict({f"{stage}/{name}": value for name, value in found.items()})
        if not self.trainer.testing:
            self.metrics.keep_scale(self.moe, self._measured())

    on_test_epoch_end = on_validation_epoch_end

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

    # use

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

    def _frozen(self) -> set[str]:
        """Return what no phase trains, so that every checkpoint holds the results of all phases."""
        names = {f"moe.{name}" for name in self.moe.frozen()} if self.moe is not None else set()
        router = self.router_path is not None and self.router is not None
        return names | ({f"router.{n}" for n, _ in self.router.named_parameters()} if router and self.router else set())

    def export(self, folder: str, *, merge: bool = False) -> None:
        """Write the documented folder of `models.moe_folders`, which `MoERewardModel` reads; called on all ranks."""
        assert self.moe is not None
        encoder = self.text_encoder()
        settings = {"joiner": encoder.joiner, "max_length": encoder.max_length, "stop_ids": list(encoder.stop_ids)}
        write_moe(
            self.moe,
            folder,
            encoder.tokenizer,
            inner=self.trained_inner,
            phases=self.done,
            router=self.router if self.router_trained else None,
            settings=settings,
        )
