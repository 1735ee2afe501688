"""Second opinions on optimizers with one second moment for many values; see oracles_optim for how they are called.

A vector stands here as an array of the parameter's shape, with each number at every value that it is for.
"""

import numpy as np
from oracles_optim import adamw, spam_clip


def over(x, axis):
    """The mean, at every value: of rows (1), columns (0), everything (None), or groups of rows (-n)."""
    if x.size == 0 or x.ndim == 0:
        return x
    rows = x.reshape(len(x), -1)
    if axis is None:
        return np.full_like(x, x.mean())
    if axis < 0:
        parts = [rows[at : at - axis] for at in range(0, len(rows), -axis)]
        return np.concatenate([np.full_like(part, part.mean()) for part in parts]).reshape(x.shape)
    return np.broadcast_to(rows.mean(axis, keepdims=True), rows.shape).reshape(x.shape).copy()


def shared(p, g, s, mean, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """AdamW with v an average of `mean(g * g)`; vectors are not decayed."""
    b1, b2 = betas
    p = p - lr * (weight_decay if p.ndim > 1 else 0) * p
    for name, value, b in (("exp_avg", g, b1), ("exp_avg_sq", mean(g * g), b2)):
        s[name] = b * s[name] + (1 - b) * value
        s[f"{name}_weight"] = b * s[f"{name}_weight"] + (1 - b)
    v = s["exp_avg_sq"] / s["exp_avg_sq_weight"]
    return p - lr * (s["exp_avg"] / s["exp_avg_weight"]) / (np.sqrt(v) + eps)


def adam_mini(p, g, s, t, *, axis=1, **hyper):
    """Algorithm 1 of arXiv 2406.16793 with a number per row (or group of rows); vectors are Adam's."""
    return shared(p, g, s, lambda x: over(x, axis) if p.ndim > 1 else x, **hyper)


def adam_mini_tensor(p, g, s, t, **hyper):
    """The same with one number per tensor, vectors included."""
    return shared(p, g, s, lambda x: over(x, None), **hyper)


def slim_adam_column(p, g, s, t, **hyper):
    """SlimAdam with K = 0 for every tensor."""
    return shared(p, g, s, lambda x: over(x, 0), **hyper)


def adafactor(
    p, g, s, t, *, lr=1e-3, weight_decay=0.0, beta1=None, scale_parameter=False, relative_step=False, eps=1e-30
):
    """Algorithms 4 and 5 of arXiv 1804.04235, with transformers' decay of the parameter."""
    if p.size == 0:
        return p
    rate = t**-0.8
    lr = min(lr, 1 / np.sqrt(t)) if relative_step else lr
    if scale_parameter:
        lr = lr * max(1e-3, np.sqrt(np.mean(p * p)))
    square = g * g + eps
    s["exp_avg_sq_weight"] = s["exp_avg_sq_weight"] * (1 - rate) + rate
    if p.ndim > 1:
        s["exp_avg_sq_row"] = s["exp_avg_sq_row"] * (1 - rate) + rate * over(square, 1)
        s["exp_avg_sq_col"] = s["exp_avg_sq_col"] * (1 - rate) + rate * over(square, 0)
        second = s["exp_avg_sq_row"] / s["exp_avg_sq_row"].mean() * s["exp_avg_sq_col"]
    else:
        second = s["exp_avg_sq"] = s["exp_avg_sq"] * (1 - rate) + rate * square
    u = g / np.sqrt(second / s["exp_avg_sq_weight"])
    u = lr * u / max(1.0, np.sqrt(np.mean(u * u)))
    if beta1 is not None:
        u = s["exp_avg"] = beta1 * s["exp_avg"] + (1 - beta1) * u
    return p - weight_decay * lr * p - u


def normalized(p, u, axis, lr, weight_decay, norm):
    count = {1: np.prod(p.shape[1:]), 0: p.shape[0]}[axis]
    size = np.sqrt(over(u * u, axis) * (count if norm == "l2" else 1))
    return p - lr * weight_decay * p - lr * u / np.maximum(size, 1e-8)


def scale(
    p, g, s, t, *, lr=1e-3, scalar_lr=None, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, norm="rms", axis=1,
    at=1e-3, momentum=0.9,
):  # fmt: skip
    """Algorithm 1 of arXiv 2506.16659 without momentum; vectors: Adam, eps before debiasing, a rate that began `at`."""
    if p.ndim > 1:
        return normalized(p, g, axis, lr, weight_decay, norm)
    rate = lr if scalar_lr is None else scalar_lr * lr / at
    eps = eps / np.sqrt(betas[1] * s["exp_avg_sq_weight"] + 1 - betas[1])
    return adamw(p, g, s, t, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay)


def scale_head(p, g, s, t, *, lr=1e-3, momentum=0.9, weight_decay=0.0, norm="rms", **hyper):
    """The same for the last layer."""
    if p.ndim < 2:
        return scale(p, g, s, t, lr=lr, weight_decay=weight_decay, **hyper)
    s["exp_avg"] = momentum * s["exp_avg"] + (1 - momentum) * g
    return normalized(p, s["exp_avg"], 1, lr, weight_decay, norm)


def stabilized(g, s, *, eps=1e-8, gamma1=0.7, gamma2=0.9, gamma3=0.999):
    """AdaClip and AdaGN of arXiv 2502.17055v1, as a gradient for any optimizer; averages start in their first step."""

    def average(name, value, gamma):
        s[name] = gamma * s.get(name, 0.0) + (1 - gamma) * value
        s[f"{name} weight"] = gamma * s.get(f"{name} weight", 0.0) + (1 - gamma)
        return s[name] / s[f"{name} weight"]

    peak = np.max(np.abs(g))
    g = spam_clip(g, average("peak", peak, gamma3), peak)
    norm = np.sqrt(np.sum(g * g))
    first, second = average("norm", norm, gamma1), average("energy", norm * norm, gamma2)
    return g / norm * (first / (np.sqrt(second) + eps)) if norm > 0 else g
