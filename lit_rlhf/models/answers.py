"""Responses of a frozen policy to a list of prompts, as text: what a reward model meets beside its own data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lit_rlhf.encoding import Encoder
from lit_rlhf.functional.sequence import row_generator
from lit_rlhf.models.backbone import Backbone
from lit_rlhf.models.sampling import sample
from lit_rlhf.types import Prompt, Sampling


def answers(
    path: str,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_size: int = 64,
    joiner: str = " ",
    device: torch.device | str = "cpu",
) -> list[str]:
    """Draw one response per prompt.

    Args:
        path: model folder, adapter folder, hub id or `builtin:` name of a policy.
        prompts: B prompts.
        numbers: B numbers; row i has the generator of (seed, 0, numbers[i], 0), so that it does not matter which
            process draws it.
        sampling: how responses are drawn.
        seed: seed of the rows' generators.
        batch_size: responses in one call.
        joiner: text between a string prompt and its response.
        device: where the policy is put meanwhile.

    Raises:
        UserError: no such policy, or a prompt fills its window.
    """
    if not prompts:
        return []
    encoder = Encoder.from_pretrained(path, joiner=joiner)
    policy = Backbone(path).requires_grad_(requires_grad=False).to(device)
    found: list[str] = []
    for start in range(0, len(prompts), batch_size):
        rows = encoder.collate_prompts(prompts[start : start + batch_size]).to(device)
        generators = [row_generator(seed, 0, number, 0) for number in numbers[start : start + batch_size]]
        drawn, _, _ = sample(policy, rows, generators, sampling, encoder.stop_ids)
        kept = zip(drawn.ids.cpu(), drawn.response_mask.cpu(), strict=True)
        found += [encoder.response_text(ids[mask].tolist()) for ids, mask in kept]
    return found
