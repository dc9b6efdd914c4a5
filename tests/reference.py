"""Dense NumPy references in float64 or wider, written from the formulas."""

import numpy as np

WIDE = np.longdouble


def norm(arrays, ord=2):
    """The norm of all entries of some arrays together."""
    flat = np.concatenate(
        [np.abs(_wide(x)).ravel() for x in arrays] or [np.zeros(0, WIDE)]
    )
    if not flat.size:
        return WIDE(0)
    if ord in (None, 2):
        return np.sqrt(np.sum(flat**2))
    if ord == "rms":
        return np.sqrt(np.mean(flat**2))
    if ord == np.inf:
        return np.max(flat)
    peak = np.max(flat)
    return (
        peak * np.sum((flat / peak) ** WIDE(ord)) ** (1 / WIDE(ord)) if peak else peak
    )


def rescale(arrays, limit, ord=2, eps=0.0):
    """Arrays that share one norm, brought down to a limit."""
    n = norm(arrays, ord) + eps
    scale = WIDE(1) if n <= limit else WIDE(limit) / n
    return [_wide(x) * scale for x in arrays]


def unit_norms(x, axis):
    """2-norms over some axes, which are kept with size 1."""
    return np.sqrt(np.sum(np.abs(_wide(x)) ** 2, axis=axis, keepdims=True))


def optax_unit_axes(shape):
    """The axes of a unit by rank."""
    if sum(n != 1 for n in shape) <= 1:
        return tuple(range(len(shape)))
    return (0,) if len(shape) <= 3 else tuple(range(len(shape) - 1))


def adaptive(grad, param, clipping, eps, axis):
    """Adaptive gradient clipping of one leaf."""
    g, w = unit_norms(grad, axis), unit_norms(param, axis)
    limit = clipping * np.maximum(w, eps)
    return _wide(grad) * np.where(g > limit, limit / np.where(g > 0, g, 1), 1)


def _wide(x):
    x = np.asarray(x)
    if np.iscomplexobj(x):
        return x.astype(np.clongdouble)
    # bfloat16 and the like do not convert to longdouble in one step.
    return x.astype(np.float64).astype(WIDE)
