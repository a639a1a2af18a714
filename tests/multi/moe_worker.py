"""Trains a small DMoERM through all phases on this process's share and writes what happened.

python moe_worker.py OUT STRATEGY MODEL      (STRATEGY: auto, ddp, fsdp)
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import HFExport
from lit_rlhf.data import PhaseData
from lit_rlhf.models.backbone import LoRA
from lit_rlhf.modules import RewardMoEModule
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.strategy import FSDP2

GLOBAL_BATCH = 8
EPOCHS = {"router": 1, "task": 1, "capability": 1, "mixture": 2}


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.values.append(trainer.callback_metrics["loss"].item())


def main(out, strategy, path):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    world = 1 if strategy == "auto" else 2
    # a large eps: where a gradient is rounding noise, Adam would blow its sign up to a full step
    optimizer = Optimizer(lr=1e-2, eps=1e-2)
    module = RewardMoEModule(model_name_or_path=path, lora=LoRA(r=2), optimizer=optimizer)
    data = PhaseData(path, batch_size=GLOBAL_BATCH // world, limit=40, epochs=EPOCHS)
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FSDP2() if strategy == "fsdp" else strategy,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(out, name=strategy, version=0),
        callbacks=[losses, HFExport()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    if trainer.is_global_zero:
        names = ("val/reward/accuracy", "val/loss", "val/moe/router_accuracy")
        found = {name: float(trainer.callback_metrics[name]) for name in names}
        Path(out, f"{strategy}.json").write_text(json.dumps({"losses": losses.values, "metrics": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
