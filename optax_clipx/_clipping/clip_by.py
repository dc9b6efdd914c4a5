"""`clip_by`: measure, threshold, response, apply, metrics, as one transformation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import PyTree

from .._devices.mesh import mesh_of
from .._devices.numbers import as_one
from .._reductions.groups import Groups, Packed, ScalarGroups, UnitGroups
from .._reductions.norms import Norms, norms
from .._reductions.plan import Plan
from .._thresholds.base import Context, Threshold, no_memory
from .._thresholds.constant import as_threshold
from .._trees.arguments import AxisNames, Limit, Specs, as_float, is_limit
from .._trees.arithmetic import (
    Number,
    accumulator,
    finite,
    full_like,
    shaped_like,
    where,
)
from .._trees.leaves import Leaves, flatten, from_prefix, show
from .._trees.types import Dtype, Scalar, Shaped, Trees
from . import metrics as _metrics, policies, scaling, summary as _summary
from .elements import clip_by_magnitude
from .entries import any_of
from .known_norm import Known, announced, find_norm
from .measures import Measure
from .responses import rescale
from .scaling import Response
from .summary import Summary
from .transformation import Given, Memory, Options, checked, transformation


def clip_by(
    measure: Measure,
    threshold: Limit,
    response: Response = rescale,
    *,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
    norm_arg: str = "norm",
) -> optax.GradientTransformationExtraArgs:
    r"""Clips what is measured together to a threshold: the form of every method here.

    .. math:: u_i \leftarrow c_i u_i, \quad c = \mathrm{response}(n, t),
              \quad n = \mathrm{measure}(u), \quad t = \mathrm{threshold}(n)

    ==================  ==================  =========================================
    norm                threshold           result
    ==================  ==================  =========================================
    0                   any                 zeros, with a finite gradient
    any finite          infinity            unchanged, bit for bit
    at most threshold   finite              times the response's scale: with ``rescale``
                                            and ``drop`` unchanged, bit for bit
    above               0                   zeros
    infinite or NaN     any                 by ``nonfinite``
    any                 negative or NaN     ValueError; if traced, NaN everywhere
    ==================  ==================  =========================================

    Args:
        measure: what is measured together: :func:`measures.tree_norm`,
            :func:`measures.group_norms`, :func:`measures.leaf_norms`,
            :func:`measures.unit_norms` or :func:`measures.magnitudes`.
        threshold: a number, a scalar array, an optax schedule, a pytree prefix of
            these, or a :class:`thresholds.Threshold`; on the scale of the updates.
        response: how norms and thresholds give scales: :func:`responses.rescale`,
            :func:`responses.normalize`, :func:`responses.smooth`,
            :func:`responses.drop`, :func:`responses.biweight`, or any function of the
            two. It is also called for norms below a finite threshold: there
            ``normalize`` enlarges, ``smooth`` and ``biweight`` shrink. Its
            result is ignored if the threshold is infinite or the norm is 0. For norms
            far above the threshold, the scale must be proportional to threshold divided
            by norm, or be 0.
        nonfinite: ``"propagate"`` makes every leaf NaN, ``"zero"`` makes the updates
            zero, ``"raise"`` raises an error that names the leaves,
            ``"sanitize"`` turns NaN into 0 and infinities into the largest finite
            number, then clips.
        axis_name: the mesh axes over which every leaf is sharded, or ``()`` if no leaf
            is sharded. It is needed inside ``pmap``, and inside ``shard_map`` with
            ``check_vma=False``, and ignored outside of these axes.
        specs: how each leaf is sharded, instead of ``axis_name``: a pytree prefix of
            ``PartitionSpec``.
        metrics: whether the state keeps :class:`ClipMetrics`.
        norm_arg: the name of an extra argument of ``update``, with which you can pass
            a norm of the whole tree that you have computed yourself.

    Returns:
        A transformation for :func:`optax.chain`. Its updates keep dtype, shape and
        sharding.

    Raises:
        ValueError: for a negative or NaN threshold or an unknown policy, and from
            ``update`` if ``params``, or ``axis_name`` or ``specs``, is needed and
            missing.
        TypeError: from ``update`` for integer leaves and leaves that are no arrays.
        FloatingPointError: with ``nonfinite="raise"``, from ``update`` outside of
            ``jit``.
        jax.errors.JaxRuntimeError: with ``nonfinite="raise"`` inside of ``jit``,
            ``pmap`` or ``shard_map``, on one device or many, where a result of the
            program is read; the text contains the ``FloatingPointError``.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> from optax_clipx import measures, responses
        >>> clipper = clipx.clip_by(measures.leaf_norms(), 1.0, responses.drop)
        >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
        >>> grads, _ = clipper.update(grads, clipper.init(grads))
        >>> print(grads["w"], grads["b"])
        [0. 0.] [0.5]

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural
        networks, 2013, arXiv 1211.5063.
    """
    if not isinstance(measure, Measure):
        raise TypeError(
            "Expected a measure such as optax_clipx.measures.tree_norm(), got"
            f" {measure!r}."
        )
    if not callable(response):
        raise TypeError(f"Expected response to be a function, got {response!r}.")
    options = Options(nonfinite, axis_name, specs, metrics, norm_arg)
    rule = checked(as_threshold(threshold))
    if measure.scope == "element":
        return clip_by_magnitude(rule, response, options, is_limit(threshold))

    parts = Parts(measure, rule, response, options)

    def step(given: Given) -> tuple[list[Any], Memory]:
        return clip_norms(parts, given)

    def init_rule(leaves: Leaves) -> Any:
        groups = measure.groups_at_init(leaves, axis_name, specs)
        norms = _no_norms(groups, leaves, measure)
        state = rule.init(norms)
        no_units = isinstance(norms, tuple) and not norms
        return _without_units(state) if no_units else state

    remembers = rule.init is not no_memory
    tx = transformation(init_rule if remembers else None, step, rule, options)
    return announced(tx) if measure.scope == "tree" and measure.ord == 2 else tx


def clip_once(
    updates: PyTree,
    measure: Measure,
    rule: Threshold,
    response: Response,
    options: Options,
    params: PyTree = None,
    norm: Scalar | None = None,
) -> tuple[Any, Any]:
    """One step without state: the clipped pytree and its norms before."""
    policies.check_policy(options.nonfinite)
    leaves = flatten(updates)
    if not leaves.arrays:
        return updates, measure.unpack(None, leaves)
    extra = {} if norm is None else {options.norm_arg: norm}
    parts = Parts(measure, rule, response, options)

    def norms_before(
        memory: Memory, summary: Summary, rule: PyTree, norm: Norms
    ) -> Any:
        return norm.value

    known = find_norm(leaves.arrays)
    given = Given(leaves, params, Memory(), extra, known)
    with mesh_of(leaves.arrays):
        decided = decide(parts, given, norms_before, by_leaf=True)
        norms = measure.unpack(decided.ended, leaves, decided.groups)
        return leaves.rebuild(decided.applied()), norms


class Parts(NamedTuple):
    """What a clipper is made of."""

    measure: Measure
    rule: Threshold
    response: Response
    options: Options


def remembered(memory: Memory, summary: Summary, rule: PyTree, norm: Norms) -> Memory:
    """What is left of a step that only clips."""
    return memory.after(summary, rule)


Ending = Callable[[Memory, Summary, Any, Norms], Any]


def clip_norms(
    parts: Parts, given: Given, ending: Ending = remembered
) -> tuple[list[Any], Any]:
    """One step of the four parts: the clipped arrays, and what the ending gives."""
    decided = decide(parts, given, ending)
    return decided.applied(), decided.ended


class Decided(NamedTuple):
    """What is done with each array, before it is done; and what the ending gave."""

    arrays: list[Any]
    groups: Groups
    scales: Packed
    zero: Any  # whether all become zeros, where that may be
    ended: Any

    def applied(self) -> list[jax.Array]:
        """The clipped arrays."""
        return scaling.scaled(self.arrays, self.groups, self.scales, self.zero)


def decide(
    parts: Parts, given: Given, ending: Ending, *, by_leaf: bool = False
) -> Decided:
    """Norms, thresholds and scales of a step.

    The norms of units may come in buckets, unless `by_leaf` is set.
    """
    measure, rule, response, options = parts
    plan, known, found = measured(measure, rule, options, given, by_leaf)
    leaves, groups = given.leaves, plan.groups
    arrays = leaves.arrays
    sanitized = options.nonfinite == "sanitize"
    if sanitized:
        arrays = policies.sanitize(arrays)

    def numbers(known: Known, found: list[Norms], memory: Memory) -> Any:
        norm = norm_of(known, found, sanitized)
        params_norms = found[-1].value if rule.uses_params else None
        now = given._replace(memory=memory)
        limits, new_rule = limits_of(norm, measure, rule, groups, now, params_norms)
        scales, *outcome = scaling.outcome(norm, limits, response)
        folded = _summary.fold(plan, arrays, (norm.value, limits, *outcome))
        flags = found[1].value if sanitized else ()

        def end(
            folded: PyTree, flags: Packed, memory: Memory, rule: PyTree, norm: Norms
        ) -> Any:
            summary = _summary.summary_of(folded, plan.ord)
            if sanitized:
                summary = summary._replace(nonfinite=any_of(flags))
            summary, lost, zero = policies.by_policy(leaves, summary, options)
            return lost, zero, ending(memory, summary, rule, norm)

        lost, zero, ended = as_one(end, folded, flags, memory, new_rule, norm)
        # A response may be NaN for a norm of infinity, and NaN times 0 is not 0.
        flag = zero if options.nonfinite == "zero" else None
        return _replaced(scales, lost, flag), flag, ended

    # The numbers of more than four groups are too many for one kernel.
    if isinstance(groups, ScalarGroups) and (groups.count or 1) <= 4:
        scales, flag, ended = as_one(numbers, known, found, given.memory)
    else:
        scales, flag, ended = numbers(known, found, given.memory)
    return Decided(arrays, groups, scales, flag, ended)


class Measured(NamedTuple):
    """What is measured in a step; the norm of the tree may be given."""

    plan: Plan
    known: Known
    found: list[Norms]


def measured(
    measure: Measure,
    rule: Threshold,
    options: Options,
    given: Given,
    by_leaf: bool = False,
) -> Measured:
    """All norms of a step, from one reduction, and so one collective."""
    leaves, known = given.leaves, _known(given, measure, options)
    sanitized = options.nonfinite == "sanitize"
    trees = [leaves.arrays] if known is None or sanitized else []
    if rule.uses_params:
        trees.append(params_like(leaves, given.params))
    in_buckets = not by_leaf and not jax.tree.leaves(given.memory.rule)
    plan = _planned(measure, leaves, trees, options, in_buckets)
    found: list[Norms] = []
    if sanitized:
        found = norms(
            *(plan, trees, _sanitized),
            counted=(False, True) + (False,) * (len(trees) - 1),
        )
    elif trees:
        found = norms(plan, trees)
    return Measured(plan, known, found)


def norm_of(known: Known, found: list[Norms], sanitized: bool = False) -> Norms:
    """The norm that is known already, or else found."""
    known = known() if isinstance(known, Partial) else known
    if known is None:
        return found[0]
    if not sanitized:
        return known
    # A norm of what was there before means nothing.
    usable = jnp.isfinite(known.value)
    return Norms(
        *(jnp.where(usable, k, m) for k, m in zip(known, found[0], strict=True))
    )


def _replaced(scales: Packed, lost: Number, zero: Number | None) -> Packed:
    """NaN where every leaf is lost, 0 where each becomes zeros, if that may be."""
    if zero is not None:
        scales = jax.tree.map(lambda s: where(zero, 0, s), scales)
    return jax.tree.map(lambda s: where(lost, np.nan, s), scales)


def _planned(
    measure: Measure, leaves: Leaves, trees: Trees, options: Options, in_buckets: bool
) -> Plan:
    """The plan for what is measured; a norm that is given needs no mesh."""
    if not trees:
        return Plan(tuple(leaves.paths), (), measure.groups(leaves), measure.ord)
    plan = measure.plan(leaves, options.axis_name, options.specs)
    if in_buckets and isinstance(plan.groups, UnitGroups):
        return replace(plan, groups=plan.groups.bucketed(trees, plan.places))
    return plan


def _sanitized(trees: Trees, extras: PyTree) -> Any:
    """The first tree without what is not finite, which entries were not, the others."""
    raw, *others = trees
    return [policies.sanitize(raw), policies.where_nonfinite(raw), *others]


def limits_of(
    norm: Norms,
    measure: Measure,
    rule: Threshold,
    groups: Groups,
    given: Given,
    params_norms: Packed = None,
) -> tuple[Packed, Any]:
    """The thresholds, and what the rule remembers then."""
    # What a rule remembers is float32 whatever the leaves are, and always finite.
    leaves, rule_state = given.leaves, given.memory.rule
    narrow = bool(jax.tree.leaves(rule_state))

    def seen(n: jax.Array) -> jax.Array:
        usable = where(finite(n), n, full_like(n, 0))
        return _metrics.to_float32(usable) if narrow else usable

    context = Context(
        step=given.memory.steps,
        params_norms=params_norms,
        extra=given.extra,
        paths=leaves.paths,
        pack=groups.pack,
        labels=measure.names(leaves) if measure.scope == "group" else None,
    )
    values = jax.tree.map(seen, norm.value) if rule.uses_norms else norm.value
    limits, new_rule = rule.update(values, rule_state, context)
    if not isinstance(limits, tuple) and not jax.tree_util.all_leaves([limits]):
        limits = groups.pack(from_prefix(limits, leaves.paths, "a threshold"))
    limits = shaped_like(limits, norm.value)
    if narrow:  # what the rule saw as within its threshold is so in float64 too
        limits = jax.tree.map(
            lambda t, n: _within(t, n, seen(n)) if n.dtype == jnp.float64 else t,
            limits,
            norm.value,
        )
    return limits, new_rule


def _within(limit: jax.Array, norm: jax.Array, seen: jax.Array) -> jax.Array:
    """A threshold not below its norm, if it is not below what a rule saw of it."""
    within = jnp.isfinite(norm) & (seen <= _metrics.to_float32(limit))
    return jnp.where(within, jnp.maximum(limit, norm), limit)


def _known(given: Given, measure: Measure, options: Options) -> Known:
    """The norm of the tree, if somebody has computed it already, or can."""
    if measure.scope != "tree":
        return None
    norm = given.extra.get(options.norm_arg)
    if norm is not None:
        return _checked_norm(norm, accumulator(given.leaves.arrays))
    return given.known if measure.ord == 2 else None


def _checked_norm(norm: Scalar, dtype: Dtype) -> Norms:
    norm = jnp.asarray(as_float(norm))
    if norm.ndim or jnp.iscomplexobj(norm):
        raise ValueError(f"Expected norm to be a real scalar, got {norm!r}.")
    if not isinstance(norm, jax.core.Tracer) and norm < 0:
        raise ValueError(f"Expected norm >= 0, got norm={norm}.")
    norm = norm.astype(dtype)
    norm = jnp.where(norm < 0, jnp.nan, norm)
    return Norms(norm, norm, jnp.ones_like(norm))


def params_like(leaves: Leaves, params: PyTree) -> list[Any]:
    """The parameters of the measured leaves, found by path."""
    if params is None:
        raise ValueError(
            "Expected params, got None: the threshold is relative to the parameters."
            " Call update(updates, state, params)."
        )
    of_params = flatten(params, updates=False)
    by_path = dict(zip(of_params.paths, of_params.arrays, strict=True))
    found = []
    for path, update in zip(leaves.paths, leaves.arrays, strict=True):
        param = by_path.get(path)
        if param is None or param.shape != update.shape:
            raise ValueError(
                f"Expected a parameter of shape {update.shape} at {show(path)}, as the"
                f" update has, got {'none' if param is None else param.shape}."
            )
        found.append(param)
    return found


def _no_norms(groups: Groups, leaves: Leaves, measure: Measure) -> Packed:
    if measure.scope == "tree":
        return jnp.zeros((), jnp.float32)
    if isinstance(groups, ScalarGroups):
        return jnp.zeros((groups.count or 0,), jnp.float32)
    return tuple(
        _no_unit_norms(leaf, axes)
        for leaf, axes in zip(leaves.arrays, groups.axes, strict=True)
    )


def _without_units(state: PyTree) -> Any:
    """What a rule remembers where there are no leaves, an array for each empty tuple.

    optax.tree.map_params calls `init` without leaves, to see where the parameters are
    in a state. An array is a prefix of a tuple with any number of units in it.
    """
    return jax.tree.map(
        lambda x: jnp.zeros((0,), jnp.float32) if type(x) is tuple else x,
        state,
        is_leaf=lambda x: type(x) is tuple and not x,
    )


def _no_unit_norms(leaf: Shaped, axes: tuple[int, ...]) -> jax.Array:
    if not isinstance(leaf, jax.Array):  # a shape alone
        shape = tuple(1 if i in axes else n for i, n in enumerate(leaf.shape))
        return jnp.zeros(shape, jnp.float32)
    # Reduced, and not made by its shape, so that it lies on the mesh as norms will.
    return jnp.zeros_like(jnp.max(jnp.abs(leaf), axis=axes, keepdims=True), jnp.float32)
