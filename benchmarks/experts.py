"""Five LoRA experts in one batched pass against five passes through peft: processor seconds, interleaved, as a ratio.

python benchmarks/experts.py [ROUNDS]

Forward and backward on a 4-layer, width-256 Llama, rank 8 on q, k, v and o, 8 rows of 64 tokens for each expert, fp32,
one thread. Both sides hold the same weights and must give the same states. Machines are noisy, so only the ratio is a
result. Then what a 5-member ensemble holds between two steps (parameters and AdamW's moments) over one member's.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.models.backbone import LoRA, ModelOptions
from lit_rlhf.models.ensemble import new_ensemble
from lit_rlhf.models.experts import ExpertBody
from lit_rlhf.types import Sequences

EXPERTS, ROWS, TOKENS, WORDS = 5, 8, 64, 8192
OPTIONS = ModelOptions(lora=LoRA(r=8, alpha=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")))


def prepare(folder: str) -> None:
    """Write the base model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def peft_model(folder: str, body: ExpertBody) -> Any:
    """Return peft's model with an adapter for each expert and the expert's weights in it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    lora = OPTIONS.lora
    assert lora is not None
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    model = get_peft_model(AutoModel.from_pretrained(folder, dtype=torch.float32), config, adapter_name="0")
    for expert in range(1, EXPERTS):
        model.add_adapter(str(expert), config)
    for name, layer in body.expert_layers.items():
        adapter = model.get_base_model().get_submodule(name)
        for expert in range(EXPERTS):
            adapter.lora_A[str(expert)].weight.data = layer.A.data[expert].T.contiguous()
            adapter.lora_B[str(expert)].weight.data = layer.B.data[expert].T.contiguous()
    return model.train()


def passes(folder: str) -> dict[str, Callable[[], Tensor]]:
    """Return both sides: each runs all experts forward and backward, and returns the states, [experts, rows, H]."""
    body = ExpertBody(folder, OPTIONS, EXPERTS).train()
    for layer in body.expert_layers.values():
        nn.init.normal_(layer.B, std=0.02)
    model = peft_model(folder, body)
    ids = torch.randint(3, WORDS, (EXPERTS * ROWS, TOKENS))
    mask = torch.ones_like(ids, dtype=torch.bool)
    slots = torch.arange(EXPERTS)[:, None]

    def batched() -> Tensor:
        body.zero_grad()
        states: Tensor = body(Sequences(ids, mask, mask), slots)
        torch.autograd.backward(states.square().sum())
        return states.detach().view(EXPERTS, ROWS, -1)

    def separate() -> Tensor:
        found = []
        for expert, rows in enumerate(ids.chunk(EXPERTS)):
            model.set_adapter(str(expert))
            model.zero_grad()
            states = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).last_hidden_state
            torch.autograd.backward(states[:, -1].square().sum())
            found.append(states[:, -1].detach())
        return torch.stack(found)

    return {"batched": batched, "separate": separate}


def held(folder: str, members: int) -> int:
    """Count parameters and AdamW's moments of an ensemble."""
    model = new_ensemble(folder, OPTIONS, members)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size * (3 if trained else 1) for size, trained in sizes)


def main(rounds: int) -> None:
    """Interleave both sides and print the ratio of processor seconds."""
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        sides = passes(folder)
        states = [run() for run in sides.values()]
        print(f"largest difference between the states: {(states[0] - states[1]).abs().max():.1e}")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, run in sides.items():
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
        for name, values in seconds.items():
            print(f"{name}: {statistics.median(values):.3f} processor seconds a pass of all {EXPERTS} experts")
        ratios = [s / b for b, s in zip(seconds["batched"], seconds["separate"], strict=True)]
        print(f"separate / batched: {statistics.median(ratios):.2f} (over 1: batched is faster)")
        one, five = held(folder, 1), held(folder, EXPERTS)
        print(f"held between steps: {five:,} numbers by {EXPERTS} members, {one:,} by one: {five / one:.2f} times")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
