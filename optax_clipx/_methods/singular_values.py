"""Singular values of matrices, clipped by an SVD or by products of matrices.

The derivative is that of the function of singular values, whatever the method: finite
also where singular values are equal or zero.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._clipping.responses import smooth
from .._trees.arithmetic import quotient
from .._trees.sizes import is_known


class Ways(NamedTuple):
    """How singular values are clipped: the curve, and how it is computed."""

    form: str
    method: str
    steps: int


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def clip_matrices(
    unit: jax.Array, norm: jax.Array, limit: jax.Array, ways: Ways
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Clips matrices `unit * norm`; with the largest singular values before, after."""
    finite = jnp.isfinite(unit).all(axis=(-2, -1), keepdims=True)
    unit = jnp.where(finite, unit, 0)
    ratio = limit / jnp.where(norm > 0, norm, 1)  # the threshold at a norm of 1
    if ways.method == "svd" or 1 in unit.shape[-2:]:
        new, top, top_after = _by_svd(unit, norm, limit, ways.form)
    else:
        tiny = float(jnp.finfo(unit.dtype).tiny) ** 0.5
        # Beyond 2^30 clipping at a norm of 1 changes nothing that a float can hold.
        new = _by_products(unit, jnp.clip(ratio, tiny, 2.0**30), ways)
        # A threshold of zero leaves nothing, and one above the norm everything.
        new = jnp.where(ratio[..., None] > tiny, new, 0)
        top_after = _power_iteration(new) * norm[..., 0]
        top = _power_iteration(unit) * norm[..., 0]
        new = new * norm[..., None]
        infinite = jnp.isposinf(limit)
        new = jnp.where(infinite, unit * norm[..., None], new)
        top_after = jnp.where(infinite, top, top_after)
    bad = ~finite[..., 0, 0]
    return new, jnp.where(bad, jnp.nan, top), jnp.where(bad, jnp.nan, top_after)


@clip_matrices.defjvp
def _clip_matrices_jvp(
    ways: Ways, primals: Sequence[jax.Array], tangents: Sequence[jax.Array]
) -> tuple[Any, Any]:
    # With G = U diag(s) V' and A = U' dG V, the derivative of U diag(f(s)) V' is
    #   U (P * sym(A) + Q * skew(A)) V',   P_ij = (f_i - f_j) / (s_i - s_j),
    #                                      Q_ij = (f_i + f_j) / (s_i + s_j),
    # and what of dG lies outside of the spaces of U and V is multiplied by f(s) / s.
    # (Noferini, A formula for the Frechet derivative of a generalized matrix function,
    # 2017.) The SVD's own derivative divides by s_i - s_j instead.
    unit, norm, limit = primals
    d_unit, _, d_limit = tangents  # the norm is a constant
    finite = jnp.isfinite(unit).all(axis=(-2, -1), keepdims=True)
    unit = jnp.where(finite, unit, 0)
    u, s, vt = jnp.linalg.svd(unit, full_matrices=False)
    bend = _bend(s, limit / jnp.where(norm > 0, norm, 1), ways.form)

    change = d_unit * norm[..., None]
    ut, v = jnp.swapaxes(u, -1, -2), jnp.swapaxes(vt, -1, -2)
    rows, columns = _dot(ut, change), _dot(change, v)
    core = _dot(rows, v)
    flipped = jnp.swapaxes(core, -1, -2)
    inner = bend.of_sym * (core + flipped) / 2 + bend.of_skew * (core - flipped) / 2
    moved = u * (bend.by_limit * d_limit)[..., None, :]
    new = _dot(_dot(u, inner) + moved, vt)
    new += _dot((columns - _dot(u, core)) * bend.ratio[..., None, :], vt)
    new += _dot(u * bend.ratio[..., None, :], rows - _dot(core, vt))

    top = core[..., 0, 0]
    top_after = bend.of_sym[..., 0, 0] * top + bend.by_limit[..., 0] * d_limit
    return clip_matrices(*primals, ways), (new, top, top_after)


class _Bend(NamedTuple):
    """What the function of singular values gives to its derivative."""

    of_sym: jax.Array  # P
    of_skew: jax.Array  # Q
    ratio: jax.Array  # f(s) / s
    by_limit: jax.Array  # df / dt


def _bend(s: jax.Array, limit: jax.Array, form: str) -> _Bend:
    """Divided differences of min(s, t) or s / sqrt(1 + s^2 / t^2), limits included."""
    # Beyond 2^30 the derivative is 1 to rounding.
    t = jnp.clip(limit, float(jnp.finfo(s.dtype).tiny) ** 0.5, 2.0**30)
    i, j = s[..., :, None], s[..., None, :]
    if form == "hard":
        # Values that are equal to the threshold up to rounding count as below: of the
        # two derivatives there, all of them get the same one.
        below = s <= t * (1 + 8 * float(jnp.finfo(s.dtype).eps))
        f = jnp.where(below, s, t)
        by_limit = (~below).astype(s.dtype)
        apart = jnp.where(i == j, 1, i - j)
        chords = (f[..., :, None] - f[..., None, :]) / apart
        slope = jnp.broadcast_to(below[..., None].astype(s.dtype), chords.shape)
        of_sym = jnp.clip(jnp.where(i == j, slope, chords), 0, 1)
    else:
        # With h = sqrt(s^2 + t^2), f = s t / h: here s_i - s_j is divided out.
        h = jnp.sqrt(jnp.square(s) + jnp.square(t))
        f = s * (t / h)
        by_limit = (s / h) ** 3
        hi, hj = h[..., :, None], h[..., None, :]
        mixed = _quotient_or_one(t[..., None] * (i + j), i * hj + j * hi)
        of_sym = (t[..., None] / hi) * (t[..., None] / hj) * mixed
    of_skew = _quotient_or_one(f[..., :, None] + f[..., None, :], i + j)
    some = (limit > 0)[..., None]  # a threshold of zero leaves nothing
    return _Bend(
        jnp.where(some, of_sym, 0),
        jnp.where(some, of_skew, 0),
        jnp.where(some[..., 0], _quotient_or_one(f, s), 0),
        by_limit,
    )


