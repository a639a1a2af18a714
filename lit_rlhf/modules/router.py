"""A router from prompts with categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_rlhf.models.backbone import evaluating
from lit_rlhf.models.router import RouterModel, routing_probabilities
from lit_rlhf.modules.base import BaseModule
from lit_rlhf.types import CategoryBatch, Prompt, UserError


class RouterModule(BaseModule):
    """Trains a classifier of prompts by category.

    loss = -log softmax(logits)[category]    a prompt

    It reads the user's turns, all of them, and nothing else. The released code of 2403.01197 reads the last turn only
    and puts a softmax before the one in the loss.

    Args:
        categories: names in the order of the logits; None takes the data module's.
        base: arguments of `BaseModule`.
    """

    method = "router"

    def __init__(self, *, categories: list[str] | None = None, **base: Any) -> None:
        super().__init__(**base)
        self.categories = None if categories is None else tuple(categories)
        self.router: RouterModel | None = None
        self.metrics: RouterMetrics | None = None
        self.keep_hyper_parameters(categories=categories)

    def setup(self, stage: str) -> None:
        """Take the encoder of the data, and the categories where none were named.

        Raises:
            UserError: model and data name different categories.
        """
        super().setup(stage)
        found = getattr(getattr(self.trainer, "datamodule", None), "categories", None)
        if self.categories is None and found is not None:
            self.categories = tuple(found)
            self.hparams["categories"] = list(found)
        if found is not None and tuple(found) != self.categories:
            raise UserError(f"the router's categories are {self.categories}, and the data's are {tuple(found)}")

    def build_models(self) -> None:
        """Load the body and its head, and make the metrics."""
        self.router = RouterModel(self.model_name_or_path, self.categories, self.options)
        self.categories = self.router.categories
        self.metrics = RouterMetrics(self.categories)

    def backbones(self) -> list[RouterModel]:
        """Return the loaded model."""
        return [] if self.router is None else [self.router]

    def training_step(self, batch: CategoryBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the step's mean over prompts."""
        logits, loss = self.losses(batch)
        self.log_means({"router/accuracy": (logits.argmax(-1) == batch.label).float()}, loss)
        return loss.sum() / batch.share.examples

    def validation_step(self, batch: CategoryBatch, batch_idx: int) -> None:
        """Log the loss, and collect accuracy and confusions."""
        assert self.metrics is not None
        logits, loss = self.losses(batch)
        self.metrics.update(logits, batch.label)
        self.log_validation({"loss": loss})

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy over all ranks, and draw the confusions."""
        assert self.metrics is not None
        self.metrics.report(self, "test/router/" if self.trainer.testing else "val/router/")

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def losses(self, batch: CategoryBatch) -> tuple[Tensor, Tensor]:
        """Return the logits, [B, C], and the loss of each prompt, [B]."""
        assert self.router is not None
        return router_losses(self.router, batch)

    def probabilities(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return p(category | prompt), [B, C]."""
        assert self.router is not None
        with evaluating(self):
            return routing_probabilities(self.router, self.text_encoder(), prompts)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other categories too."""
        super().on_load_checkpoint(checkpoint)
        theirs = tuple(checkpoint["hyper_parameters"]["categories"] or ())
        if theirs != self.categories:
            raise UserError(f"the checkpoint's categories are {theirs}, and the data's are {self.categories}")

    def export(self, folder: str, *, merge: bool = False) -> None:
        """Write a sequence classifier that plain transformers loads, adapters always merged; called on all ranks."""
        assert self.router is not None
        self.router.export(folder, self.text_encoder().tokenizer)


def router_losses(router: RouterModel, batch: CategoryBatch) -> tuple[Tensor, Tensor]:
    """Return the logits, [B, C], and the cross-entropy of each prompt's category, [B], in nats."""
    logits = router(batch.sequences)
    return logits, cross_entropy(logits, batch.label, reduction="none")


class RouterMetrics(nn.Module):
    """Accuracy and confusions of a router over all ranks.

    Args:
        categories: names in the order of the logits.
    """

    def __init__(self, categories: Sequence[str]) -> None:
        super().__init__()
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        self.categories = tuple(categories)
        self.accuracy: Any = MulticlassAccuracy(len(categories), average="micro")
        self.confusions: Any = MulticlassConfusionMatrix(len(categories))
        self.seen = False

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add B prompts: logits [B, C] and true categories [B]."""
        self.accuracy.update(logits, label)
        self.confusions.update(logits, label)
        self.seen = True

    def report(self, module: BaseModule, prefix: str) -> None:
        """Log `prefix` accuracy and confusions, draw these for loggers that take figures, and start anew.

        `confusions/TRUE/ROUTED` counts prompts; in the figure the true category stands down and the routed one across.
        """
        if not self.seen:
            return
        module.log(f"{prefix}accuracy", self.accuracy.compute())
        counts = self.confusions.compute()  # on all ranks
        for true, row in zip(self.categories, counts.float(), strict=True):
            pairs = zip(self.categories, row, strict=True)
            module.log_dict({f"{prefix}confusions/{true}/{routed}": count for routed, count in pairs})
        experiment: Any = getattr(module.logger, "experiment", None)
        if module.trainer.is_global_zero and hasattr(experiment, "add_figure"):
            from matplotlib.figure import Figure

            side = 1 + len(self.categories)
            figure = Figure(figsize=(side, side), layout="constrained")
            self.confusions.plot(counts.cpu(), ax=figure.subplots(), labels=list(self.categories))
            experiment.add_figure(f"{prefix}confusions", figure, module.global_step)
        self.accuracy.reset()
        self.confusions.reset()
        self.seen = False
