"""Slow float64 NumPy versions of the mathematics of PPO and its constraints; one response at a time, sums written out.

A response is a list of T numbers a kind; it has no padding, so no masks.
"""

import math

import numpy as np


def gae(rewards, values, gamma, gae_lambda):
    """1506.02438 eq. 16: A_t = sum_l (gamma lambda)^l delta_{t+l}; the value after the last token is 0."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    decay = gamma * gae_lambda
    advantages = [sum(decay**k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def clipped_surrogate(logps, behaviour_logps, advantages, clip_range):
    """1707.06347 eq. 7, minus sign, summed over tokens; with the sums of ratio, clipped tokens and k2."""
    loss = ratios = clipped = k2 = 0.0
    for new, old, advantage in zip(logps, behaviour_logps, advantages, strict=True):
        ratio = math.exp(new - old)
        held = min(max(ratio, 1 - clip_range), 1 + clip_range)
        loss -= min(ratio * advantage, held * advantage)
        ratios += ratio
        clipped += held * advantage < ratio * advantage
        k2 += 0.5 * (new - old) ** 2
    return loss, ratios, clipped, k2


def clipped_value(values, old_values, targets, clip_range):
    """Half the larger of two squared errors, summed over tokens."""
    loss = clipped = 0.0
    for value, old, target in zip(values, old_values, targets, strict=True):
        held = min(max(value, old - clip_range), old + clip_range)
        loss += 0.5 * max((value - target) ** 2, (held - target) ** 2)
        clipped += (held - target) ** 2 > (value - target) ** 2
    return loss, clipped


def token_rewards(score, logps, reference_logps, coefficient):
    """1909.08593 eq. 2: the score at the last token, less the log-ratio at every one."""
    rewards = [-coefficient * (a - b) for a, b in zip(logps, reference_logps, strict=True)]
    rewards[-1] += score
    return rewards


def satisficing(scores, thresholds, weights):
    """2310.04373, PPO-SAT: - sum_i a_i (r_i - theta_i)^2 for one response."""
    return -sum(weights[name] * (scores[name] - thresholds[name]) ** 2 for name in thresholds)


def squash(sense, multiplier):
    """2310.04373: sigmoid for one-sided constraints, tanh for equalities."""
    return math.tanh(multiplier) if sense == "equal" else 1 / (1 + math.exp(-multiplier))


def multiplier_loss(senses, multipliers, values, thresholds):
    """2310.04373: sum_i s(mu_i) (vbar_i - theta_i), minimised over mu; "at most" turns the sign."""
    total = 0.0
    for sense, multiplier, value, threshold in zip(senses, multipliers, values, thresholds, strict=True):
        total += squash(sense, multiplier) * (value - threshold) * (-1 if sense == "at most" else 1)
    return total


def mixed_advantage(senses, task, advantages, weights):
    """2310.04373: (N - sum_i s_i) A_0 + sum_i s_i A_i for one token, A_i subtracted for "at most"."""
    mixed = (len(weights) - sum(weights)) * task
    for sense, advantage, weight in zip(senses, advantages, weights, strict=True):
        mixed += weight * (-advantage if sense == "at most" else advantage)
    return mixed


def pid(start, errors, kp, ki, kd):
    """2007.03964 algorithm 2 without projections: the multiplier after each error, written as a position."""
    found = []
    for n, error in enumerate(errors):
        before = errors[n - 1] if n else 0.0
        found.append(start + kp * error + ki * sum(errors[: n + 1]) + kd * (error - before))
    return np.array(found)


def nelder_mead(cost, simplex, iterations):
    """Nelder and Mead 1965 with 1, 2, 1/2, 1/2: minimise, and give every point asked for, in order."""
    asked = []

    def ask(point):
        asked.append(tuple(point))
        return cost(point)

    rows = sorted(((ask(p), np.array(p, np.float64)) for p in simplex), key=lambda row: row[0])
    for _ in range(iterations):
        (best, low), (worst, high) = rows[0], rows[-1]
        center = sum(p for _, p in rows[:-1]) / (len(rows) - 1)
        reflected = 2 * center - high
        value = ask(reflected)
        if value < best:
            expanded = 3 * center - 2 * high
            further = ask(expanded)
            rows[-1] = (further, expanded) if further < value else (value, reflected)
        elif value < rows[-2][0]:
            rows[-1] = (value, reflected)
        else:
            inside = value >= worst
            contracted = (center + high) / 2 if inside else (3 * center - high) / 2
            nearer = ask(contracted)
            if nearer < worst if inside else nearer <= value:
                rows[-1] = (nearer, contracted)
            else:
                rows = rows[:1] + [(ask(q), q) for q in ((low + p) / 2 for _, p in rows[1:])]
        rows.sort(key=lambda row: row[0])
    return asked
