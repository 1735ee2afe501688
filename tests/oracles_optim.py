"""Second opinions on optimizers: one step of one tensor each, straight down, in numpy, from paper or specification.

Nothing here imports the library. Every function takes (p, g, s, t, hyper-parameters), reads and writes the tensor's
state `s` (keys are torch's names), and returns the new p; t is the optimizer's step count from 1. The arithmetic has
the precision of p.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray
State = dict[str, Any]


def fresh(p: Array) -> State:
    zero = np.zeros_like(p)
    scalars = ("step", "m_max_t", "m_norm_t", "v_norm_t", "exp_avg_weight", "exp_avg_sq_weight")
    weights = ("m_max_weight", "m_norm_weight", "v_norm_weight")
    second = ("exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
    moments = {name: zero.copy() for name in ("exp_avg", "momentum_buffer", *second)}
    return {**moments, **dict.fromkeys((*scalars, *weights), 0.0)}


def adamw(p, g, s, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
    """Loshchilov & Hutter's Algorithm 2; each average over its weight, 1 - beta**t while beta is constant."""
    b1, b2 = betas
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    s["exp_avg_weight"] = b1 * s["exp_avg_weight"] + (1 - b1)
    s["exp_avg_sq_weight"] = b2 * s["exp_avg_sq_weight"] + (1 - b2)
    s["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], s["exp_avg_sq"])
    v = s["max_exp_avg_sq"] if amsgrad else s["exp_avg_sq"]
    p = p - lr * weight_decay * p
    return p - lr * (s["exp_avg"] / s["exp_avg_weight"]) / (np.sqrt(v / s["exp_avg_sq_weight"]) + eps)


def spam_cosine(t, total_steps, eta_min):
    if total_steps is None:
        return 1.0
    return eta_min + (1 - eta_min) * (1 + math.cos(math.pi * t / (total_steps + 1))) / 2


def spam_clip(g, limit, peak):
    """A spike becomes its share of the largest one, times the limit."""
    return np.where(np.abs(g) > limit, g / np.where(peak > 0, peak, 1) * limit, g)


def stablespam_official(
    p, g, s, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, gamma1=0.7, gamma2=0.9,
    gamma3=0.999, reset_interval=1000, total_steps=None, eta_min=0.5,
):  # fmt: skip
    """What the released code does, from a description of it (commit 6a66da1): late resets, one counter k for all."""
    p = p * (1 - lr * weight_decay)
    if p.size == 0:
        return p
    cosine = spam_cosine(t, total_steps, eta_min)
    s["step"] += 1
    k = s["step"]
    with np.errstate(all="ignore"):
        peak = np.max(np.abs(g))
        s["m_max_t"] = gamma3 * s["m_max_t"] + (1 - gamma3) * peak
        g = spam_clip(g, s["m_max_t"] / (1 - gamma3**k), peak)
        norm = np.sqrt(np.sum(g * g))
        a = (betas[0] if gamma1 == -1 else gamma1) * cosine
        s["m_norm_t"] = a * s["m_norm_t"] + (1 - a) * norm
        s["v_norm_t"] = gamma2 * s["v_norm_t"] + (1 - gamma2) * norm * norm
        if norm > 0:
            g = g / norm * ((s["m_norm_t"] / (1 - a**k)) / (np.sqrt(s["v_norm_t"] / (1 - gamma2**k)) + eps))
        reset = reset_interval > 0 and t % reset_interval == 0
        if reset:
            k = s["step"] = 1
        b1, b2 = betas[0] * cosine, betas[1]
        m = b1 * s["exp_avg"] + (1 - b1) * g
        v = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
        s["exp_avg"], s["exp_avg_sq"] = (np.zeros_like(m), np.zeros_like(v)) if reset else (m, v)
        if amsgrad:
            v = s["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], v)
        return p - lr / (1 - b1**k) * m / (np.sqrt(v) / np.sqrt(1 - b2**k) + eps)


def stablespam_paper(
    p, g, s, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, gamma1=0.7, gamma2=0.9,
    gamma3=0.999, reset_interval=1000, total_steps=None, eta_min=0.5,
):  # fmt: skip
    """Algorithm 1 of arXiv 2502.17055v1: clip, normalize, reset, Adam. A bad gradient only lets a reset happen."""
    if reset_interval > 0 and t % reset_interval == 0:
        s.update({name: np.zeros_like(p) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")})
        s["exp_avg_weight"] = s["exp_avg_sq_weight"] = 0.0
    if p.size == 0 or not np.isfinite(g).all():
        return p
    cosine = spam_cosine(min(t, (total_steps or 0) + 1), total_steps, eta_min)

    def average(name, weight, value, gamma):
        s[name] = gamma * s[name] + (1 - gamma) * value
        s[weight] = gamma * s[weight] + (1 - gamma)
        return s[name] / s[weight]

    peak = np.max(np.abs(g))
    g = spam_clip(g, average("m_max_t", "m_max_weight", peak, gamma3), peak)
    norm = np.sqrt(np.sum(g * g))
    first = average("m_norm_t", "m_norm_weight", norm, (betas[0] if gamma1 == -1 else gamma1) * cosine)
    second = average("v_norm_t", "v_norm_weight", norm * norm, gamma2)
    if norm > 0:
        g = g / norm * (first / (np.sqrt(second) + eps))
    own = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
    return adamw(p, g, s, t, betas=(betas[0] * cosine, betas[1]), **own)


def sgd(p, g, s, t, *, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    """torch.optim.SGD: coupled decay, the first gradient whole, lr outside the buffer."""
    g = g + weight_decay * p
    s["momentum_buffer"] = g if t == 1 else momentum * s["momentum_buffer"] + (1 - dampening) * g
    return p - lr * (g + momentum * s["momentum_buffer"] if nesterov else s["momentum_buffer"])


def lion(p, g, s, t, *, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    """Algorithm 2 of arXiv 2302.06675."""
    b1, b2 = betas
    p = p * (1 - lr * weight_decay)
    p = p - lr * np.sign(b1 * s["exp_avg"] + (1 - b1) * g)
    s["exp_avg"] = b2 * s["exp_avg"] + (1 - b2) * g
    return p


def adams(p, g, s, t, *, lr=3e-4, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, bias_correction=True):
    """arXiv 2505.16363 from the specification of its released code: everything over this step's weight."""
    b1, b2 = betas
    s["exp_avg_weight"] = b1 * s["exp_avg_weight"] + (1 - b1)
    c = s["exp_avg_weight"] if bias_correction else 1.0
    p = p * (1 - lr * weight_decay)
    below = np.sqrt(b2 * (s["exp_avg"] / c) ** 2 + (1 - b2) * g**2) + eps
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    return p - lr * s["exp_avg"] / c / below


def spam_scale(t, reset_interval, warmup_steps):
    """The released code counts calls since a reset, from one more than the warm-up's length at the start."""
    since = t % reset_interval if reset_interval > 0 and t >= reset_interval else warmup_steps + 1
    if since >= warmup_steps:
        return 1.0
    return 1 - 0.99 * (1 + math.cos(math.pi * since / (warmup_steps + 1))) / 2


def spam_spikes(g, v, t, threshold, reset_interval, grace_steps, freeze):
    early = (t % reset_interval if reset_interval > 0 else t) < grace_steps
    if threshold == 0 or early:
        return g
    spike = (g * g > threshold * v) & ((v > 0) | freeze)
    return np.where(spike, np.sign(g) * np.sqrt(threshold * v), g)


def spam_paper(
    p, g, s, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, threshold=5000, reset_interval=500,
    warmup_steps=150, grace_steps=20,
):  # fmt: skip
    """Reset, clip, AdamW from a new start, at the warmed-up learning rate; the decay is not warmed up."""
    if reset_interval > 0 and t % reset_interval == 0:
        s["exp_avg"], s["exp_avg_sq"] = np.zeros_like(p), np.zeros_like(p)
        s["exp_avg_weight"] = s["exp_avg_sq_weight"] = 0.0
    g = spam_spikes(g, s["exp_avg_sq"], t, threshold, reset_interval, grace_steps, False)
    p = p - lr * weight_decay * p
    return adamw(p, g, s, t, lr=lr * spam_scale(t, reset_interval, warmup_steps), betas=betas, eps=eps, weight_decay=0)


def spam_official(
    p, g, s, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, threshold=5000, reset_interval=500,
    warmup_steps=150, grace_steps=20,
):  # fmt: skip
    """What the released code does, from a description of it (commit e8185fb)."""
    b1, b2 = betas
    s["step"] += 1
    k = s["step"]
    if reset_interval > 0 and t % reset_interval == 0:
        s["exp_avg"], s["exp_avg_sq"] = np.zeros_like(p), np.zeros_like(p)
    with np.errstate(all="ignore"):
        g = spam_spikes(g, s["exp_avg_sq"], t, threshold, reset_interval, grace_steps, True)
        s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
        s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
        step_size = lr * math.sqrt(1 - b2**k) / (1 - b1**k) * spam_scale(t, reset_interval, warmup_steps)
        p = p - step_size * s["exp_avg"] / (np.sqrt(s["exp_avg_sq"]) + eps)
        return p - lr * weight_decay * p
