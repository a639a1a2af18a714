"""TRL's DPOTrainer on the same batch and the same two models gives the same losses, where both define the same thing.

Not compared: R-DPO and RPO (TRL has neither: its `sft` term has no beta and averages over the batch's tokens), IPO on
summed log-ratios and the "daa" convention (TRL averages over tokens), robust DPO (which is not conservative smoothing).
"""

import pytest
import torch

from lit_rlhf.data import PreferenceData
from lit_rlhf.functional.preference import DPO, IPO, SLiC
from lit_rlhf.modules import PreferenceModule

trl = pytest.importorskip("trl", reason="extra `peers` is not installed")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

SAME = [
    ("sigmoid", {}, DPO(beta=0.1)),
    ("hinge", {}, SLiC(beta=0.3)),
    ("ipo", {}, IPO(beta=0.2, convention="standard", length_average=True)),
]


@pytest.fixture(scope="module")
def batch_and_models():
    data = PreferenceData(tokenizer="builtin:policy", batch_size=6, limit=12)
    data.setup("fit")
    module = PreferenceModule()
    module.configure_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return next(iter(data.train_dataloader())), module


@pytest.mark.parametrize(("loss_type", "more", "loss"), SAME, ids=[row[0] for row in SAME])
def test_losses_and_gradients_equal_trl(batch_and_models, tmp_path, loss_type, more, loss):
    from datasets import Dataset

    batch, module = batch_and_models
    policy, reference = module.policy.causal_lm, module.reference.causal_lm
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), loss_type=[loss_type], beta=loss.beta, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, per_device_train_batch_size=6, **more,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "the", "chosen": " cat", "rejected": " dog"}])
    trainer = trl.DPOTrainer(
        policy,
        ref_model=reference,
        args=arguments,
        train_dataset=rows,
        processing_class=module.text_encoder().tokenizer,
    )
    inputs = {
        "input_ids": batch.sequences.ids,
        "attention_mask": batch.sequences.attention_mask.long(),
        "completion_mask": batch.sequences.response_mask.long(),
    }
    module.loss = loss
    found = {}
    for name in ("theirs", "ours"):
        policy.zero_grad()
        value = trainer.compute_loss(policy, inputs) if name == "theirs" else module.losses(batch).loss.mean()
        value.backward()
        found[name] = value.item(), torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert found["ours"][0] == pytest.approx(found["theirs"][0], abs=1e-4)
    assert (found["ours"][1] - found["theirs"][1]).abs().max() < 1e-4 * found["theirs"][1].abs().max()
    assert found["ours"][1].abs().max() > 0
