"""Token log-probabilities against the full computation, masked moments by hand, and generators that never collide."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlhf.functional.sequence import (
    CHUNK,
    chunked_token_logps,
    masked_mean,
    masked_moments,
    masked_sum,
    row_generator,
    standardise,
    token_logps,
)
from tests import reference as ref


class Watch(TorchDispatchMode):
    """Remembers the size of the largest tensor made, and how many matrix products were taken."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        self.products += func.overloadpacket == torch.ops.aten.mm
        return result


def problem(m=1100, h=5, v=37, dtype=torch.float64, seed=0):
    """More rows than two chunks, and not a multiple of one."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (m,), generator=g)


def test_token_logps_by_hand():
    """Softmax of (0, ln 3) is (1/4, 3/4), of (ln 2, 0, 0) it is (1/2, 1/4, 1/4); position t scores label t."""
    logits = torch.tensor([[[0.0, math.log(3), -math.inf], [math.log(2), 0.0, 0.0]]])
    expected = torch.tensor([[math.log(3 / 4), math.log(1 / 4)]])
    torch.testing.assert_close(token_logps(logits, torch.tensor([[1, 2]])), expected)


def test_token_logps_agree_with_the_formula():
    hidden, weight, labels = problem(m=20)
    logits = (hidden @ weight.T).detach()
    np.testing.assert_allclose(token_logps(logits, labels), ref.token_logps(logits, labels), rtol=1e-12)


def test_token_logps_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"labels must have shape \(1, 3\), got \(1, 2\)"):
        token_logps(torch.zeros(1, 3, 5), torch.zeros(1, 2, dtype=torch.int64))


def test_chunks_equal_the_full_computation_with_gradients():
    hidden, weight, labels = problem()
    assert len(labels) > 2 * CHUNK
    grad = torch.randn(len(labels), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for compute in (chunked_token_logps, lambda h, w, y: token_logps(h @ w.T, y)):
        logps = compute(hidden, weight, labels)
        found.append([logps, *torch.autograd.grad(logps, [hidden, weight], grad)])
    for ours, full in zip(*found, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, full, rtol=1e-10, atol=1e-12)


def test_chunked_gradients_by_finite_differences():
    hidden, weight, labels = problem(m=4, v=6)
    assert torch.autograd.gradcheck(lambda h, w: chunked_token_logps(h, w, labels), (hidden, weight))


def test_half_precision_is_added_up_in_float32():
    """Same bfloat16 numbers, products and sums in float64: the difference is of float32's size, not of bfloat16's."""
    hidden, weight, labels = problem(h=64, dtype=torch.bfloat16)
    logps = chunked_token_logps(hidden, weight, labels)
    full = token_logps(hidden.double() @ weight.double().T, labels)
    assert logps.dtype == torch.float32
    assert float((logps - full).detach().abs().max()) < 1e-4
    assert (
        float((token_logps(hidden @ weight.T, labels) - full).detach().abs().max()) > 1e-3
    )  # what bfloat16 logits give
    ours = torch.autograd.grad(logps.sum(), [hidden, weight])
    exact = torch.autograd.grad(full.sum(), [hidden, weight])
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=8e-3, atol=2e-2)  # slopes and result are rounded to bfloat16


def test_autocast_does_not_reach_the_head():
    hidden, weight, labels = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = chunked_token_logps(hidden, weight, labels)
    assert torch.equal(inside, chunked_token_logps(hidden, weight, labels))


def test_logits_are_never_held_whole():
    hidden, weight, labels = problem(v=400)
    with Watch() as watch:
        chunked_token_logps(hidden, weight, labels).sum().backward()
    assert watch.largest == CHUNK * 400 < len(labels) * 400
    assert watch.products == 3 * 4  # three chunks: logits, logits again, and a gradient each for hidden and weight


def test_a_frozen_head_costs_no_gradient():
    hidden, weight, labels = problem()
    weight.requires_grad_(requires_grad=False)
    with Watch() as watch:
        chunked_token_logps(hidden, weight, labels).sum().backward()
    assert weight.grad is None
    assert watch.products == 3 * 3


def test_no_rows_are_no_trouble():
    hidden, weight, labels = problem(m=0)
    logps = chunked_token_logps(hidden, weight, labels)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert not weight.grad.any()


def test_chunked_token_logps_refuse_other_shapes():
    hidden, weight, labels = problem(m=4)
    with pytest.raises(ValueError, match=r"shapes \[M, H\], \[V, H\] and \[M\], got \[\(4, 5\), \(37, 5\), \(3,\)\]"):
        chunked_token_logps(hidden, weight, labels[:3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_on_a_gpu_is_added_up_in_float32():
    hidden, weight, labels = (x.cuda() for x in problem(h=64, dtype=torch.bfloat16))
    full = token_logps(hidden.double() @ weight.double().T, labels)
    logps = chunked_token_logps(hidden, weight, labels)
    assert float((logps - full).detach().abs().max()) < 1e-4
    ours = torch.autograd.grad(logps.sum(), [hidden, weight])
    for a, b in zip(ours, torch.autograd.grad(full.sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=8e-3, atol=2e-2)  # slopes and result are rounded to bfloat16


MASK = torch.tensor([[True, True, False], [False, False, False]])


def test_masked_sums_and_means_by_hand():
    """Row one: 1 + 3 = 4 over 2; row two holds nothing. What the mask hides is NaN on purpose."""
    x = torch.tensor([[1.0, 3.0, torch.nan], [torch.nan, 7.0, 8.0]])
    assert masked_sum(x, MASK).tolist() == [4.0, 0.0]
    assert masked_mean(x, MASK).tolist() == [2.0, 0.0]
    assert masked_sum(x, MASK, dim=0).tolist() == [1.0, 3.0, 0.0]
    assert masked_sum(x.bfloat16(), MASK).dtype == torch.float32


def test_masked_sum_lets_no_gradient_through_the_mask():
    x = torch.tensor([[1.0, 3.0, torch.nan], [torch.nan, 7.0, 8.0]], requires_grad=True)
    masked_sum(x, MASK).sum().backward()
    assert torch.equal(x.grad, MASK.float())


def test_masked_moments_by_hand():
    """Values 1 and 3: count 2, sum 4, squares 1 + 9; a second stream ten times as large."""
    x = torch.tensor([[1.0, 3.0, 9.0], [9.0, 9.0, 9.0]])
    assert [float(m) for m in masked_moments(x, MASK)] == [2.0, 4.0, 10.0]
    count, total, squares = masked_moments(torch.stack([x, 10 * x], -1), MASK)
    assert (float(count), total.tolist(), squares.tolist()) == (2.0, [4.0, 40.0], [10.0, 1000.0])


def test_moments_add_up_over_parts():
    """Two ranks with unequal counts standardise by the moments of the whole, not by a mean of means."""
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(5, 7, generator=g), torch.rand(5, 7, generator=g) < 0.6
    whole = standardise(x, mask, center=True)
    shares = [masked_moments(x[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 5))]
    moments = tuple(a + b for a, b in zip(*shares, strict=True))
    parts = [standardise(x[rows], mask[rows], center=True, moments=moments) for rows in (slice(0, 1), slice(1, 5))]
    torch.testing.assert_close(torch.cat(parts), whole)
    alone = [standardise(x[rows], mask[rows], center=True) for rows in (slice(0, 1), slice(1, 5))]
    assert not torch.allclose(torch.cat(alone), whole)


def test_standardise_by_hand():
    """Values 1 and 3: mean 2, population std 1. Centred -1 and 1; not centred the mean stays: 1 and 3."""
    x = torch.tensor([[1.0, 3.0, 9.0], [9.0, 9.0, 9.0]])
    assert standardise(x, MASK, center=True).tolist() == [[-1, 1, 0], [0, 0, 0]]
    assert standardise(x, MASK, center=False).tolist() == [[1, 3, 0], [0, 0, 0]]
    assert standardise(10 * x, MASK, center=False).tolist() == [[19, 21, 0], [0, 0, 0]]


def test_a_constant_stream_is_only_centred():
    """100 in float32 with rounding noise of 1e-5 stays noise; the stream beside it gets unit variance."""
    x = torch.tensor([[100.0, 100.00001], [100.0, 100.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    result = standardise(torch.stack([x, torch.tensor([[0.0, 2.0], [0.0, 2.0]])], -1), mask, center=True)
    assert float(result[..., 0].abs().max()) < 1e-4
    assert result[..., 1].tolist() == [[-1, 1], [-1, 1]]
    assert standardise(x, mask, center=False, floor=1.0).tolist() == x.tolist()


def test_a_far_origin_costs_no_precision():
    """Mean 1,000 and std 0.1 in float32: squares of 1e6, summed in float32, would drown a variance of 0.01."""
    x = 1000 + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    result = standardise(x, torch.ones(64, 64, dtype=torch.bool), center=True)
    assert float(result.double().mean()) == pytest.approx(0, abs=1e-3)
    assert float(result.double().std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_standardise_of_little_or_nothing():
    x = torch.tensor([[5.0, torch.nan]])
    assert standardise(x, torch.tensor([[True, False]]), center=True).tolist() == [[0.0, 0.0]]
    assert standardise(x, torch.tensor([[False, False]]), center=True).tolist() == [[0.0, 0.0]]


def test_row_generators_repeat_and_never_collide():
    """12,000 neighbouring rows draw 12,000 different numbers, the same ones again when asked again."""
    rows = list(itertools.product(range(3), range(4), range(250), range(4)))
    draws = [int(torch.randint(2**62, (), generator=row_generator(*row))) for row in rows]
    assert len(set(draws)) == len(rows)
    assert [int(torch.randint(2**62, (), generator=row_generator(*row))) for row in rows[:50]] == draws[:50]


def test_row_generators_keep_their_numbers_apart():
    """(1, 2, 3, 4) in another order, or with digits moved between neighbours, is another row."""
    rows = [
        *itertools.permutations((1, 2, 3, 4)),
        (12, 3, 4, 0),
        (1, 23, 4, 0),
        (1, 2, 34, 0),
        (0, 0, 0, 0),
        (2**40, 0, 0, 0),
    ]
    assert len({float(torch.rand((), generator=row_generator(*row), dtype=torch.float64)) for row in rows}) == len(rows)


def test_row_generators_are_uniform_across_rows():
    """First draws over prompts and over samples have mean 1/2 (standard error 0.0065 at 2,000) and no correlation."""
    prompts = torch.stack([torch.rand(2, generator=row_generator(0, 0, i, 0)) for i in range(2000)])
    samples = torch.stack([torch.rand(2, generator=row_generator(0, 0, 0, i)) for i in range(2000)])
    for draws in (prompts, samples):
        assert abs(float(draws[:, 0].mean()) - 0.5) < 5 * 0.0065
        assert abs(float(torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1])) < 5 / math.sqrt(2000)


def test_negative_row_numbers_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        row_generator(0, 0, -1, 0)
