"""Second opinions on optimizers with matrix stages, as in `oracles_optim`: numpy, straight down, from the papers."""

import numpy as np
from oracles_optim import adamw


def flat(x):
    return x.reshape(x.shape[0], -1)


def is_matrix(p):
    return p.ndim > 1 and p.size > 0 and min(flat(p).shape) > 1


def quintic(x, steps=5):
    """Jordan's polynomial on the singular values themselves, which is what the iteration computes."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / (np.sqrt(np.sum(s * s)) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def muon(p, g, s, t, *, lr, momentum=0.95, nesterov=True, weight_decay=0.0, aux_lr=3e-4, betas=(0.9, 0.95), eps=1e-10):
    """The algorithm box of the Muon page; AdamW for what is no matrix. A bad gradient leaves a matrix alone."""
    if not is_matrix(p):
        return adamw(p, g, s, t, lr=aux_lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if not np.isfinite(g).all():
        return p
    m = s["momentum_buffer"] = momentum * s["momentum_buffer"] + (1 - momentum) * g
    u = flat((1 - momentum) * g + momentum * m if nesterov else m)
    rows, cols = u.shape
    o = quintic(u) * np.sqrt(max(1, rows / cols))
    return p * (1 - lr * weight_decay) - lr * o.reshape(p.shape)


def hf_adam(g, s, betas, eps):
    """Adam's direction before debiasing, and what debiases it, as Hugging Face's AdamW had it."""
    b1, b2 = betas
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    s["exp_avg_weight"] = b1 * s["exp_avg_weight"] + (1 - b1)
    s["exp_avg_sq_weight"] = b2 * s["exp_avg_sq_weight"] + (1 - b2)
    return s["exp_avg"] / (np.sqrt(s["exp_avg_sq"]) + eps), np.sqrt(s["exp_avg_sq_weight"]) / s["exp_avg_weight"]


def limited(e, s):
    """Growth of the norm by 1 % at most."""
    norm = np.sqrt(np.sum(e * e))
    if s["limited_norm"] > 0:
        by = max(norm / (s["limited_norm"] + 1e-8), 1.01) / 1.01
        e, norm = e / by, norm / by
    s["limited_norm"] = norm
    return e


def projected(name):
    """GaLore, Fira and APOLLO, in the coordinates of a matrix that is wide (a tall one is transposed)."""

    def step(
        p, g, s, t, *, lr, rank, update_interval, scale, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0,
        official=True, whole=False, front=False,
    ):  # fmt: skip
        if not is_matrix(p) or rank >= min(flat(p).shape):
            n, debias = hf_adam(g, s, betas, eps)
            p = p - lr * debias * n
            return p - lr * weight_decay * p
        if not np.isfinite(g).all():
            return p
        tall = flat(g).shape[0] >= flat(g).shape[1]
        turn = (lambda x: flat(x).T) if tall else flat
        g = turn(g)
        if "projector" not in s or (t - 1) % update_interval == 0:
            s["projector"] = np.linalg.svd(g, full_matrices=False)[0][:, :rank].T
        q = s["projector"]
        r = q @ g
        if t == 1:
            s["exp_avg"] = s["exp_avg_sq"] = np.zeros_like(r)
            s["limited_norm"] = 0.0
        n, debias = hf_adam(r, s, betas, eps)
        channel = np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
        if name == "galore":
            u = scale * q.T @ n
        elif name == "fira":
            u = scale * q.T @ n + limited((g - (scale if official else 1) * q.T @ r) * channel, s)
        else:
            share = np.linalg.norm(n) / (np.linalg.norm(r) + 1e-8) if whole else channel
            u = limited(g * share * (scale**0.5 if front else 1), s) * (1 if front else scale**0.5)
        p = p - lr * debias * (u.T if tall else u).reshape(p.shape)
        return p - lr * weight_decay * p

    return step


galore, fira, apollo = map(projected, ("galore", "fira", "apollo"))


def swan(p, g, s, t, *, lr, weight_decay=0.0, ns_steps=10, betas=(0.9, 0.999), eps=1e-8):
    """Normalized rows, whitened by the iteration's polynomial on the singular values, as long as before."""
    if not is_matrix(p):
        return adamw(p, g, s, t, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if not np.isfinite(g).all():
        return p
    x = flat(g) / max(np.abs(g).max(), 1e-300)
    x = x - x.mean(1, keepdims=True)
    x = x / np.maximum(x.std(1, keepdims=True), 1e-6)
    u, values, vt = np.linalg.svd(x, full_matrices=False)
    values = values / np.linalg.norm(x)
    for _ in range(ns_steps):
        values = (15 * values - 10 * values**3 + 3 * values**5) / 8
    o = (u * values) @ vt
    o = o * np.linalg.norm(x) / np.linalg.norm(o)
    return p * (1 - lr * weight_decay) - lr * o.reshape(p.shape)


def adapm(p, g, s, t, *, lr, rank, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """The reconstruction, with factors found by SVD of M itself where the library takes one step towards it."""
    if not is_matrix(p) or rank >= min(flat(p).shape):
        return adamw(p, g, s, t, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    b1, b2 = betas
    whole = b1 * (s["exp_avg_left"].T @ s["exp_avg_right"] if t > 1 else 0) + (1 - b1) * flat(g)
    q = np.linalg.svd(whole, full_matrices=False)[0][:, :rank]
    if t > 1:
        q = np.linalg.qr(whole @ s["exp_avg_right"].T)[0]
    s["exp_avg_left"], s["exp_avg_right"] = q.T, q.T @ whole
    kept = q @ q.T @ whole
    s["exp_avg_weight"] = b1 * s["exp_avg_weight"] + (1 - b1)
    s["exp_avg_sq_weight"] = b2 * s["exp_avg_sq_weight"] + (1 - b2)
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    m = (kept / s["exp_avg_weight"] + (whole - kept) / (1 - b1)).reshape(p.shape)
    v = s["exp_avg_sq"] / s["exp_avg_sq_weight"]
    return p * (1 - lr * weight_decay) - lr * m / (np.sqrt(v) + eps)
