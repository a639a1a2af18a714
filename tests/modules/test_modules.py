"""The conductors: exact first steps, accumulation, resume, checkpoints, and that the probe changes nothing."""

import math

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file, save_file

from callbacks import GoldProbe
from lit_rlhf.data import PreferenceData, SFTData
from lit_rlhf.functional.preference import DPO, RPO
from lit_rlhf.models.backbone import LoRA
from lit_rlhf.modules import PreferenceModule, RewardModule, SFTModule
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.types import Sampling, UserError

FAST = Optimizer(lr=1e-3)


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.values.append(trainer.callback_metrics["loss"].item())


def fit(module, data, *callbacks, steps=4, logger=False, ckpt_path=None, **options):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **{"limit_val_batches": 0, "enable_progress_bar": False} | options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def pairs(batch_size=8, **options):
    return PreferenceData(tokenizer="builtin:policy", batch_size=batch_size, limit=48, **options)


def state(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_dpo_starts_at_log_2_with_margin_0():
    losses = Losses()
    trainer = fit(PreferenceModule(loss=DPO(beta=0.1)), pairs(), losses, steps=1)
    assert losses.values[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.callback_metrics["rewards/margins"] == 0
    assert trainer.callback_metrics["rewards/accuracies"] == 0.5


def test_rpo_starts_at_log_2_plus_its_anchor():
    losses = Losses()
    trainer = fit(PreferenceModule(loss=RPO(base=DPO(beta=0.1), eta=0.2)), pairs(), losses, steps=1)
    anchor = -0.2 * 0.1 * trainer.callback_metrics["logps/chosen"].item()
    assert losses.values[0] == pytest.approx(math.log(2) + anchor, rel=1e-5)


@pytest.mark.parametrize("kind", ["sft", "reward", "preference"])
def test_accumulation_gives_the_same_update(kind):
    ends = []
    for batch_size, accumulate in ((8, 1), (1, 8), (2, 4)):
        torch.manual_seed(0)
        module = {"sft": SFTModule, "reward": RewardModule, "preference": PreferenceModule}[kind](
            optimizer=Optimizer(name="sgd", lr=0.1)
        )
        make = SFTData if kind == "sft" else PreferenceData
        data = make(tokenizer="builtin:policy", batch_size=batch_size, limit=48)
        fit(module, data, steps=2, accumulate_grad_batches=accumulate)
        ends.append(state(module))
    for name, value in ends[0].items():
        for other in ends[1:]:
            assert (other[name] - value).abs().max() < 1e-6, name


def test_an_sft_loss_is_the_mean_over_response_tokens():
    losses = Losses()
    module, data = SFTModule(optimizer=FAST), SFTData(tokenizer="builtin:policy", batch_size=6, limit=6)
    fit(module, data, losses, steps=1)
    fresh = SFTModule()
    fresh.configure_model()
    data.setup("fit")
    batch = next(iter(data.train_dataloader())).sequences
    logits = fresh.policy.causal_lm(input_ids=batch.ids, attention_mask=batch.attention_mask.long()).logits
    logps = logits.log_softmax(-1)
    total, count = 0.0, 0
    for row in range(len(batch.ids)):
        for t in range(1, batch.ids.shape[1]):
            if batch.response_mask[row, t]:
                total, count = total - logps[row, t - 1, batch.ids[row, t]].item(), count + 1
    assert losses.values[0] == pytest.approx(total / count, abs=1e-5)


def test_a_lora_reference_stays_what_it_was():
    module, data = PreferenceModule(loss=DPO(beta=0.1), lora=LoRA(r=4), optimizer=Optimizer(lr=1e-2)), pairs()
    module.configure_model()
    data.setup("fit")
    batch = next(iter(data.train_dataloader())).sequences
    before = module.reference_token_logps(batch)
    fit(module, data)
    assert module.reference is None
    assert torch.equal(module.reference_token_logps(batch), before)
    assert not torch.allclose(module.logps(batch), before)


def test_checkpoints_leave_frozen_weights_out_and_reload_weights_only(tmp_path):
    for lora in (None, LoRA(r=4)):
        module = PreferenceModule(loss=RPO(base=DPO(beta=0.3), eta=0.1), optimizer=FAST, lora=lora)
        trainer = fit(module, pairs())
        path = tmp_path / "it.ckpt"
        trainer.save_checkpoint(path)
        kept = torch.load(path, weights_only=True)["state_dict"]
        assert kept.keys() <= {n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
        again = PreferenceModule.load_from_checkpoint(path, weights_only=True)
        assert again.loss == module.loss
        data = pairs()
        data.setup("fit")
        batch = next(iter(data.train_dataloader())).sequences
        assert torch.equal(again.logps(batch), module.logps(batch))
        assert torch.equal(again.reference_token_logps(batch), module.reference_token_logps(batch))


@pytest.mark.parametrize("stop", [2, 4, 6, 8])
def test_resuming_equals_not_having_stopped(tmp_path, stop):
    whole, first, second = Losses(), Losses(), Losses()
    plan = {"steps": -1, "max_epochs": 2}  # six steps an epoch
    straight = PreferenceModule(loss=DPO(beta=0.1), optimizer=Optimizer(lr=1e-3, warmup_ratio=0.5))
    fit(straight, pairs(), whole, **plan)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    # the schedule needs the same horizon, so the run is cut inside, as a kill would
    options = {"loss": DPO(beta=0.1), "optimizer": Optimizer(lr=1e-3, warmup_ratio=0.5)}
    with pytest.raises(KeyboardInterrupt):
        fit(PreferenceModule(**options), pairs(), first, saver, Kill(stop + 1), **plan)
    resumed = PreferenceModule(**options)
    fit(resumed, pairs(), second, saver, **plan, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert len(whole.values) == 12
    assert first.values[:stop] + second.values == whole.values
    for name, value in state(straight).items():
        assert torch.equal(state(resumed)[name], value), name


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt

    def on_exception(self, trainer, pl_module, exception):
        raise exception


def test_the_probe_changes_no_loss(tmp_path):
    probe = GoldProbe(every_n_steps=1, n_prompts=4, sampling=Sampling(max_new_tokens=8))
    ends = []
    for callbacks in ([], [probe]):
        losses = Losses()
        module = PreferenceModule(loss=DPO(beta=0.1), optimizer=FAST, lora=LoRA(r=4, dropout=0.2))
        logger = TensorBoardLogger(str(tmp_path), name="run") if callbacks else False
        fit(module, pairs(), losses, *callbacks, logger=logger)
        ends.append((losses.values, state(module)))
    assert ends[0][0] == ends[1][0]
    for name, value in ends[0][1].items():
        assert torch.equal(ends[1][1][name], value), name


def test_a_loss_that_is_not_finite_stops_the_run():
    module = PreferenceModule(loss=DPO(beta=0.1), optimizer=Optimizer(name="sgd", lr=1e30))
    with pytest.raises(UserError, match=r"step \d+.*not finite"):
        fit(module, pairs(), steps=6)


def test_a_reward_model_keeps_its_scale(tmp_path):
    module, data = RewardModule(optimizer=FAST), pairs()
    fit(module, data, steps=2, limit_val_batches=1.0, val_check_interval=2)
    with torch.no_grad():
        scores = torch.cat([module.reward_model(batch.sequences) for batch in data.val_dataloader()]).double()
    module.export(str(tmp_path / "hf"))
    from transformers import AutoConfig

    kept = AutoConfig.from_pretrained(tmp_path / "hf")
    assert kept.score_mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert kept.score_std == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    assert kept.score_std > 0
    assert kept.score_std != 1  # what it is before it is measured


def test_precomputed_references_change_nothing_and_are_reused(tmp_path):
    ends = []
    for cached in (False, True, True):
        losses = Losses()
        module = PreferenceModule(
            loss=DPO(beta=0.1), optimizer=FAST, precompute_reference=cached, cache_dir=str(tmp_path / "cache")
        )
        fit(module, pairs(), losses)
        ends.append(losses.values)
    assert ends[1] == pytest.approx(ends[0], abs=1e-5)
    assert ends[1] == ends[2]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_stale_reference_cache_is_found_out(tmp_path):
    options = {"loss": DPO(beta=0.1), "precompute_reference": True, "cache_dir": str(tmp_path)}
    fit(PreferenceModule(**options), pairs(), steps=1)
    (file,) = tmp_path.iterdir()
    content = load_file(file)
    save_file({name: value + 1 for name, value in content.items()}, file)
    with pytest.raises(UserError, match="nats are kept but the reference gives"):
        fit(PreferenceModule(**options), pairs(), steps=1)
