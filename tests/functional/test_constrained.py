"""Constraints: values by hand, against the formulas, and a bandit whose constrained optimum is known."""

import dataclasses
import inspect
import math

import pytest
import torch
from jsonargparse import ArgumentParser

from lit_rlhf.errors import UserError
from lit_rlhf.functional.constrained import (
    AtLeast,
    AtMost,
    Constraint,
    Equal,
    mixed_advantage,
    multiplier_gradient,
    reached,
    reward_minus_cost,
    squash,
)
from lit_rlhf.functional.control import PID, MomentumSGD
from lit_rlhf.functional.policy_gradient import clipped_surrogate, gae
from lit_rlhf.functional.shaping import kl_rewards, terminal_rewards
from lit_rlhf.specs import build, plain
from tests import reference as ref
from tests import reference_ppo as ref_ppo

# constraint at threshold 2; its sense; error and violation at 1.5 and at 2.5; weight at multiplier ln 2
# sigmoid(ln 2) = 2/3; tanh(ln 2) = (2 - 1/2) / (2 + 1/2) = 3/5
CASES = [
    (AtLeast("a", 2.0), "at least", (0.5, 0.5), (-0.5, 0.0), 2 / 3),
    (AtMost("a", 2.0), "at most", (-0.5, 0.0), (0.5, 0.5), 2 / 3),
    (Equal("a", 2.0), "equal", (0.5, 0.5), (-0.5, 0.5), 3 / 5),
]
CONSTRAINTS = [case[0] for case in CASES]
SENSES = {type(case[0]): case[1] for case in CASES}
each_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)


@pytest.mark.parametrize(("constraint", "sense", "below", "above", "weight"), CASES, ids=repr)
def test_values_by_hand(constraint, sense, below, above, weight):
    assert (constraint.error(1.5), constraint.violation(1.5)) == below
    assert (constraint.error(2.5), constraint.violation(2.5)) == above
    assert float(constraint.weight(torch.tensor(math.log(2)))) == pytest.approx(weight)
    assert float(constraint.weight(torch.tensor(0.3))) == pytest.approx(ref_ppo.squash(sense, 0.3))


def test_every_constraint_has_a_row():
    assert {type(c) for c in CONSTRAINTS} == {c for c in Constraint.__subclasses__() if not inspect.isabstract(c)}


@each_constraint
def test_frozen_and_brought_back_by_configs_and_checkpoints(constraint):
    with pytest.raises(dataclasses.FrozenInstanceError):
        constraint.threshold = 0.0
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--constraints", type=list[Constraint])
    config = parser.parse_object({"constraints": [plain(constraint)]})
    assert parser.instantiate(config).constraints == [constraint] == [build(plain(constraint), Constraint)]


@each_constraint
@pytest.mark.parametrize("multiplier", [-2.0, 0.0, 0.5])
def test_multiplier_moves_the_right_way(constraint, multiplier):
    """Up while the value is on the wrong side, down on the other; for an equality up below and down above."""
    mu = torch.tensor([multiplier])
    below = float(multiplier_gradient([constraint], mu, [1.5]))
    above = float(multiplier_gradient([constraint], mu, [2.5]))
    at = float(multiplier_gradient([constraint], mu, [2.0]))
    assert (below < 0 < above) if isinstance(constraint, AtMost) else (above < 0 < below)
    assert at == 0


@each_constraint
def test_one_step_turns_the_policy_towards_the_threshold(constraint):
    """After a step of the multiplier, what the stream's advantage is multiplied by pushes the value to the threshold.

    A one-sided constraint that is kept is only pushed less hard.
    """
    start = torch.zeros(1)
    for value in (1.5, 2.5):
        moved, _ = MomentumSGD().step(start, torch.zeros(1, 1), multiplier_gradient([constraint], start, [value]))
        before, after = (constraint.sign * float(constraint.weight(mu)) for mu in (start[0], moved[0]))
        assert (after > before) == (value < 2)


