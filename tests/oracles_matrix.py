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
