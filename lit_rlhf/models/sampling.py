"""Drawing responses: a cached decoding loop whose randomness belongs to the row, not to the batch.

    token_t = min { v : sum_{w <= v} p_t(w) > u_t },     u_t uniform in [0, 1)

p_t is the softmax of logits / temperature after top-k and top-p. All of a row's u_t come from that row's own generator
before the first step, so its tokens depend neither on its neighbours nor on the number of processes. The log-probs kept
are of the temperature-scaled distribution before top-k and top-p, the one that KL and importance ratios speak of.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_rlhf.models.backbone import Backbone, evaluating
from lit_rlhf.types import Sampling, Sequences, UserError


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Sequences,
    generator: Sequence[torch.Generator],
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> tuple[Sequences, Tensor, Tensor]:
    """Draw one response per prompt.

    Args:
        backbone: the policy; its modes are as before afterwards.
        prompts: B rows of P columns, padded on the left; only ids and attention mask are read.
        generator: B CPU generators, one a row.
        sampling: temperature, top-k, top-p, limit; a row that reaches the context window first stops there.
        stop_ids: tokens that end a response.

    Returns:
        B rows of P + T columns (T is the longest response, or the limit), the mask covering each response up to and
        with its first stop token; log-probabilities [B, T], nats, 0 outside the response; and [B], True where the row
        ended on a stop token.

    Raises:
        UserError: a prompt fills the context window alone.
    """
    _check(backbone, prompts, generator)
    device = prompts.ids.device
    uniforms = torch.stack([torch.rand(sampling.max_new_tokens, generator=g) for g in generator]).to(device)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    with evaluating(backbone):
        ids, alive, logps = _decode(backbone, prompts, uniforms, sampling, stops)
    ended = torch.isin(ids, stops).logical_and(alive).any(-1)
    prompt_part = torch.zeros_like(prompts.attention_mask)
    sequences = Sequences(
        ids=torch.cat([prompts.ids, ids], -1),
        attention_mask=torch.cat([prompts.attention_mask, alive], -1),
        response_mask=torch.cat([prompt_part, alive], -1),
    )
    return sequences, logps, ended


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Pick one token a row by inverting the cumulative distribution.

    Args:
        logits: [B, V], float32, before temperature.
        uniforms: [B] in [0, 1).
        sampling: temperature, top-k, top-p.

    Returns:
        ids [B], and their log-probabilities [B] before top-k and top-p, nats.
    """
    scaled = logits / sampling.temperature
    kept = _truncate(scaled, sampling)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    mass = kept.softmax(-1, dtype=wide).cumsum(-1)
    target = uniforms.to(wide)[:, None] * mass[:, -1:]
    ids = torch.searchsorted(mass, target, right=True).clamp_max(logits.shape[-1] - 1)
    return ids[:, 0], scaled.log_softmax(-1).gather(-1, ids)[:, 0]


def _truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set logits outside the k likeliest tokens and outside the nucleus to -inf; at least one token stays."""
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def _decode(
    backbone: Backbone, prompts: Sequences, uniforms: Tensor, sampling: Sampling, stops: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and log-probabilities of the responses, each [B, T]."""
    from transformers import DynamicCache

    cache = DynamicCache(config=backbone.causal_lm.config)
    window = backbone.context_window or sys.maxsize
    mask, positions = prompts.attention_mask, prompts.position_ids
    alive = torch.ones_like(mask[:, 0])
    column, steps = prompts.ids, []
    for uniform in uniforms.unbind(-1):
        ids, logps = draw(backbone.next_logits(column, mask, positions, cache), uniform, sampling)
        steps.append((ids, alive, logps.masked_fill(~alive, 0)))
        mask = torch.cat([mask, alive[:, None]], -1)
        positions = (positions[:, -1:] + 1).clamp_max(window - 1)  # rows that are done may stay at the edge
        alive = alive & ~torch.isin(ids, stops) & (positions[:, -1] + 1 < window)
        column = ids[:, None]
        if not _any(alive, everywhere=backbone.sharded):
            break
    ids, alive, logps = (torch.stack(parts, -1) for parts in zip(*steps, strict=True))
    return ids, alive, logps


def _any(flags: Tensor, *, everywhere: bool) -> bool:
    """Say whether any flag is set, on any rank where the ranks must keep step because they share parameters."""
    flag = flags.any().long()
    if everywhere:
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _check(backbone: Backbone, prompts: Sequences, generator: Sequence[torch.Generator]) -> None:
    assert len(generator) == len(prompts.ids), "one generator a row"
    assert bool(prompts.attention_mask[:, -1].all()), "prompts are padded on the left"
    longest, window = int(prompts.attention_mask.sum(-1).max()), backbone.context_window
    if window is not None and longest >= window:
        raise UserError(f"a prompt of {longest} tokens fills the model's window of {window} tokens")
