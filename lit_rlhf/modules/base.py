"""What all modules share: plain hyper-parameters, the optimizer, slim checkpoints, sharding, and honest logging."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor, nn

from lit_rlhf.encoding import Encoder
from lit_rlhf.models.backbone import LoRA, ModelOptions
from lit_rlhf.modules.optimizer import Optimizer, planned_steps
from lit_rlhf.specs import build, build_optional, plain
from lit_rlhf.types import UserError

MODULE_KEY = "lit_rlhf_module"


class BaseModule(LightningModule):
    """A LightningModule around pretrained backbones.

    Args:
        model_name_or_path: local folder, hub id, or a `builtin:` name.
        optimizer: optimizer and schedule.
        dtype: dtype that the weights are loaded in.
        attn_implementation: passed to transformers; None lets it choose.
        activation_checkpointing: recompute activations in the backward pass instead of keeping them.
        trust_remote_code: run code that comes with the model; off unless you know the model.
        lora: train low-rank adapters instead of all weights; None trains all.
    """

    method: str
    member_numbers: tuple[int, ...] | None = None  # of an ensemble, whose members each take a stream of the data

    def __init__(
        self,
        model_name_or_path: str = "builtin:policy",
        optimizer: Optimizer | None = None,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str | None = None,
        activation_checkpointing: bool = False,
        trust_remote_code: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # frozen weights are not in checkpoints; `on_load_checkpoint` checks the rest
        self.model_name_or_path = model_name_or_path
        self.optimizer_options = build_optional(optimizer, Optimizer) or Optimizer()
        self.options = ModelOptions(
            dtype=dtype,
            attn_implementation=attn_implementation,
            activation_checkpointing=activation_checkpointing,
            trust_remote_code=trust_remote_code,
            lora=None if lora is None else build(lora, LoRA),
        )
        self.encoder: Encoder | None = None
        self.joiner = " "

    def keep_hyper_parameters(self, **own: Any) -> None:
        """Keep every argument as plain types under the names of the constructor, for checkpoints and loggers."""
        shared = {
            "model_name_or_path": self.model_name_or_path,
            "optimizer": self.optimizer_options,
            **{name: getattr(self.options, name) for name in self.options.__dataclass_fields__},
        }
        self.save_hyperparameters({name: plain(value) for name, value in (shared | own).items()})

    @abstractmethod
    def build_models(self) -> None:
        """Load the backbones; called once, before sharding."""

    @abstractmethod
    def backbones(self) -> list[Any]:
        """Return every backbone that wants sharding, trained or frozen."""

    def configure_model(self) -> None:
        """Load and, under a model-parallel strategy, shard; Lightning calls this in every stage."""
        if self.backbones():
            return
        self.build_models()
        if self._device_mesh is not None:
            for backbone in self.backbones():
                backbone.shard(self._device_mesh["data_parallel"], self._shard_precision())

    def _shard_precision(self) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self.trainer.precision == "bf16-mixed":
            return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return MixedPrecisionPolicy()

    def setup(self, stage: str) -> None:
        """Take the encoder of the data, so that training, sampling and scoring make ids in one way."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            return
        self.encoder = datamodule.encoder
        streams = datamodule.stream_numbers
        if stage == "fit" and streams != self.member_numbers and (self.member_numbers or len(streams) > 1):
            raise UserError(
                f"data.streams is {list(streams)} and model.members {list(self.member_numbers or [0])}: expected equal"
                " values, one order of the rows for each member"
            )
        if datamodule.tokenizer != self.model_name_or_path:
            own = Encoder.from_pretrained(
                self.model_name_or_path, trust_remote_code=self.options.trust_remote_code
            ).tokenizer
            if own.get_vocab() != datamodule.encoder.tokenizer.get_vocab():
                raise UserError(
                    f"the data are tokenised for {datamodule.tokenizer!r}, and {self.model_name_or_path!r} has another "
                    "vocabulary; give the data module tokenizer=the model's path"
                )

    @abstractmethod
    def export(self, folder: str, *, merge: bool = False) -> None:
        """Write a folder that plain transformers, or peft for adapters, loads; called on all ranks."""

    def text_encoder(self) -> Encoder:
        """Return the encoder of the data module, or the model's own where there is none."""
        if self.encoder is None:
            self.encoder = Encoder.from_pretrained(
                self.model_name_or_path, joiner=self.joiner, trust_remote_code=self.options.trust_remote_code
            )
        return self.encoder

    def configure_optimizers(self) -> Any:
        """Return the optimizer over the trainable parameters and its schedule, one tick an optimizer step."""
        optimizer = self.optimizer_options.build(p for p in self.parameters() if p.requires_grad)
        schedule = self.optimizer_options.schedule_for(optimizer, planned_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def log_means(self, metrics: Mapping[str, Tensor], loss: Tensor) -> None:
        """Log means over the examples of all ranks in one collective, and stop on a loss that is not finite.

        Args:
            metrics: name to [B], this rank's examples.
            loss: [B] or [tokens], what is minimised, logged as the mean.
        """
        columns = {"loss": loss.detach(), **metrics}
        wide = torch.float32 if loss.device.type == "mps" else torch.float64
        sums = [column.to(wide).sum() for column in columns.values()]
        counts = [sums[0].new_tensor(column.numel()) for column in columns.values()]
        table = torch.stack([torch.stack(sums), torch.stack(counts)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(table)
        means = dict(zip(columns, (table[0] / table[1]).tolist(), strict=True))
        if not torch.isfinite(table).all():
            bad = ", ".join(f"{name} = {value}" for name, value in means.items() if not abs(value) < float("inf"))
            raise UserError(
                f"step {self.trainer.global_step}: not finite: {bad}. Nothing was updated with it; "
                "lower optimizer.lr, raise warmup_ratio or use a wider dtype"
            )
        self.log("loss", means.pop("loss"), prog_bar=True, batch_size=1)
        self.log_dict(means, batch_size=1)

    def log_validation(self, metrics: Mapping[str, Tensor]) -> None:
        """Log means over all validation examples of all ranks under `val/`, over test examples under `test/`."""
        stage = "test" if self.trainer.testing else "val"
        for name, values in metrics.items():
            mean = values.float().sum() / max(values.numel(), 1)  # a batch may hold none that counts
            self.log(f"{stage}/{name}", mean, batch_size=values.numel(), sync_dist=True, on_step=False, on_epoch=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out: they are the model's at `model_name_or_path`."""
        checkpoint[MODULE_KEY] = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint["joiner"] = self.text_encoder().joiner
        for name in self._frozen():
            checkpoint["state_dict"].pop(name, None)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint's weights; the frozen ones that it leaves out stay as they are."""
        own = self.state_dict()
        frozen = {name: own[name] for name in self._frozen() if name not in state_dict}
        return super().load_state_dict(frozen | dict(state_dict), *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another module or of other shapes.

        Raises:
            UserError: naming what the checkpoint holds and what was expected.
        """
        own = f"{type(self).__module__}.{type(self).__qualname__}"
        if checkpoint.get(MODULE_KEY) != own:
            raise UserError(f"the checkpoint was made by {checkpoint.get(MODULE_KEY, 'another program')}, not by {own}")
        self.joiner = checkpoint["joiner"]
        if "state_dict" in checkpoint:
            self._check_weights(checkpoint["state_dict"])

    def _check_weights(self, state: dict[str, Tensor]) -> None:
        mine = {k: v.shape for k, v in self.state_dict().items() if k not in self._frozen()}
        theirs = {k: v.shape for k, v in state.items()}
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"the checkpoint does not fit the model {self.model_name_or_path!r}: {name} has shape "
                    f"{_shape(theirs.get(name))} in the checkpoint and {_shape(mine.get(name))} in the model"
                )

    def _frozen(self) -> set[str]:
        return {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}


def freeze(module: nn.Module) -> None:
    """Put a module in eval mode and stop its gradients."""
    module.eval().requires_grad_(requires_grad=False)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))
