"""Slow float64 NumPy versions of the mathematics, written from the papers; one example at a time, loops in plain sight.

Notation of a pair: `w` and `l` are log-probabilities of the chosen and rejected response under the policy, `w0` and
`l0` under the reference, `nw` and `nl` their lengths in tokens.
"""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def token_logps(logits, labels):
    """Log softmax, row by row: logits [M, V], labels [M]."""
    found = []
    for row, label in zip(np.asarray(logits, np.float64), labels, strict=True):
        top = row.max()
        found.append(row[label] - top - math.log(sum(math.exp(v - top) for v in row)))
    return np.array(found)


def dpo(w, l, w0, l0, nw, nl, *, beta, label_smoothing=0.0):  # noqa: E741  # the paper's letters
    """2305.18290 eq. 7; smoothed, the expected loss when a share of labels is flipped."""
    u = beta * (w - w0) - beta * (l - l0)
    return (1 - label_smoothing) * -log_sigmoid(u) + label_smoothing * -log_sigmoid(-u)


def ipo(w, l, w0, l0, nw, nl, *, beta, convention="standard", length_average=False):  # noqa: E741
    """2310.12036 eq. 17 ("standard"), or g(u) = (u - 1)^2 of 2406.02900 ("daa")."""
    chosen, rejected = w - w0, l - l0
    if length_average:
        chosen, rejected = chosen / nw, rejected / nl
    if convention == "daa":
        return (beta * chosen - beta * rejected - 1) ** 2
    return (chosen - rejected - 0.5 / beta) ** 2


def slic(w, l, w0, l0, nw, nl, *, beta):  # noqa: E741
    """g(u) = max(0, 1 - u) of 2406.02900."""
    return max(0.0, 1 - (beta * (w - w0) - beta * (l - l0)))


def rdpo(w, l, w0, l0, nw, nl, *, beta, alpha):  # noqa: E741
    """Bradley-Terry on the implicit reward of a length-penalised objective: beta log-ratio + alpha length."""
    reward_w = beta * (w - w0) + alpha * nw
    reward_l = beta * (l - l0) + alpha * nl
    return -log_sigmoid(reward_w - reward_l)


def rpo(w, l, w0, l0, nw, nl, *, base, eta, reduction="sum", **arguments):  # noqa: E741
    """2405.16436: eta beta E[-log pi(y_w)] plus the base loss."""
    nll = -w if reduction == "sum" else -w / nw
    return eta * arguments["beta"] * nll + base(w, l, w0, l0, nw, nl, **arguments)


def bradley_terry(c, r, margin=0.0, centering=0.0, l2=0.0):
    """-log P(chosen beats rejected by `margin`), plus the two regularisers."""
    return -math.log(sigmoid(c - r - margin)) + centering * (c + r) ** 2 + l2 * 0.5 * (c**2 + r**2)


def kl_estimates(logps, reference_logps, mask):
    """k1, k2, k3 of one response, token by token."""
    total = {"k1": 0.0, "k2": 0.0, "k3": 0.0}
    for a, b, counts in zip(logps, reference_logps, mask, strict=True):
        if counts:
            u = a - b
            total["k1"] += u
            total["k2"] += u * u / 2
            total["k3"] += math.exp(-u) - 1 + u
    return total


def uncertainty_weighted(scores, coefficient, ddof=0):
    """2310.02743: mean less coefficient times variance of one response's K scores."""
    mean = sum(scores) / len(scores)
    return mean - coefficient * sum((r - mean) ** 2 for r in scores) / (len(scores) - ddof)


def scaling_law(kl, alpha, beta, form):
    """2210.10760: gold at each KL."""
    found = []
    for value in np.ravel(kl):
        d = math.sqrt(value)
        found.append(0.0 if d == 0 else d * (alpha - beta * (math.log(d) if form == "rl" else d)))
    return np.array(found).reshape(np.shape(kl))


def numeric_gradient(function, x, step=1e-5):
    """Central differences of a scalar function at a flat float64 array."""
    gradient = np.empty(len(x))
    for i in range(len(x)):
        up, down = np.array(x, np.float64), np.array(x, np.float64)
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up) - function(down)) / (2 * step)
    return gradient


def expected_calibration_error(margin, label, *, bins):
    """1706.04599 eq. 3 over the response that the model prefers; bins of equal width over [1/2, 1]."""
    found = 0.0
    for b in range(bins):
        confidences, rights = [], []
        for m, y in zip(margin, label, strict=True):
            p = max(sigmoid(m), sigmoid(-m))
            low, high = 0.5 + b / (2 * bins), 0.5 + (b + 1) / (2 * bins)
            if low <= p < high or (b == bins - 1 and p == 1):
                confidences.append(p)
                rights.append(y if m > 0 else 1 - y if m < 0 else 0.5)
        if rights:
            found += len(rights) / len(margin) * abs(np.mean(rights) - np.mean(confidences))
    return found
