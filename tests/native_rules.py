"""Rules outside the package, over rows, columns, groups and tensors, for comparing backends.

tests/test_measures.py says what vectors mean; these are put together so that two rules reach every kind of stage.
"""

from typing import ClassVar

from lowbit.optim import Moment, Rule, fold, measure, update
from lowbit.words import lerp, maximum, sqrt, where


@measure("mean", over="row")
def row_mean(g):
    return g * g


@fold("r n")
def keep_rows(x, r, c):
    return lerp(r, x, c.rate), x + c.eps


@measure("max", over="column")
def column_top(g, r, c):
    return g / (r + c.eps)


@fold("q")
def keep_columns(x, q, c):
    return maximum(q * c.keep, x)


@update("g")
def shrink(g, q, n, c):
    return g / (q + n + c.one)


@measure("sum", over="group")
def group_energy(g, v):
    return g * g + v


@fold("u")
def keep_groups(x, u, s, c):
    return lerp(u, x * s.gain, c.rate)


@measure("mean")
def mean_of_shrunk(g, u):
    return g * u


@fold
def remember(x, s, c):
    s.mean = lerp(s.mean, x, c.rate)
    s.gain = s.gain + s.mean


@measure("max", over="all")
def top_of_all(g, s):
    return g * s.gain


@fold
def top(x, s, c):
    s.top = maximum(s.top, x)


@update("p m v")
def follow(p, g, m, v, u, s, c):
    m = lerp(m, g, c.rate)
    v = lerp(v, c.one / (g * g + c.one), c.rate)  # largest where there is no gradient, and so beyond a row's end
    return p - c.lr * m / (sqrt(v) + u + s.top + c.eps), m, v


class Own(Rule):
    """A rule that lives outside the package."""

    def constants(self, group, t):
        return {"lr": group["lr"], "rate": 0.1, "eps": 1e-3, "one": 1.0, "keep": 0.9}

    def group_rows(self, group, name, shape, role):
        return 5


VALUES = {"m": Moment("exp_avg"), "v": Moment("exp_avg_sq", signed=False)}


class Vectors(Own):
    """Every kind of vector, five sweeps and one over all tensors."""

    moments: ClassVar = {
        **VALUES,
        "r": Moment("row", signed=False, over="row"),
        "q": Moment("column", signed=False, over="column"),
        "u": Moment("group", signed=False, over="group"),
    }
    scalars: ClassVar = {"mean": 0.0, "top": 0.0}
    temporaries: ClassVar = {"gain": 1.0}
    stages = (row_mean, keep_rows, column_top, keep_columns, shrink, group_energy, keep_groups, mean_of_shrunk,
              remember, top_of_all, top, follow)  # fmt: skip


@measure("max", over="row")
def row_top(g):
    return g


@fold("a")
def as_it_is(x):
    return x


@measure("mean", over="column")
def column_mean(g, a, c):
    return g / (a + c.eps)


@fold("b")
def column_scale(x, c):
    return where(x > 0, x, c.one)


@measure("max", over="group")
def group_top(m):
    return m


@fold("d")
def group_scale(x, c):
    return x + c.one


@update("p m v")
def loose(p, g, m, v, a, b, d, c):
    m = lerp(m, g * b, c.rate)
    v = maximum(v, g * g)
    return p - c.lr * m / (sqrt(v) + a + d), m, v


class Loose(Own):
    """Unguarded, with vectors of one step only."""

    guarded = False
    moments: ClassVar = VALUES
    stages = (row_top, as_it_is, column_mean, column_scale, group_top, group_scale, loose)