def test_multiplier_gradient_is_minus_the_gradient_of_the_papers_loss():
    multipliers, values = [0.4, -1.2, 0.7], [1.0, 2.5, -0.3]
    found = multiplier_gradient(CONSTRAINTS, torch.tensor(multipliers).double(), values)
    senses = [SENSES[type(c)] for c in CONSTRAINTS]
    slope = ref.numeric_gradient(lambda mu: ref_ppo.multiplier_loss(senses, mu, values, [2.0] * 3), multipliers)
    assert found.tolist() == pytest.approx((-slope).tolist(), rel=1e-7)


def test_exponentiated_multiplier_moves_by_lambda_times_error():
    """Lambda = exp(ln 3) = 3, error of a cost of 2.5 above "at most 2" = 1/2: 3/2."""
    found = multiplier_gradient([AtMost("a", 2.0)], torch.tensor([math.log(3)]), [2.5], "reward_minus_cost")
    assert found.tolist() == pytest.approx([1.5])


def test_multiplier_gradient_leaves_no_graph_behind_and_works_without_one():
    mu = torch.zeros(1, requires_grad=True)
    with torch.no_grad():
        assert not multiplier_gradient([Equal("a", 1.0)], mu, [0.0]).requires_grad
    assert mu.grad is None


def test_mixed_advantage_by_hand():
    """C = 2, weights 1/4 and 1/2: (2 - 3/4) * 4 + 1/4 * 8 - 1/2 * 6 = 5 + 2 - 3 = 4."""
    mixed = mixed_advantage(
        torch.tensor([[4.0]]), torch.tensor([[[8.0, 6.0]]]), torch.tensor([0.25, 0.5]), torch.tensor([1, -1])
    )
    assert mixed.tolist() == [[4.0]]


def test_mixed_advantage_agrees_with_the_formula():
    g = torch.Generator().manual_seed(0)
    advantages = torch.randn(2, 4, 4, generator=g, dtype=torch.float64)
    mu = torch.randn(3, generator=g, dtype=torch.float64)
    weights, signs = squash(CONSTRAINTS, mu), torch.tensor([c.sign for c in CONSTRAINTS])
    found = mixed_advantage(advantages[..., 0], advantages[..., 1:], weights, signs)
    for row, mixed in zip(advantages.flatten(0, 1).tolist(), found.flatten().tolist(), strict=True):
        expected = ref_ppo.mixed_advantage([SENSES[type(c)] for c in CONSTRAINTS], row[0], row[1:], weights.tolist())
        assert mixed == pytest.approx(expected, rel=1e-12)


def test_mixed_advantage_refuses_weights_for_other_constraints():
    with pytest.raises(ValueError, match=r"\(3,\), \(2,\)"):
        mixed_advantage(torch.zeros(1, 2), torch.zeros(1, 2, 2), torch.zeros(3), torch.zeros(2))


def test_reward_minus_cost_by_hand_and_far_out():
    """Lambda 3: (4 - 3 * 8) / 4 = -5. At mu = +-1000 only the cost, only the task."""
    task, cost = torch.tensor([[4.0]]), torch.tensor([[8.0]])
    assert reward_minus_cost(task, cost, torch.tensor(math.log(3))).tolist() == [[pytest.approx(-5.0)]]
    assert reward_minus_cost(task, cost, torch.tensor(1000.0)).tolist() == [[-8.0]]
    assert reward_minus_cost(task, cost, torch.tensor(-1000.0)).tolist() == [[4.0]]


@pytest.mark.parametrize("multiplier", [-3.0, 0.0, 3.0])
def test_total_weight_of_the_kl_does_not_depend_on_the_multiplier(multiplier):
    """A KL charged to reward (-KL) and cost (+KL) in full comes out as -KL."""
    kl = torch.tensor([[0.3, 1.0]])
    assert reward_minus_cost(-kl, kl, torch.tensor(multiplier)).flatten().tolist() == pytest.approx([-0.3, -1.0])


