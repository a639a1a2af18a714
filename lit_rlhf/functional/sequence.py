"""Token log-probabilities, masked sums and moments, and one random generator for every sampled row.

Legend: B sequences, T response tokens, V vocabulary, H hidden size, M tokens in a flat list, S streams. Masks are True
where a token counts. Everything is computed in at least float32, and float64 stays float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # rows of logits held at a time; more is hardly faster, fewer is slower
HALF = (torch.bfloat16, torch.float16)
Moments = tuple[Tensor, Tensor, Tensor]


def widen(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every label under its logits.

    logp_t = logits_t[label_t] - log sum_v exp(logits_t[v])

    Args:
        logits: [B, T, V], or any [..., V]; position t already predicts label t, nothing is shifted here.
        labels: [B, T], or [...]; in [0, V) also where a mask will drop the result.

    Returns:
        [B, T], nats.

    Raises:
        ValueError: the shapes do not fit.

    >>> token_logps(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([-0.6931])
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    wide = widen(logits)
    return wide.gather(-1, labels[..., None])[..., 0] - wide.logsumexp(-1)


def chunked_token_logps(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """`token_logps(hidden @ head_weight.T, labels)` without ever holding [M, V].

    Logits are made 512 rows at a time, in float32 also for half-precision inputs, and made again in the backward pass;
    a frozen head costs no weight gradient. The gradient of a row's logits is grad * (onehot(label) - softmax(logits)).

    Args:
        hidden: [M, H], last hidden states of the positions that predict `labels`.
        head_weight: [V, H]; the head has no bias and its logits are not capped.
        labels: [M].

    Returns:
        [M], nats.

    Raises:
        ValueError: the shapes do not fit.
    """
    if hidden.ndim != 2 or head_weight.ndim != 2 or labels.shape != hidden.shape[:1]:
        shapes = [tuple(x.shape) for x in (hidden, head_weight, labels)]
        raise ValueError(f"hidden, head_weight and labels must have shapes [M, H], [V, H] and [M], got {shapes}")
    return _ChunkedTokenLogps.apply(hidden, head_weight, labels)


class _ChunkedTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logps = torch.empty_like(labels, dtype=torch.promote_types(hidden.dtype, torch.float32))
        normalisers = torch.empty_like(logps)
        for rows in _chunks(labels):
            logits = _product(hidden[rows], weight.T)
            normalisers[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(-1, labels[rows, None])[:, 0] - normalisers[rows]
        ctx.save_for_backward(hidden, weight, labels, normalisers)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, labels, normalisers = ctx.saved_tensors
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=normalisers.dtype) if wants_weight else None
        for rows in _chunks(labels):
            logits = _product(hidden[rows], weight.T)
            slope = logits.sub_(normalisers[rows, None]).exp_().mul_(-grad[rows, None])
            slope.scatter_add_(1, labels[rows, None], grad[rows, None])
            if grad_hidden is not None:
                grad_hidden[rows] = _product(slope.to(weight.dtype), weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += _product(slope.to(hidden.dtype).T, hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def logps_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of the distribution that it comes from.

    H = -sum_v p_v log p_v

    Args:
        logits: [M, V], float32 or wider.
        labels: [M].

    Returns:
        Two [M], nats.
    """
    logps = logits.log_softmax(-1)
    return logps.gather(-1, labels[:, None])[:, 0], torch.special.entr(logps.exp()).sum(-1)


def chunked_logps_and_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`logps_and_entropy(hidden @ head_weight.T, labels)` without ever holding [M, V].

    Logits are made 512 rows at a time, and made again in the backward pass.

    Args:
        hidden: [M, H].
        head_weight: [V, H].
        labels: [M].

    Returns:
        Two [M], nats.
    """

    def one(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return logps_and_entropy(_product(states, head_weight.T), wanted)

    parts = [checkpoint(one, hidden[rows], labels[rows], use_reentrant=False) for rows in _chunks(labels)]
    if not parts:
        return hidden.sum(-1).float(), hidden.sum(-1).float()
    logps, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return logps, entropy


def _chunks(labels: Tensor) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, len(labels), CHUNK)]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices with a result in at least float32, whatever autocast says."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype in HALF and hasattr(torch.ops.aten.mm, "dtype"):
            # tensor cores add up in float32; this keeps the sum as it is
            return torch.mm(left, right.to(left.dtype), out_dtype=torch.float32)
        return torch.mm(*(x.to(torch.promote_types(left.dtype, torch.float32)) for x in (left, right)))


def masked_sum(x: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Sum of `x` over `dim` where `mask` is True; what stands elsewhere, NaN included, does not count."""
    return torch.where(mask, widen(x), 0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Mean of `x` over `dim` where `mask` is True; 0 where it is True nowhere."""
    return masked_sum(x, mask, dim) / mask.sum(dim).clamp_min(1)


def masked_moments(x: Tensor, mask: Tensor) -> Moments:
    """Count, sum and sum of squares over the mask, which add up over micro-batches and ranks.

    Args:
        x: [B, T], or [B, T, S] for S streams under one mask.
        mask: [B, T].

    Returns:
        count [], sum and sum of squares [] or [S]; float64, since a variance made from sums loses half the digits.
    """
    kept = x[mask].double()
    return mask.sum().double(), kept.sum(0), kept.square().sum(0)


def standardise(x: Tensor, mask: Tensor, center: bool, moments: Moments | None = None, floor: float = 1e-4) -> Tensor:
    """Scale to unit variance over the mask, and to zero mean if `center`; else the mean stays what it was.

    y = (x - mean) / std + (0 if center else mean),   std^2 = sum of squares / count - mean^2

    A stream whose std is not above `floor` is not scaled: a constant reward must not become unit noise.

    Departure from common RLHF code: the population variance, so that sums over ranks give that of the whole exactly.

    Args:
        x: [B, T] or [B, T, S]; each stream is treated alone.
        mask: [B, T].
        center: whether the mean goes to zero.
        moments: of `masked_moments`, summed over ranks; taken from `x` when left out.
        floor: in units of `x`; >= 0.

    Returns:
        Like `x`, 0 outside the mask.
    """
    count, total, squares = masked_moments(x, mask) if moments is None else moments
    mean = total / count.clamp_min(1)
    std = (squares / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
    scale = torch.where(std > floor, std, 1.0)
    wide = widen(x)
    centred = (wide - mean.to(wide.dtype)) / scale.to(wide.dtype)
    result = centred if center else centred + mean.to(wide.dtype)
    return torch.where(mask if mask.ndim == x.ndim else mask[..., None], result, 0)


def row_generator(seed: int, update: int, prompt_index: int, sample_index: int) -> torch.Generator:
    """Return the CPU generator of one sampled row, the same in every process that draws it.

    The four numbers are hashed together by NumPy's `SeedSequence`, so that neighbours share nothing. PyTorch's CPU
    generator keeps 32 bits of the hash: any two rows draw alike by chance once in 4e9.

    Args:
        seed: of the run; all four >= 0.
        update: rollout cycle or probe.
        prompt_index: of the prompt over all ranks.
        sample_index: of the sample for that prompt.
    """
    (state,) = np.random.SeedSequence([seed, update, prompt_index, sample_index]).generate_state(1)
    return torch.Generator().manual_seed(int(state))
