"""KL, advantages and PPO's losses: by hand, against the formulas, and against exact gradients of small policies."""

import itertools
import math

import pytest
import torch

from lit_rlhf.functional.policy_gradient import clipped_surrogate, clipped_value, gae, kl_estimates
from lit_rlhf.functional.shaping import kl_rewards, terminal_rewards
from tests import reference as ref
from tests import reference_ppo as ref_ppo

NAN = math.nan


def test_by_hand():
    """Log-ratios u = ln 2 and -ln 2; a third token does not count and is NaN on purpose.

    k1 = ln 2 - ln 2 = 0;   k2 = 2 * ln(2)^2 / 2 = ln(2)^2;   k3 = (1/2 - 1 + ln 2) + (2 - 1 - ln 2) = 1/2
    """
    ln2 = math.log(2)
    logps = torch.tensor([[ln2, -ln2, torch.nan]], dtype=torch.float64)
    found = kl_estimates(logps, torch.zeros_like(logps), torch.tensor([[True, True, False]]))
    assert {name: float(value) for name, value in found.items()} == pytest.approx({"k1": 0.0, "k2": ln2**2, "k3": 0.5})


def test_agrees_with_the_formula():
    g = torch.Generator().manual_seed(0)
    logps, reference = torch.randn(2, 4, 6, generator=g, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=g) < 0.7
    found = kl_estimates(logps, reference, mask)
    for i in range(4):
        expected = ref.kl_estimates(logps[i].tolist(), reference[i].tolist(), mask[i].tolist())
        assert {name: float(value[i]) for name, value in found.items()} == pytest.approx(expected, rel=1e-12)


def test_a_policy_equal_to_its_reference_has_none():
    logps = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert all(not value.any() for value in kl_estimates(logps, logps, torch.ones(3, 5, dtype=torch.bool)).values())


def test_k1_and_k3_meet_the_exact_kl_and_k2_nearly():
    """Policy (1/2, 1/4, 1/4), reference (1/4, 1/4, 1/2): KL = 1/2 ln 2 + 1/4 ln(1/2) = ln(2) / 4 a token, 5 tokens.

    Expectations are exact: every first token weighted by its probability. k2 gives (1/2 + 1/4) ln(2)^2 / 2.
    """
    p, q = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    tokens = torch.arange(3)[:, None].expand(3, 5)
    found = kl_estimates(p.log()[tokens], q.log()[tokens], torch.ones(3, 5, dtype=torch.bool))
    expected = {name: float((p * value).sum()) for name, value in found.items()}
    assert expected["k1"] == pytest.approx(5 * math.log(2) / 4, rel=1e-12)
    assert expected["k3"] == pytest.approx(5 * math.log(2) / 4, rel=1e-12)
    assert expected["k2"] == pytest.approx(5 * 0.75 * math.log(2) ** 2 / 2, rel=1e-12)


def test_padding_changes_nothing():
    g = torch.Generator().manual_seed(0)
    logps, reference = torch.randn(2, 2, 4, generator=g)
    mask = torch.ones(2, 4, dtype=torch.bool)
    plain = kl_estimates(logps, reference, mask)
    padded = kl_estimates(*(torch.nn.functional.pad(x, (2, 3), value=9.0) for x in (logps, reference)),
                          torch.nn.functional.pad(mask, (2, 3)))  # fmt: skip
    assert all(torch.equal(plain[name], padded[name]) for name in plain)


def test_finite_at_a_hundred_nats_in_float32():
    logps = torch.tensor([[100.0], [-100.0]])
    found = kl_estimates(logps, torch.zeros_like(logps), torch.ones(2, 1, dtype=torch.bool))
    assert all(value.isfinite().all() for value in found.values())
    assert found["k3"].tolist() == pytest.approx([99.0, math.exp(100) - 101])


# Lengths 1, 2 and 3; what stands behind the last token is poison.
RAGGED = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)