@pytest.mark.parametrize(
    ("value", "threshold", "start", "expected"),
    [
        (1.9, 2.0, 0.0, True),  # 0.1 of a way of 2: 5 %
        (2.1, 2.0, 0.0, True),
        (1.89, 2.0, 0.0, False),
        (-1.9, -2.0, 0.0, True),
        (9.89, 10.0, 8.0, False),  # 0.11 of a way of 2, though 1 % of the threshold
        (0.0, 0.0, 0.0, True),
    ],
)
def test_reached_is_a_share_of_the_way_from_the_start(value, threshold, start, expected):
    assert reached(value, threshold, start, tolerance=0.05 + 1e-9) is expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AtMost("", 1.0), "AtMost: name must be that of a reward, got ''"),
        (lambda: Equal("a", math.nan), "Equal a: threshold must be finite, got nan"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --- a bandit with a known answer ---
# Four arms with two rewards each; the task is closeness to the uniform policy. The optimum of
# max -KL + sum_i lambda_i sign_i (E[r_i] - threshold_i) is a softmax of sum_i lambda_i sign_i r_i, so that thresholds
# taken from that softmax have the multipliers lambda. The policy is in the same place when the mix weighs
# w_i / (C - sum w) = lambda_i.
ARMS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.3, -1.0]], dtype=torch.float64)


def values_at(*strengths):
    """Rewards' means under the softmax of sum_i strengths_i r_i."""
    pushes = torch.tensor([*strengths, 0.0, 0.0][:2], dtype=torch.float64)
    return ((ARMS @ pushes).softmax(0) @ ARMS).tolist()


def sgd(lr):
    """Without the paper's limit on the norm, which only takes longer."""
    return MomentumSGD(lr=lr, momentum=0.1, max_norm=math.inf, bound=20.0)


def train(constraints, advantage, control, form="mixed", steps=300):
    """Policy gradient with all arms weighted by their probability: what the values and multipliers come to."""
    arms, c = len(ARMS), len(constraints)
    logits = torch.zeros(arms, dtype=torch.float64, requires_grad=True)
    reference = torch.zeros(arms, 1, dtype=torch.float64).log_softmax(0)
    multipliers, memory = torch.zeros(c).double(), torch.zeros(c, control.memory_size).double()
    mask, history = torch.ones(arms, 1, dtype=torch.bool), []
    for _ in range(steps):
        logps = logits.log_softmax(0)[:, None]
        p = logps.detach().exp()
        kl = kl_rewards(logps, reference, mask, 1.0)
        rewards = torch.stack([kl, *(terminal_rewards(ARMS[:, i], mask) for i in range(c))], -1)
        baseline = (p[..., None] * rewards).sum(0).expand_as(rewards)
        advantages, _ = gae(rewards, baseline, mask, gamma=1.0, gae_lambda=1.0)
        mixed = advantage(advantages, multipliers)
        loss = (p[:, 0] * clipped_surrogate(logps, logps.detach(), mixed, mask, 0.2).loss).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= gradient
        values = (p[:, 0] @ ARMS[:, :c]).tolist()
        ascent = multiplier_gradient(constraints, multipliers, values, form)
        multipliers, memory = control.step(multipliers, memory, ascent)
        history.append(values)
    return history, multipliers


def mix(constraints):
    signs = torch.tensor([c.sign for c in constraints])
    return lambda a, mu: mixed_advantage(a[..., 0], a[..., 1:], squash(constraints, mu), signs)


def strengths(constraints, multipliers):
    weights = squash(constraints, multipliers)
    return (weights / (len(weights) - weights.sum())).tolist()


