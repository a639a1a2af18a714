"""DMoERM: experts by category and capability point, trained in phases by one fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf.functional.preference import bradley_terry
from lit_rlhf.models.backbone import LoRA
from lit_rlhf.models.moe import Form, Inner, MoE
from lit_rlhf.models.moe_folders import fill_moe, read_description, write_moe
from lit_rlhf.models.moe_scorer import Routing
from lit_rlhf.models.router import Router, RouterModel
from lit_rlhf.modules.moe_measured import MeasuredMoE
from lit_rlhf.modules.moe_metrics import MoEMetrics
from lit_rlhf.modules.reward import graded
from lit_rlhf.modules.router import RouterMetrics, router_losses
from lit_rlhf.types import CategoryBatch, ExpertBatch, LossOutput, Prompt, UserError

Phases = Literal["router", "task", "capability", "mixture", "all"]
EXPERTS = ("task", "capability", "mixture")  # the phases that make scores, each on those before


class RewardMoEModule(MeasuredMoE):
    """Trains a DMoERM (Quan 2024, arXiv:2403.01197) on pairs with categories and point labels.

    router:      cross-entropy of the category, the user's turns alone
    task:        each category's adapter (or body) and head, on human labels of 60 % of the prompts
    capability:  each point's adapter and head, the rest frozen, on point labels of the same prompts
    mixture:     each category's MLP alone, on human labels of the other prompts, from states computed once

    loss = sum_i w_i -log sigmoid(chosen_i - rejected_i) / sum_i w_i, w_i = 1 / pairs of the prompt (at this point)

    The data module says which epochs belong to which phase and ends the run. At the end of each phase its result is
    written to `phases/NAME` in the run folder, from where a later run can `start`. Each phase has a fresh optimizer
    state, its own learning rate, and its own warm-up and schedule.

    Departures, beside those of `MoE`:
    1. The last weights of a phase go on to the next. The paper keeps the best of each phase by validation.
    2. Training rows without a listed category are left out, unless `router` is a folder. The paper routes them.

    Args:
        phase: train this one alone, its predecessors' result taken from `start`; "all" trains every phase in turn.
        start: folder to start from: `phases/NAME` of a run, or an export.
        form: "shared" (one frozen body, an adapter a category) or "backbones" (the paper's body a category).
        inner: "mixture"; "mean" of the points in place of the MLP; "none" for phase 1's score alone.
        routing: "router", "soft" (top two) or "oracle"; of validation and tests where the score reached is that of
            `inner`, and of `score` once there is a trained router.
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
        super().__init__(inner=inner, routing=routing, l2=l2, phase=phase, lrs=lrs, **base)
        self.options = replace(self.options, lora=self.options.lora or LoRA())
        own = {"phase": phase, "start": start, "form": form, "inner": inner, "routing": routing, "router": router}
        self.start, self.form, self.router_path, self.points = start, form, router, points
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
        """Check too that the phases train what `inner` scores with, and that each has what it stands on.

        Raises:
            UserError: a phase before is neither done nor skipped, or nothing brings soft routing's scores to one scale.
        """
        if self.router_path is not None or len(data.categories) == 1:
            data.epochs["router"] = 0
        self._check_before(data)
        if self.routing == "soft" and len(data.categories) > 1 and not self._validates(data):
            raise UserError("routing 'soft' adds up scores of two categories, whose scale a validation must measure;"
                            " expected validation rows, or routing: router")  # fmt: skip
        super().plan_phases(data)
        trained = [phase for phase in EXPERTS if data.epochs[phase]]
        stale = set().union(*map(self.superseded, trained))
        needed = {"none": "task", "mean": "capability", "mixture": "mixture"}[self.inner]
        if self.phase == "all" and needed not in {*trained, *self._started()["phases"]} - (stale - set(trained)):
            raise UserError(f"inner {self.inner!r} needs phase {needed!r}, which has 0 epochs and no `start`")

    def _check_before(self, data: Any) -> None:
        """Refuse to train one phase alone on what nobody trained."""
        before = EXPERTS[: EXPERTS.index(self.phase)] if self.phase in EXPERTS else ()
        done = self._started()["phases"]
        missing = [phase for phase in before if data.epochs[phase] and phase not in done]
        if missing:
            raise UserError(
                f"phase {self.phase!r} stands on phase {missing[-1]!r}, and {self._from()} has not done it; expected"
                f" model.start to name a folder that has, or data.epochs.{missing[-1]} to be 0"
            )

    def _from(self) -> str:
        return "a run without `start`" if self.start is None else repr(self.start)

    def _validates(self, data: Any) -> bool:
        return bool(data.has_validation and self.trainer.limit_val_batches)

    def superseded(self, phase: str) -> set[str]:
        """Return this phase and those that stand on it; no experts stand on the router."""
        return {phase} if phase == "router" else super().superseded(phase)

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
            router = RouterModel(path, None).requires_grad_(requires_grad=self.router_path is None)
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
        if self.router_path is None:
            return None
        return Router(self.router_path, max_length=self.trainer.datamodule.encoder.max_length).route  # type: ignore[attr-defined]

    # training

    def training_step(self, batch: CategoryBatch | ExpertBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the step's weighted mean."""
        if isinstance(batch, CategoryBatch):
            assert self.router is not None
            logits, loss = router_losses(self.router, batch)
            self.log_means({"moe/router_accuracy": (logits.argmax(-1) == batch.label).float()}, loss)
            return loss.sum() / batch.share.examples
        output = self.losses(batch)
        self.log_means(output.metrics, output.loss)
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
        right = graded(output.metrics["reward/accuracy"], batch.label)
        margin = {f"{batch.phase}/reward/margin": (chosen - rejected).detach()}
        return LossOutput(output.loss, output.metrics | {"reward/accuracy": right} | margin)

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

    def on_fit_end(self) -> None:
        """Forget the states, which may take much memory."""
        self._states, self._held_out_states = {}, {}

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

    # what is kept

    def _frozen(self) -> set[str]:
        """Return what no phase trains, so that every checkpoint holds the results of all phases."""
        names = {f"moe.{name}" for name in self.moe.frozen()} if self.moe is not None else set()
        router = self.router_path is not None and self.router is not None
        return names | ({f"router.{n}" for n, _ in self.router.named_parameters()} if router and self.router else set())

    def export(self, folder: str, *, merge: bool = False) -> None:
        """Write the documented folder of `models.moe_folders`, which `MoERewardModel` reads; called on all ranks."""
        assert self.moe is not None
        if len(self.moe.categories) > 1 and {*EXPERTS} & {*self.done} and not self.moe.scaled(self.trained_inner):
            rank_zero_warn(
                f"{folder}: no validation measured the scores of every category, so they are on scales of their own;"
                " compare responses of one category only"
            )
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
