"""Trains every module a few steps on this process's share and writes what happened; run alone or by torchrun.

python worker.py OUT STRATEGY MODEL      (STRATEGY: auto, ddp, fsdp)
"""

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import GoldProbe, HFExport, RewardDiagnostics
from lit_rlhf.data import PreferenceData, SFTData
from lit_rlhf.functional.preference import DPO
from lit_rlhf.models.backbone import LoRA
from lit_rlhf.modules import PreferenceModule, RewardEnsembleModule, RewardModule, SFTModule
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.strategy import FSDP2
from lit_rlhf.types import Sampling

GLOBAL_BATCH, STEPS = 8, 4


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.values.append(trainer.callback_metrics["loss"].item())


def modules(path):
    # a large eps: where a gradient is rounding noise, Adam would blow its sign up to a full step
    optimizer = Optimizer(lr=1e-3, eps=1e-4)
    for suffix, lora in (("full", None), ("lora", LoRA(r=4, alpha=8))):
        shared = {"model_name_or_path": path, "optimizer": optimizer, "lora": lora}
        yield f"sft-{suffix}", SFTModule(**shared), SFTData
        yield f"reward-{suffix}", RewardModule(**shared), PreferenceData
        members = RewardEnsembleModule(members=4, mode=suffix, seed=0, **shared)
        yield f"reward_ensemble-{suffix}", members, partial(PreferenceData, streams=4)
        yield f"preference-{suffix}", PreferenceModule(loss=DPO(beta=0.1), **shared), PreferenceData


def trainer_for(strategy, out, name, callbacks):
    world = 1 if strategy == "auto" else 2
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FSDP2() if strategy == "fsdp" else strategy,
        max_steps=STEPS,
        limit_val_batches=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(str(out), name=name, version=strategy),
        callbacks=callbacks,
    )


def run(strategy, out, name, module, data_class):
    world = 1 if strategy == "auto" else 2
    seed_everything(0, verbose=False)
    losses = Losses()
    callbacks = [losses, HFExport()]
    watch = {"n_prompts": 5, "sampling": Sampling(max_new_tokens=12), "batch_size": 2}
    reward = isinstance(module, RewardModule)
    callbacks.append(RewardDiagnostics("builtin:policy", **watch) if reward else GoldProbe(every_n_steps=2, **watch))
    data = data_class(tokenizer=module.model_name_or_path, batch_size=GLOBAL_BATCH // world, limit=64, seed=0)
    trainer = trainer_for(strategy, out, name, callbacks)
    trainer.fit(module, data)
    trainer.save_checkpoint(out / f"{name}-{strategy}.ckpt")
    trained = [p for p in module.parameters() if p.requires_grad]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
    folder = out / name / strategy
    return {
        "losses": losses.values,
        "validation": {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        "parameters": sum(p.numel() for p in trained),
        "local": sum(p.numel() for p in local),
        "rank": trainer.global_rank,
        "probe": lines(folder / "probe.jsonl"),
        "diagnostics": lines(folder / "reward.jsonl"),
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(out, strategy, path):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = {name: run(strategy, out, name, module, data) for name, module, data in modules(path)}
    rank = next(iter(results.values()))["rank"]
    (out / f"{strategy}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