@pytest.mark.parametrize(
    ("senses", "pushes", "lr"),
    [
        ((Equal,), (0.6,), 0.3),
        ((Equal,), (-0.4,), 0.3),  # the equality may push down: weight tanh(mu) < 0
        ((AtLeast,), (1.5,), 1.0),  # alone, the task's weight is 1 - w and any ratio can be had
        ((AtMost,), (1.5,), 1.0),
        ((Equal, Equal), (0.5, -0.3), 1.0),
        ((AtLeast, AtLeast), (0.7, 0.4), 2.0),
        ((AtMost, AtLeast), (0.4, 0.7), 2.0),
    ],
    ids=lambda x: "+".join(str(getattr(y, "__name__", y)) for y in x) if isinstance(x, tuple) else str(x),
)
def test_bandit_finds_the_constrained_optimum_and_its_multipliers(senses, pushes, lr):
    thresholds = values_at(*(kind.sign * push for kind, push in zip(senses, pushes, strict=True)))
    constraints = [kind(f"r{i}", thresholds[i]) for i, kind in enumerate(senses)]
    history, multipliers = train(constraints, mix(constraints), sgd(lr))
    assert history[-1] == pytest.approx(thresholds[: len(senses)], abs=1e-4)
    assert strengths(constraints, multipliers) == pytest.approx(list(pushes), abs=1e-3)


def test_a_constraint_that_holds_anyway_is_left_alone():
    """The second threshold is far below what the first one's optimum gives: its weight goes to 0."""
    thresholds = values_at(0.5)
    constraints = [AtLeast("r0", thresholds[0]), AtLeast("r1", thresholds[1] - 5)]
    history, multipliers = train(constraints, mix(constraints), sgd(1.0))
    assert history[-1][0] == pytest.approx(thresholds[0], abs=1e-4)
    assert strengths(constraints, multipliers) == pytest.approx([0.5, 0.0], abs=1e-3)


def test_one_active_constraint_of_two_weighs_at_most_as_much_as_the_task():
    """The threshold needs a multiplier of 1.5, but w / (2 - w) stays below 1 / (2 - 1): it is not reached."""
    thresholds = values_at(1.5)
    constraints = [AtLeast("r0", thresholds[0]), AtLeast("r1", thresholds[1] - 5)]
    history, multipliers = train(constraints, mix(constraints), sgd(1.0))
    assert 0.9 < strengths(constraints, multipliers)[0] < 1
    assert values_at(0.9)[0] < history[-1][0] < values_at(1.0)[0] < thresholds[0]


def test_reward_minus_cost_finds_the_known_lambda():
    """With lambda 2 and the KL charged to both: (r - KL - 2 (c + KL)) / 3, a softmax of r / 3 - 2 c / 3."""
    thresholds = values_at(1 / 3, -2 / 3)
    # The reward needs a place among the constraints of `train`; its multiplier is not used.
    constraints = [AtMost("reward", 5.0), AtMost("cost", thresholds[1])]

    def advantage(a, mu):
        return reward_minus_cost(a[..., 0] + a[..., 1], a[..., 2] - a[..., 0], mu[1])

    history, multipliers = train(constraints, advantage, sgd(0.3), form="reward_minus_cost")
    assert history[-1] == pytest.approx(thresholds, abs=1e-4)
    assert float(multipliers[1].exp()) == pytest.approx(2.0, abs=1e-3)


def test_a_proportional_term_stills_the_swing_of_integral_control():
    """At the same integral gain; the swing is the largest distance to the threshold in the second half."""
    threshold = values_at(0.6)[0]
    constraints, swings = [Equal("r0", threshold)], []
    for control in (PID(kp=0.0, ki=1.5), PID(kp=1.5, ki=1.5)):
        history, multipliers = train(constraints, mix(constraints), control)
        swings.append(max(abs(value - threshold) for (value,) in history[150:]))
    assert swings[0] > 0.1
    assert swings[1] < 1e-4
    assert strengths(constraints, multipliers) == pytest.approx([0.6], abs=1e-3)
