"""Threshold rules in float64 NumPy, one norm after the other, from their formulas.

Each is a generator: it is sent a norm and yields the limit of that norm. The floor of
1% for a relative standard deviation, and that norms of zero enter nowhere, are ours.
"""

import numpy as np
from all_methods import clipped_norms


def limits(rule, norms):
    """The limit of each norm."""
    next(rule)
    return np.array([rule.send(float(n)) for n in norms])


def assert_clips_by(clipper, rule):
    """A method clips as its rule says: noise, zeros, a spike, and a new level."""
    norms = np.exp(np.random.default_rng(0).normal(scale=0.5, size=120))
    norms[[0, 20]], norms[30] = 0, 1e6
    norms[60:] *= 30
    norms = norms.astype(np.float32)
    wanted = norms.astype(np.float64)
    wanted[norms > 0] = np.fmin(wanted[norms > 0], limits(rule, norms[norms > 0]))
    np.testing.assert_allclose(clipped_norms(clipper, norms), wanted, rtol=1e-5)


def zscore_ema(
    z=2.5,
    decay=0.97,
    warmup=25,
    target="threshold",
    factor=1.0,
    stats="clipped",
    patience=50,
):
    """ZClip: mean and variance of a warm-up, then moving averages."""
    first, mean, var, refused, limit = [], 0.0, 0.0, 0, None
    while True:
        n = yield limit
        if n == 0:
            limit = np.inf if len(first) < warmup else limit
            continue
        if len(first) < warmup:
            first.append(n)
            mean, var = np.mean(first), np.var(first)
            limit = np.inf
            continue
        sd = max(np.sqrt(var), 0.01 * mean)
        limit = mean + z * sd
        over = n > limit
        refused = refused + 1 if over else 0
        if over and patience and refused >= patience:
            refused, var, mean, limit = 0, var * (n / mean) ** 2, n, np.inf
            over = False
        elif over:
            score = (n - mean) / sd
            limit = {
                "threshold": limit,
                "mean": mean,
                "reciprocal": factor * (mean + z * z / score * sd),
            }[target]
        if over and stats == "skip":
            continue
        x = min(limit, n) if over and stats == "clipped" else n
        mean = decay * mean + (1 - decay) * x
        var = decay * var + (1 - decay) * (x - mean) ** 2


def zscore_window(z=3.0, window=16, warmup=8, stats="raw"):
    """Levanter: mean and deviation of the last norms."""
    kept, limit = [], None
    while True:
        n = yield limit
        if n == 0:
            continue
        limit = np.inf
        if len(kept) >= warmup:
            last = kept[-window:]
            limit = np.mean(last) + z * max(np.std(last), 0.01 * np.mean(last))
        if n > limit and stats == "skip":
            continue
        kept.append(min(n, limit) if stats == "clipped" else n)


def log_zscore(z=2.0, decay=0.95):
    """Chorowski et al.: moments of the logarithm, the norm itself included."""
    t, m, s, limit = 0, 0.0, 0.0, None
    while True:
        n = yield limit
        if n == 0:
            continue
        b = min(decay, t / (t + 1))
        t += 1
        m, s = b * m + (1 - b) * np.log(n), b * s + (1 - b) * np.log(n) ** 2
        d = max(np.sqrt(max(s - m * m, 0)), 0.01)
        limit = np.exp(m) if np.log(n) > m + z * d else np.exp(m + z * d)


def percentile(q=0.1, size=10**9):
    """AutoClip: the quantile of all norms, or of the last ones."""
    kept, limit = [], None
    while True:
        n = yield limit
        if n == 0:
            continue
        kept.append(n)
        limit = np.quantile(kept[-size:], q)


def tracker(q=0.9, eta=0.02):
    """Andrew et al.: a factor up or down."""
    c, limit = None, None
    while True:
        n = yield limit
        if n == 0:
            continue
        limit = c = n if c is None else c
        c = c * np.exp(-eta * ((n <= c) - q))


def auto():
    """A fraction of the median of the first norms, which falls with the usual norm."""
    first, usual, k, far, limit = [], None, 0, 0, None
    while True:
        n = yield limit
        if n == 0:
            continue
        if far == 50:
            first, k, far = [], 0, 0
        k += 1
        usual = n if k == 1 else usual
        first = [*first, n][:10]
        median = sorted(first)[(len(first) - 1) // 2]
        far = far + 1 if n > 30 * median else 0
        limit = 0.8 * min((0.3 + 0.7 * min(k / 100, 1)) * median, 10 * usual)
        pace = max(0.02, 1 / (k + 1)) / 2
        usual = usual * np.exp(pace if n > usual else -pace)


def ema_ratio(
    ratio=1.04,
    decay=0.99,
    warmup=0,
    warmup_limit=None,
    init="first",
    floor=0.0,
    stats="clipped",
    patience=None,
):
    """AdaGC and OLMo, for one norm."""
    t, g, refused, limit = 0, None, 0, None
    while True:
        n = yield limit
        if n == 0:
            continue
        t += 1
        if t <= warmup:
            limit = np.inf
            if warmup_limit is not None and n > warmup_limit:
                limit = warmup_limit
            x = min(n, limit)
            if init == "min":
                g = x if g is None else min(g, x)
            elif init == "mean":
                g = x if g is None else g + (x - g) / t
            continue
        start = g is None
        g = n if start else g
        limit = ratio * max(g, floor)
        over = n > limit
        refused = refused + 1 if over else 0
        if over and patience and refused >= patience:
            g, refused, limit = n, 0, np.inf
            continue
        if start or (over and stats == "skip"):
            continue
        g = decay * g + (1 - decay) * (limit if over and stats == "clipped" else n)


def growth(ratio=1.01, floor=0.0, stats="clipped", patience=None):
    """Fira: not much above the last."""
    last, refused, limit = None, 0, None
    while True:
        n = yield limit
        if n == 0:
            continue
        limit = np.inf if last is None else ratio * max(last, floor)
        over = n > limit
        refused = refused + 1 if over else 0
        if over and patience and refused >= patience:
            refused, limit, over = 0, np.inf, False
        if not (over and stats == "skip"):
            last = min(n, limit) if stats == "clipped" else n


def band(low=0.5, high=2.0, decay=0.99, floor=0.0):
    """AGGC: the target of a norm within a band."""
    s, target = None, None
    while True:
        n = yield target
        if n == 0:
            continue
        s = n if s is None else decay * s + (1 - decay) * n
        lower, upper = max(low * s, floor), high * s
        target = min(max(n, lower), upper)