def test_gae_by_hand_on_ragged_lengths():
    """Gamma 1/2, lambda 1/2, so A_t = delta_t + A_{t+1} / 4; the last delta of a row has no next value.

    length 1: delta = 4 - 2 = 2
    length 2: delta = 1 + 4/2 - 1 = 2, 6 - 4 = 2;              A = 2 + 2/4 = 2.5, 2
    length 3: delta = 0 + 2/2 - 3 = -2, 0 + 4/2 - 2 = 0, 8 - 4 = 4;   A = -2 + 1/4 = -1.75, 0 + 4/4 = 1, 4
    """
    rewards = torch.tensor([[4.0, NAN, NAN], [1.0, 6.0, NAN], [0.0, 0.0, 8.0]], dtype=torch.float64)
    values = torch.tensor([[2.0, NAN, NAN], [1.0, 4.0, NAN], [3.0, 2.0, 4.0]], dtype=torch.float64)
    advantages, targets = gae(rewards, values, RAGGED, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[2.0, 0.0, 0.0], [2.5, 2.0, 0.0], [-1.75, 1.0, 4.0]]
    assert targets.tolist() == [[4.0, 0.0, 0.0], [3.5, 6.0, 0.0], [1.25, 3.0, 8.0]]


def rollout(seed=0, b=5, t=6, streams=()):
    """Random rewards, values and ragged mask."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, b, t, *streams, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, t + 1, (b, 1), generator=g)
    return rewards, values, torch.arange(t) < lengths


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.0, 1.0)])
def test_gae_agrees_with_the_formula(gamma, gae_lambda):
    rewards, values, mask = rollout()
    advantages, targets = gae(rewards, values, mask, gamma, gae_lambda)
    for i, length in enumerate(mask.sum(1).tolist()):
        expected = ref_ppo.gae(rewards[i, :length].tolist(), values[i, :length].tolist(), gamma, gae_lambda)
        assert advantages[i, :length].tolist() == pytest.approx(expected[0], rel=1e-12)
        assert targets[i, :length].tolist() == pytest.approx(expected[1], rel=1e-12)
        assert not advantages[i, length:].any()
        assert not targets[i, length:].any()


def test_gae_ends_are_the_one_step_error_and_the_return():
    rewards, values, mask = rollout()
    kept = torch.where(mask, values, 0)
    after = torch.cat([kept[:, 1:], torch.zeros(len(kept), 1)], 1)
    one_step = torch.where(mask, rewards + 0.9 * after - values, 0)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0)[0], one_step)
    returns = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0)[1], torch.where(mask, returns, 0))


def test_perfect_values_leave_no_advantage_and_are_their_own_targets():
    rewards, _, mask = rollout()
    values = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    advantages, targets = gae(rewards, values, mask, 1.0, 0.7)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))
    torch.testing.assert_close(targets, torch.where(mask, values, 0))


def test_baseline_of_a_stream_is_its_own_head():
    """Three streams at once are three streams alone: column s sees the rewards and values of s and no other."""
    rewards, values, mask = rollout(streams=(3,))
    together = gae(rewards, values, mask, 0.9, 0.8)
    for s in range(3):
        alone = gae(rewards[..., s], values[..., s], mask, 0.9, 0.8)
        assert all(torch.equal(whole[..., s], part) for whole, part in zip(together, alone, strict=True))
    values[..., 1] += 7  # only the second head's advantages may notice
    moved = (gae(rewards, values, mask, 0.9, 0.8)[0] != together[0]).flatten(0, 1).any(0)
    assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize("side", [(0, 3), (2, 0), (2, 3)])
def test_padding_of_any_content_on_any_side_changes_nothing(side):
    rewards, values, mask = rollout()
    left, right = side
    padded = [torch.nn.functional.pad(x, side, value=NAN) for x in (rewards, values)]
    found = gae(*padded, torch.nn.functional.pad(mask, side), 0.9, 0.8)
    for whole, part in zip(found, gae(rewards, values, mask, 0.9, 0.8), strict=True):
        assert torch.equal(whole[:, left : whole.shape[1] - right], part)
        assert not whole[:, :left].any()


def surrogate_inputs(seed=0, b=4, t=5):
    g = torch.Generator().manual_seed(seed)
    logps, change, advantages = torch.randn(3, b, t, generator=g, dtype=torch.float64)
    return logps, logps - 0.4 * change, advantages, rollout(seed, b, t)[2]


def test_surrogate_by_hand():
    """Clip range 1/4. Ratios 2, 2, 1/2, 1/2 with advantages 1, -1, 1, -1, and a fifth token that does not count.

    min(2, 5/4) + min(-2, -5/4) + min(1/2, 3/4) + min(-1/2, -3/4) = 5/4 - 2 + 1/2 - 3/4 = -1, so the loss is 1
    ratios 2 + 2 + 1/2 + 1/2 = 5; clipped are the first and the last; k2 = 4 ln(2)^2 / 2
    """
    ln2 = math.log(2)
    logps = torch.tensor([[ln2, ln2, -ln2, -ln2, NAN]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, NAN]])
    mask = torch.tensor([[True, True, True, True, False]])
    output = clipped_surrogate(logps, torch.zeros_like(logps), advantages, mask, clip_range=0.25)
    assert output.loss.tolist() == pytest.approx([1.0], rel=1e-12)
    found = {name: value.tolist() for name, value in output.metrics.items()}
    assert found["ratio"] == pytest.approx([5.0], rel=1e-12)
    assert found["clipped"] == [2.0]
    assert found["approx_kl"] == pytest.approx([2 * ln2**2], rel=1e-12)


def test_surrogate_agrees_with_the_formula():
    logps, behaviour, advantages, mask = surrogate_inputs()
    output = clipped_surrogate(logps, behaviour, advantages, mask, 0.2)
    assert 0 < output.metrics["clipped"].sum() < mask.sum()
    for i, length in enumerate(mask.sum(1).tolist()):
        rows = [x[i, :length].tolist() for x in (logps, behaviour, advantages)]
        found = [float(x[i]) for x in (output.loss, *output.metrics.values())]
        assert found == pytest.approx(ref_ppo.clipped_surrogate(*rows, 0.2), rel=1e-12)


def test_identical_logps_have_ratio_one_and_clip_nothing():
    """As on the first minibatch of an update; the loss is minus the sum of advantages, its slope minus each."""
    logps, _, advantages, mask = surrogate_inputs()
    leaf = logps.clone().requires_grad_()
    output = clipped_surrogate(leaf, logps, advantages, mask, 0.2)
    assert output.metrics["ratio"].tolist() == mask.sum(1).tolist()
    assert not output.metrics["clipped"].any()
    assert not output.metrics["approx_kl"].any()
    output.loss.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.where(mask, -advantages, 0))


def test_surrogate_gradient_by_finite_differences_and_only_through_the_policy():
    logps, behaviour, advantages, mask = (x.requires_grad_(x.is_floating_point()) for x in surrogate_inputs())
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, behaviour, advantages, mask, 0.2).loss, (logps,))
    clipped_surrogate(logps, behaviour, advantages, mask, 0.2).loss.sum().backward()
    assert behaviour.grad is None
    assert advantages.grad is None


def test_clipped_tokens_pull_no_further_but_can_come_back():
    """Ratio 2 beyond 1.2: no gradient for a positive advantage, the full one (-A rho = 2) for a negative one."""
    logps = torch.full((1, 2), math.log(2), dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    clipped_surrogate(logps, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), mask, 0.2).loss.sum().backward()
    assert logps.grad[0].tolist() == pytest.approx([0.0, 2.0])


def test_far_out_ratios_and_masked_poison_keep_loss_and_gradient_finite():
    logps = torch.tensor([[200.0, 200.0, -200.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    output = clipped_surrogate(logps, torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 1.0, NAN]]), mask, 0.2)
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert logps.grad.isfinite().all()
    assert all(value.isfinite().all() for value in output.metrics.values())


def test_value_loss_by_hand():
    """Clip range 1, old values 0, targets 3. Values 2, -2, 4 are held at 1, -1, 1; a fourth token does not count.

    max((2-3)^2, (1-3)^2) + max((-2-3)^2, (-1-3)^2) + max((4-3)^2, (1-3)^2) = 4 + 25 + 4, halved 16.5; 1st and 3rd held
    """
    values = torch.tensor([[2.0, -2.0, 4.0, NAN]], requires_grad=True)
    zeros, targets = torch.zeros(1, 4), torch.full((1, 4), 3.0)
    mask = torch.tensor([[True, True, True, False]])
    output = clipped_value(values, zeros, targets, mask, clip_range=1.0)
    assert output.loss.tolist() == [16.5]
    assert output.metrics["clipped"].tolist() == [2.0]
    assert output.metrics["squared_error"].tolist() == [27.0]
    output.loss.sum().backward()
    assert values.grad.tolist() == [[0.0, -5.0, 0.0, 0.0]]
    plain = clipped_value(values, zeros, targets, mask, clip_range=None)
    assert plain.loss.tolist() == [13.5]
    assert plain.metrics["clipped"].tolist() == [0.0]


def test_value_loss_agrees_with_the_formula_and_keeps_streams_apart():
    g = torch.Generator().manual_seed(0)
    values, old, targets = torch.randn(3, 4, 5, 2, generator=g, dtype=torch.float64)
    mask = rollout(0, 4, 5)[2]
    output = clipped_value(values, old, targets, mask, 0.3)
    assert output.loss.shape == (4, 2)
    for (i, length), s in itertools.product(enumerate(mask.sum(1).tolist()), range(2)):
        rows = [x[i, :length, s].tolist() for x in (values, old, targets)]
        found = [float(output.loss[i, s]), float(output.metrics["clipped"][i, s])]
        assert found == pytest.approx(ref_ppo.clipped_value(*rows, 0.3), rel=1e-12)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_value(x, old, targets, mask, 0.3).loss, (values,))


def test_shapes_that_do_not_fit_are_refused():
    rewards, values, mask = rollout()
    with pytest.raises(ValueError, match=r"rewards' shape \(5, 6\), got \(5, 5\)"):
        gae(rewards, values[:, 1:], mask, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"mask must have shape \(5, 6\) .* got \(5, 5\)"):
        gae(rewards, values, mask[:, 1:], 1.0, 1.0)


# --- exact gradients: every outcome of a small policy, weighted by its probability ---


def test_gradient_on_a_categorical_is_the_analytic_policy_gradient():
    """For softmax(theta): d E[A] / d theta_i = p_i (A_i - E[A]); p = (1/2, 1/4, 1/4), A = (2, 0, 4), E[A] = 2."""
    theta = torch.tensor([2.0, 1.0, 1.0]).double().log().requires_grad_()
    logps = theta.log_softmax(0)[:, None]
    advantages = torch.tensor([[2.0], [0.0], [4.0]])
    loss = clipped_surrogate(logps, logps.detach(), advantages, torch.ones(3, 1, dtype=torch.bool), 0.2).loss
    (logps.detach().exp()[:, 0] * loss).sum().backward()
    assert theta.grad.tolist() == pytest.approx([0.0, 0.5, -0.5], abs=1e-12)


# All responses of at most three tokens over {0, 1, 2}, where 0 ends one.
RESPONSES = [y for t in (1, 2, 3) for y in itertools.product(range(3), repeat=t)
             if 0 not in y[:-1] and (y[-1] == 0 or t == 3)]  # fmt: skip


def tabular(table):
    """Log-probabilities [B, 3] of every response under a table of logits by (position, token before, token)."""
    ids = torch.tensor([y + (0,) * (3 - len(y)) for y in RESPONSES])
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in RESPONSES])
    before = torch.nn.functional.pad(ids[:, :-1], (1, 0))
    logps = table.log_softmax(-1)[torch.arange(3), before].gather(-1, ids[..., None])[..., 0]
    return torch.where(mask, logps, 0), mask, before


def exact_gradients(coefficient, seed=0):
    """Gradient of E[score] - coefficient KL for the table policy: through shaping, GAE and surrogate, and exact."""
    g = torch.Generator().manual_seed(seed)
    table, other, baseline = torch.randn(3, 3, 3, 3, generator=g, dtype=torch.float64)
    scores = torch.randn(len(RESPONSES), generator=g, dtype=torch.float64)
    logps, mask, before = tabular(table.requires_grad_())
    reference = tabular(other)[0]
    p = logps.sum(1).exp()
    assert float(p.detach().sum()) == pytest.approx(1.0)
    gain = p * (scores - coefficient * (logps - reference).sum(1))
    (exact,) = torch.autograd.grad(gain.sum(), table, retain_graph=True)
    rewards = terminal_rewards(scores, mask) + kl_rewards(logps, reference, mask, coefficient)
    advantages, _ = gae(rewards, baseline[0][torch.arange(3), before], mask, gamma=1.0, gae_lambda=1.0)
    loss = clipped_surrogate(logps, logps.detach(), advantages, mask, 0.2).loss
    (found,) = torch.autograd.grad((p.detach() * loss).sum(), table)
    return exact, found


@pytest.mark.parametrize("coefficient", [0.0, 0.7])
def test_ppo_as_a_whole_climbs_the_exact_gradient(coefficient):
    """Scores at the last token, k1 as reward, any baseline, lambda 1: d (E[score] - coefficient KL) / d theta."""
    exact, found = exact_gradients(coefficient)
    torch.testing.assert_close(-found, exact)


def kl_gradients(name):
    """Expected gradient of a KL estimate used as a loss, and the exact one, for the table policy."""
    g = torch.Generator().manual_seed(1)
    table, other = torch.randn(2, 3, 3, 3, generator=g, dtype=torch.float64)
    logps, mask, _ = tabular(table.requires_grad_())
    reference = tabular(other)[0]
    p = logps.sum(1).exp()
    (exact,) = torch.autograd.grad((p * (logps - reference).sum(1)).sum(), table, retain_graph=True)
    (found,) = torch.autograd.grad((p.detach() * kl_estimates(logps, reference, mask)[name]).sum(), table)
    return exact, found


def test_k1_as_a_loss_has_no_gradient_at_all():
    exact, found = kl_gradients("k1")
    torch.testing.assert_close(found, torch.zeros_like(found))
    assert exact.norm() > 0.1


def test_k3_as_a_loss_climbs_down_something_else():
    exact, found = kl_gradients("k3")
    assert (found - exact).norm() > 0.1 * exact.norm()


def test_k2_as_a_loss_has_it_for_single_tokens_only():
    """With E over p, d E[u] / d theta = E[u d log p]; but earlier tokens also decide which prefixes are seen."""
    theta = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    logps, reference = theta.log_softmax(0)[:, None], torch.tensor([0.2, 0.3, 0.5]).double().log()[:, None]
    p = logps.exp()[:, 0]
    (exact,) = torch.autograd.grad((p * (logps - reference)[:, 0]).sum(), theta, retain_graph=True)
    k2 = kl_estimates(logps, reference, torch.ones(3, 1, dtype=torch.bool))["k2"]
    torch.testing.assert_close(torch.autograd.grad((p.detach() * k2).sum(), theta)[0], exact)
    whole, found = kl_gradients("k2")
    assert (found - whole).norm() > 0.01 * whole.norm()


def test_k1_as_a_reward_has_the_gradient_of_the_kl():
    (plain, _), (penalised, found) = exact_gradients(0.0), exact_gradients(1.0)
    assert (plain - penalised).norm() > 0.1
    torch.testing.assert_close(-found, penalised)