def _quotient_or_one(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, and its limit of 1 where both are zero."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 1)


def _by_svd(
    unit: jax.Array, norm: jax.Array, limit: jax.Array, form: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, values, v = jnp.linalg.svd(unit, full_matrices=False)
    values = jnp.minimum(values, 1)  # no larger than the Frobenius norm
    whole = values * norm
    clipped = bent(whole, limit, form)
    top = clipped[..., :1]  # products of what is small would vanish: near 1 first
    shares = quotient(clipped, jnp.where(top > 0, top, 1))
    new = _dot(u * shares[..., None, :], v) * top[..., None]
    return new, whole[..., 0], clipped[..., 0]


def bent(values: jax.Array, limit: jax.Array, form: str) -> jax.Array:
    """Singular values after clipping."""
    limits = jnp.broadcast_to(limit, values.shape)
    if form == "hard":
        return jnp.minimum(values, limits)
    smaller = values * smooth(values, limits, p=2.0)
    return jnp.where(jnp.isposinf(limits) | (values == 0), values, smaller)


def _by_products(unit: jax.Array, ratio: jax.Array, ways: Ways) -> jax.Array:
    """The clipped matrices at a norm of 1, from products of matrices."""
    # Right for wide matrices too, with larger products: so for sizes not known yet.
    known = is_known(*unit.shape[-2:])
    tall = not known or unit.shape[-2] >= unit.shape[-1]
    x = unit if tall else jnp.swapaxes(unit, -1, -2)
    limit = ratio[..., None]
    identity = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), _square(x))
    if ways.form == "soft":
        # The upper part of the polar factor of [X / t; I] is X (X'X + t^2 I)^(-1/2).
        tilt = jnp.minimum(limit, 1 / jnp.maximum(limit, 1e-30))
        small, large = jnp.where(limit < 1, 1, tilt), jnp.where(limit < 1, limit, 1)
        stacked = jnp.concatenate([x * small, identity * large], axis=-2)
        factor = _polar(stacked / jnp.sqrt(small**2 + large**2), ways.steps)
        new = factor[..., : x.shape[-2], :] * limit
    else:
        # min(s, t) = (s + t - |s - t|) / 2, and |H| = H sign(H).
        factor = _polar(x, ways.steps)
        shifted = _dot(jnp.swapaxes(factor, -1, -2), x)
        shifted = (shifted + jnp.swapaxes(shifted, -1, -2)) / 2 - limit * identity
        bound = 1 + limit
        magnitude = _dot(shifted, _polar(shifted / bound, ways.steps))
        new = (x + _dot(factor, limit * identity - magnitude)) / 2
        new = jnp.where(limit >= 1, x, new)
    return new if tall else jnp.swapaxes(new, -1, -2)


def _square(x: jax.Array) -> tuple[int, ...]:
    return (*x.shape[:-2], x.shape[-1], x.shape[-1])


def _polar(x: jax.Array, steps: int) -> jax.Array:
    """The orthogonal polar factor of tall matrices of spectral norm at most 1.

    Singular values go by s (15 - 10 s^2 + 3 s^4) / 8, which never exceeds 1.
    """

    def refine(_: object, x: jax.Array) -> jax.Array:
        gram = _dot(jnp.swapaxes(x, -1, -2), x)
        return (15 * x + _dot(x, 3 * _dot(gram, gram) - 10 * gram)) / 8

    return lax.fori_loop(0, steps, refine, x)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _power_iteration(x: jax.Array, steps: int = 16) -> jax.Array:
    """The largest singular value of matrices, from below."""
    v = jnp.ones((*x.shape[:-2], x.shape[-1], 1), x.dtype) + 0 * x[..., :1, :1]
    # A start that is orthogonal to what counts finds nothing: add the longest row.
    longest = jnp.argmax(jnp.sum(jnp.square(x), axis=-1, keepdims=True), axis=-2)
    row = jnp.take_along_axis(x, longest[..., None], axis=-2)
    v = v * 1e-3 + jnp.swapaxes(row, -1, -2)

    def refine(_: object, v: jax.Array) -> jax.Array:
        v = _dot(jnp.swapaxes(x, -1, -2), _dot(x, v))
        length = jnp.linalg.norm(v, axis=-2, keepdims=True)
        return v / jnp.where(length > 0, length, 1)

    v = lax.fori_loop(0, steps, refine, v)
    return jnp.linalg.norm(_dot(x, v), axis=(-2, -1))
