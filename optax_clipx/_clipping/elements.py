"""Clipping entry by entry: the clamp, and other responses to single magnitudes."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import PyTree

from .._devices import mesh
from .._devices.numbers import as_one
from .._devices.programs import TracedOnce, entries, unknown
from .._devices.sums import clamped, outside
from .._reductions.norms import Norms, norms
from .._reductions.plan import Plan, make_plan, of_leaves, of_tree
from .._thresholds.base import Context, Threshold, no_memory, stateless
from .._thresholds.constant import constant
from .._trees.arguments import Limit, is_limit
from .._trees.arithmetic import (
    Number,
    accumulator,
    at_least,
    full_like,
    larger,
    negated,
    of_dtype,
    saturated,
    times,
    where,
    widened,
)
from .._trees.leaves import Leaves
from .._trees.types import Trees
from . import bounds, policies
from .responses import rescale
from .scaling import Response, scales, times_scale
from .summary import Summary, of_entries
from .transformation import Given, Memory, Options, transformation

Interval = tuple[Number, Number]  # from the lower to the upper bound


def clip_by_interval(
    min_value: Limit, max_value: Limit, options: Options
) -> optax.GradientTransformationExtraArgs:
    """Clamps each entry to an interval."""
    if bounds.has_entries(min_value, max_value):
        bounds.check_bounds(min_value, "min_value", signed=True)
        bounds.check_bounds(max_value, "max_value", signed=True)
        bounds.check_order(min_value, max_value)
        return _clip_between(min_value, max_value, options)
    lower = constant(min_value, "min_value", signed=True)
    upper = constant(max_value, "max_value", signed=True)
    if _is_number(min_value) and _is_number(max_value) and min_value > max_value:
        raise ValueError(
            f"Expected min_value <= max_value, got min_value={min_value} and"
            f" max_value={max_value}."
        )
    rule = lower._replace(uses_step=lower.uses_step or upper.uses_step)
    one = is_limit(min_value) and is_limit(max_value)

    def step(given: Given) -> tuple[list[Any], Memory]:
        low, high = (_limits(bound, given, one) for bound in (lower, upper))
        return _finish(given, options, low, high, _clamp)

    return transformation(None, step, rule, options)


def clip_by_entry(
    max_delta: Limit, options: Options
) -> optax.GradientTransformationExtraArgs:
    """Clips the magnitude of each entry to a bound of its own."""
    bounds.check_bounds(max_delta, "max_delta")
    return _clip_between(None, max_delta, options)


def _clip_between(
    min_value: Limit, max_value: Limit, options: Options
) -> optax.GradientTransformationExtraArgs:
    """Clips to bounds of single entries; without a lower one to magnitudes."""
    rule = stateless(
        lambda norms, context: norms,
        uses_step=bounds.has_schedule(min_value, max_value),
    )
    one = min_value is None
    name = "max_delta" if one else "max_value"

    def step(given: Given) -> tuple[list[Any], Memory]:
        leaves, steps = given.leaves, given.memory.steps
        high = bounds.of_leaves(max_value, name, leaves, steps)
        if one:
            low = [-h for h in high]
        else:
            low = bounds.of_leaves(min_value, "min_value", leaves, steps)
        polar = one and any(map(jnp.iscomplexobj, leaves.arrays))
        return _finish(given, options, low, high, _shrink if polar else _clamp)

    return transformation(None, step, rule, options)


def clamp_once(
    tree: PyTree, min_value: Limit, max_value: Limit, options: Options
) -> Any:
    """One clamp without state."""
    clipper = clip_by_interval(min_value, max_value, options)
    return clipper.update(tree, None)[0]


def clip_by_magnitude(
    rule: Threshold, response: Response, options: Options, one: bool
) -> optax.GradientTransformationExtraArgs:
    """`clip_by` for single entries; whether the rule is one number for all leaves."""
    if rule.uses_params or jax.tree.leaves(rule.init(jnp.zeros((1,), jnp.float32))):
        raise ValueError(
            "Expected a threshold that does not depend on norms or parameters for"
            " magnitudes(), got an adaptive rule: measure with tree_norm(),"
            " leaf_norms() or unit_norms()."
        )

    respond = functools.partial(_respond, response=response)

    def step(given: Given) -> tuple[list[Any], Memory]:
        high, arrays = _limits(rule, given, one), given.leaves.arrays
        clamps = response is rescale and not any(map(jnp.iscomplexobj, arrays))
        return _finish(given, options, -high, high, _clamp if clamps else respond)

    # The rule remembers no arrays; what else it keeps, it has from init.
    plain = rule.init is no_memory
    return transformation(None if plain else _init_of(rule), step, rule, options)


def _init_of(rule: Threshold) -> Callable[[Leaves], Any]:
    return lambda leaves: rule.init(jnp.zeros((len(leaves.arrays),), jnp.float32))


def _limits(rule: Threshold, given: Given, one: bool) -> jax.Array | np.ndarray:
    """One threshold for all leaves, or a vector of one for each."""
    leaves, memory = given.leaves, given.memory
    dtype = accumulator(leaves.arrays)
    if one:
        limit, _ = rule.update(np.zeros((), dtype), memory.rule, Context(memory.steps))
        return limit
    count = len(leaves.arrays)
    groups = of_leaves(count)
    context = Context(memory.steps, None, given.extra, leaves.paths, groups.pack)
    norms = jnp.zeros((count,), dtype)
    limits, _ = rule.update(norms, memory.rule, context)
    return jnp.broadcast_to(jnp.asarray(limits), norms.shape)


def _clamp_once(array: jax.Array, low: Number, high: Number) -> jax.Array:
    if jnp.iscomplexobj(array):
        raise TypeError(
            "Expected real updates for an interval, got complex ones: clip their"
            " magnitudes with optax_clipx.clip(max_delta)."
        )
    low, high = (of_dtype(x, array.dtype) for x in (low, high))
    clamped = lax.min(lax.max(array, low), high)
    # Selected and not only clamped: a clamp may flush subnormal numbers.
    return lax.select(lax.eq(clamped, array), array, clamped)


_clamp = TracedOnce(_clamp_once)


def _respond(
    array: jax.Array, low: Number, limit: Number, *, response: Response
) -> jax.Array:
    wide = jnp.asarray(array).astype(widened(array, limit.dtype))
    root = magnitude = jnp.abs(wide)
    unit = jnp.ones_like(magnitude)
    if jnp.iscomplexobj(wide):  # of finite parts the magnitude may be infinite
        most = jnp.maximum(jnp.abs(wide.real), jnp.abs(wide.imag))
        large = most > float(jnp.finfo(most.dtype).max) / 2
        unit = jnp.where(large, 2, 1).astype(most.dtype)
        root = jnp.abs(times(wide, 1 / unit))
        magnitude = saturated(root, unit)
    itself = Norms(magnitude, root, unit)
    limits = jnp.broadcast_to(jnp.asarray(limit), magnitude.shape)
    found = scales(itself, limits, response)
    found = jnp.where(jnp.isnan(limits), jnp.nan, found)
    return times_scale(array, found)


_shrink = functools.partial(_respond, response=rescale)


def _finish(
    given: Given, options: Options, low: Any, high: Any, act: Callable[..., jax.Array]
) -> tuple[list[Any], Memory]:
    leaves, memory = given.leaves, given.memory
    arrays = leaves.arrays
    if options.nonfinite == "sanitize":
        arrays = policies.sanitize(arrays)
    bounds, unusable = _usable(low, high, leaves, options)
    each = [(x, *pair) for x, pair in zip(arrays, bounds, strict=True)]
    clipped = _clamp.each(each) if act is _clamp else [act(*x) for x in each]
    if memory.metrics is None and options.nonfinite in ("propagate", "sanitize"):
        return clipped, memory
    plan = make_plan(
        leaves, of_tree(len(arrays)), 2.0, _axis_name(options), options.specs
    )
    found = _measured(plan, leaves, bounds, act, options)

    def ending(
        found: list[jax.Array], unusable: Any, pairs: list[Interval], memory: Memory
    ) -> Any:
        summary = _summary_of(plan, found, pairs, leaves, options)
        summary = summary._replace(unusable=unusable)
        lost = zero = None
        if options.nonfinite in ("zero", "raise"):
            summary, lost, zero = policies.by_policy(leaves, summary, options)
        return memory.metrics_after(summary), lost, zero

    different = {tuple(map(id, pair)): pair for pair in bounds}
    numbers = (found, unusable, list(different.values()), memory._replace(rule=()))
    metrics, lost, zero = as_one(ending, *numbers)
    if lost is not None:
        clipped = [jnp.where(lost, jnp.nan, x) for x in clipped]
        clipped = [jnp.where(zero, jnp.zeros_like(x), x) for x in clipped]
    return clipped, memory._replace(metrics=metrics)


def _usable(
    low: Any,
    high: Any,
    leaves: Leaves,
    options: Options,
) -> tuple[list[tuple[Number, Number]], jax.Array | np.bool_]:
    """The bounds of each leaf, all of them NaN if any leaves no interval."""

    def or_nan(bound: Number) -> Number:
        return where(unusable, np.nan, bound)

    if isinstance(high, list):  # of single entries
        pairs = list(zip(low, high, strict=True))
        empty = [~(most >= least) for least, most in pairs]
        unusable = _on_all_devices(jnp.any, empty, leaves, options)
        return [(or_nan(least), or_nan(most)) for least, most in pairs], unusable
    unusable = negated(at_least(high, low))
    if high.ndim == 0:
        return [(or_nan(low), or_nan(high))] * len(leaves.arrays), unusable
    unusable = jnp.any(unusable)
    both = zip(*(entries(jnp.asarray(or_nan(x))) for x in (low, high)), strict=True)
    return list(both), unusable


def _measured(
    plan: Plan,
    leaves: Leaves,
    bounds: list[Interval],
    act: Callable[..., jax.Array],
    options: Options,
) -> list[jax.Array]:
    """Both norms and the root of the number of entries outside, in one reduction."""
    trees: list[Any] = [leaves.arrays]
    extras: Any = bounds
    if any(high.ndim for _, high in bounds):  # cut over the mesh as leaves are
        trees, extras = [leaves.arrays, *map(list, zip(*bounds, strict=True))], ()
    derive = _Derived(act, options.nonfinite == "sanitize")
    counted = (False, False, True) + (True,) * derive.sanitized
    return [x.value for x in norms(plan, trees, derive, extras, counted)]


def _axis_name(options: Options) -> Any:
    """The clamp itself needs no collective: on unknown axes metrics are the shard's."""
    clamps = options.nonfinite in ("propagate", "sanitize")
    if clamps and mesh.is_unknown(options.axis_name, options.specs):
        return ()
    return options.axis_name


