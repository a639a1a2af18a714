"""Trains PPO a few updates on this process's share and writes what happened; run alone or by torchrun.

python -m tests.modules.ppo_worker OUT STRATEGY MODEL CASES [KILL]     (STRATEGY: auto, ddp, fsdp; CASES with commas)
python -m tests.modules.ppo_worker OUT resume MODEL CASE:KILL,...

With KILL a SIGKILL comes after so many updates; called again, the run goes on. The second form trains every case in a
process of its own, through into OUT/whole, and into OUT/parts with a SIGKILL and again from the last checkpoint.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import GoldProbe, HFExport
from lit_rlhf.functional.aggregation import WorstCase
from lit_rlhf.functional.constrained import AtLeast, AtMost, Equal
from lit_rlhf.functional.control import PID, AdaptiveKL, FixedKL
from lit_rlhf.models.backbone import LoRA
from lit_rlhf.models.scorers import Ensemble
from lit_rlhf.modules.multipliers import Dual
from lit_rlhf.modules.objective import NegativeKL, Satisficing
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.modules.ppo import PPOModule
from lit_rlhf.modules.ppo_options import CriticOptions, PPOOptions
from lit_rlhf.strategy import FSDP2
from lit_rlhf.types import Sampling
from tests.modules.ppo_parts import Letters, prompts

BATCH, UPDATES, STEPS = 14, 4, 4  # rows on all processes; updates; optimizer steps an update

XI = {"objective": NegativeKL(), "constraints": [Equal("a", 0.5), Equal("e", 0.3)], "kl": FixedKL(0.2)}
CASES = {
    "plain": {"kl": AdaptiveKL(0.1, 0.2)},
    "xi": XI,
    "xi-lora": XI | {"lora": LoRA(r=4, alpha=8), "critic": CriticOptions("lora", lr=2e-3)},
    "all-model": {"constraints": [AtMost("a", 0.1), AtMost("kl", 0.2)], "critic": CriticOptions("model")},
    "minibatch": {"constraints": [AtLeast("e", 0.3)], "dual": Dual(every="minibatch", per="token")},
    "cost": {"constraints": [AtMost("e", 0.0)], "dual": Dual(form="reward_minus_cost"), "kl": FixedKL(0.05)},
    "mu-sat": {"objective": Satisficing({"a": 0.5}), "constraints": [AtLeast("e", 0.3)], "clip_scores": 1.0},
    "worst": {"rewards": {"both": Ensemble([Letters("a"), Letters("e")], aggregator=WorstCase())}},
    "tuned": {
        "constraints": [AtLeast("e", 0.3)],
        "dual": Dual(control=PID(kp=1.0, ki=0.3), average_iterates=True),
        "ppo": {"entropy_coefficient": 0.05, "stop_at_kl": 2e-5},
    },
    "long": {"sampling": Sampling(max_new_tokens=60, temperature=5.0)},  # so hot that rows end early or late
}


class Watch(Callback):
    """Keeps what was logged, the first rollout's advantages, and perhaps kills the run."""

    def __init__(self, kill=None):
        self.kill, self.logged, self.kept, self.sizes = kill, [], {}, []

    def on_fit_start(self, trainer, pl_module):
        inner = pl_module.update_policy

        def update(experience, *rest):
            self.sizes.append((len(experience.index), int(experience.mask.sum(-1).max())))
            if pl_module.updates == 0:
                rows = zip(experience.index.tolist(), experience.advantages, experience.mask, strict=True)
                self.kept = {index: row[mask].tolist() for index, row, mask in rows}
            return inner(experience, *rest)

        pl_module.update_policy = update

    def on_train_batch_start(self, trainer, pl_module, *args):
        if self.kill is not None and pl_module.updates == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def run(out, strategy, model, case, kill=None):
    world = 1 if strategy == "auto" else 2
    seed_everything(0, verbose=False)
    steps = {"epochs": 2, "minibatches": 2, "micro_batch_size": 3, "rollout_batch_size": 4, "scale_samples": 15}
    options = {
        "rewards": {"a": Letters("a"), "e": Letters("e")},
        "sampling": Sampling(max_new_tokens=8),
        # a large eps: where a gradient is rounding noise, Adam would blow its sign up to a full step
        "optimizer": Optimizer(lr=1e-3, eps=1e-4, warmup_ratio=0.25, schedule="linear"),
    }
    options |= CASES[case]
    ppo = PPOOptions(**(steps | options.pop("ppo", {})))
    module = PPOModule(model_name_or_path=model, ppo=ppo, **options)
    watch = Watch(kill)
    saver = ModelCheckpoint(dirpath=out / f"{case}-{strategy}", save_last=True, every_n_train_steps=STEPS)
    probe = GoldProbe(every_n_steps=8, n_prompts=5, sampling=Sampling(max_new_tokens=8), batch_size=2)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FSDP2() if strategy == "fsdp" else strategy,
        max_steps=UPDATES * STEPS,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=TensorBoardLogger(str(out), name=case, version=strategy),
        callbacks=[probe, saver, watch, HFExport()],
    )
    last = out / f"{case}-{strategy}" / "last.ckpt"
    data = prompts(model, out, batch_size=BATCH // world, count=25)  # the last step of an epoch has 11 rows
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    return trainer, module, watch


def result(trainer, module, watch):
    state = trainer.strategy.lightning_module_state_dict()
    return {
        "logged": watch.logged,
        "sizes": watch.sizes,
        "advantages": watch.kept,
        "multipliers": module.multipliers.report(),
        "coefficient": module.progress.kl_coefficient.item(),
        "scale": {name: buffer.item() for name, buffer in module.scale.named_buffers()},
        "updates": module.updates,
        "examples": module.examples_seen,
        "sum": {name: value.double().sum().item() for name, value in state.items() if value.is_floating_point()},
        "rank": trainer.global_rank,
    }


def write(out, strategy, model, cases, kill=None):
    found = {name: result(*run(out, strategy, model, name, kill)) for name in cases}
    rank = next(iter(found.values()))["rank"]
    (out / f"{strategy}-{rank}.json").write_text(json.dumps(found))


def forked(*arguments):
    """Train in a process of its own, which need not import everything again; return how it ended."""
    child = os.fork()
    if not child:
        code = 1
        try:
            write(*arguments)
            code = 0
        finally:
            traceback.print_exc()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def resume(out, model, cases):
    for case in cases:
        name, kill = case.split(":")
        whole, parts = out / name / "whole", out / name / "parts"
        whole.mkdir(parents=True)
        parts.mkdir()
        assert forked(whole, "auto", model, [name]) == 0
        assert forked(parts, "auto", model, [name], int(kill)) == -signal.SIGKILL
        assert not (parts / "auto-0.json").exists()
        assert forked(parts, "auto", model, [name]) == 0


def main(out, strategy, model, cases, kill=None):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if strategy == "resume":
        resume(out, model, cases.split(","))
    else:
        write(out, strategy, model, cases.split(","), None if kill is None else int(kill))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