def _summary_of(
    plan: Plan,
    found: list[jax.Array],
    bounds: list[Interval],
    leaves: Leaves,
    options: Options,
) -> Summary:
    before, after, num_outside, *num_bad = found
    size = full_like(before, plan.sizes(leaves.arrays))
    sizes = [larger(abs(low), abs(high)) for low, high in bounds]
    return of_entries(
        *(before, after, num_outside, size, *num_bad),
        threshold=_on_all_devices(jnp.max, sizes, leaves, options),
    )


def _on_all_devices(
    total: Callable[..., jax.Array],
    values: Sequence[Any],
    leaves: Leaves,
    options: Options,
) -> Any:
    """The largest of all values, or whether any is true."""
    each = [total(x) if x.ndim else x for x in values]
    found = each[0] if len(each) == 1 else total(jnp.stack(each))
    scalars = not any(x.ndim for x in values)
    if scalars or mesh.is_unknown(options.axis_name, options.specs):
        return found
    places = mesh.placements(
        leaves.arrays, leaves.paths, options.axis_name, options.specs
    )
    axes = mesh.axes_to_sum([found, *leaves.arrays], places)
    number = found.astype(jnp.int32) if found.dtype == jnp.bool_ else found
    return mesh.max_over(number, axes).astype(found.dtype)


@dataclass(frozen=True)
class _Derived:
    """What is measured of the leaves: before, after, and which entries were outside."""

    act: Callable[..., jax.Array]
    sanitized: bool

    def __call__(self, trees: Trees, scalars: PyTree) -> Any:
        leaves, *entries = trees
        raw = policies.sanitize(leaves) if self.sanitized else leaves
        act = clamped if self.act is _clamp else self.act
        # Unknown: bounds that several sums share would be stored.
        if entries:
            here = there = list(zip(*entries, strict=True))
        else:
            here, there = unknown((list(scalars), list(scalars)))
        each = zip(raw, here, there, strict=True)
        found = [_changed(x, one, other, act) for x, one, other in each]
        after, outside = zip(*found, strict=True)
        measured = [raw, list(after), list(outside)]
        if self.sanitized:
            measured.append(policies.where_nonfinite(leaves))
        return measured


def _changed_once(
    array: jax.Array, here: Any, there: Any, act: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A leaf after clipping, and 1 for each entry that was outside of its bounds."""
    return act(array, *here), outside(array, *there)


_changed = TracedOnce(_changed_once, (3,))


def _is_number(value: object) -> bool:
    traced = isinstance(value, jax.core.Tracer)
    return is_limit(value) and not callable(value) and not traced
