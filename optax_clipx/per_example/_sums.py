"""Sums of clipped gradients of single examples, by microbatch, in one pass or two."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from .._clipping.scaling import Response
from .._devices import mesh
from .._devices.examples import in_rows
from .._trees.arguments import AxisNames
from .._trees.arithmetic import widened
from .._trees.leaves import Leaves, show
from ._examples import (
    ExampleGroups,
    Measured,
    all_finite,
    along,
    like_norms,
    measured,
    scales_of,
    weighted_sum,
)


class Counts(NamedTuple):
    """How many examples were seen."""

    over: jax.Array  # above the threshold, for each group
    nonfinite: jax.Array
    number: jax.Array


@dataclass(frozen=True)
class ClippedGrad:
    """The gradients of one batch: what all its microbatches share."""

    fun: Callable[..., Any]  # from the arguments to the loss of one example and more
    argnums: int | tuple[int, ...]
    args: tuple[Any, ...]
    batch_argnums: tuple[int, ...]
    steps: int
    leaves: Leaves  # the parameters
    groups: ExampleGroups
    limits: jax.Array  # a scalar for the tree, else one for each group
    ord: Any
    response: Response
    axes: tuple[str, ...]  # the mesh axes of manual code that hold other examples
    dtype: Any

    def sums(
        self, mask: jax.Array | None, two_pass: bool
    ) -> tuple[list[jax.Array], Counts, jax.Array, Any]:
        """Summed gradients, counts, norms of the examples, what else `fun` returned."""
        examples = ({i: self.args[i] for i in self.batch_argnums}, mask)
        whole = self.groups.count is None
        if two_pass and whole and not _is_narrow(self._gradients, examples[0]):
            # Where products are rounded, both passes must round alike.
            with jax.default_matmul_precision("highest"):
                counts, (norms, aux) = self._over_microbatches(
                    self._measure, self._no_counts(), examples
                )
                grads, _ = self._over_microbatches(
                    self._weighted_gradient, self._no_grads(), examples, (norms,)
                )
        else:
            start = (self._no_grads(), self._no_counts())
            (grads, counts), (norms, aux) = self._over_microbatches(
                self._clip, start, examples
            )
        norms, aux = jax.tree.map(self._joined, (norms, aux))
        if self.axes:
            varied = jax.tree.map(self._varied, (grads, counts))
            grads, counts = lax.psum(varied, self.axes)
        return grads, counts, norms, aux

    def _over_microbatches(
        self,
        fun: Callable[..., tuple[Any, Any]],
        start: PyTree,
        examples: PyTree,
        known: PyTree = (),
    ) -> tuple[Any, Any]:
        """Adds up the first output of a function of examples, stacks the second.

        What is known of the examples is such a stack, from an earlier pass.
        """
        if self.steps == 1:
            return fun(*examples, *known)

        # Every steps-th example: so each microbatch lies on the devices as all of them
        # do, and the batch is not copied.
        def take(i: jax.Array, x: jax.Array) -> jax.Array:
            parts = x.reshape(x.shape[0] // self.steps, self.steps, *x.shape[1:])
            return lax.dynamic_index_in_dim(parts, i, 1, keepdims=False)

        # The smallest first: in this order they are added up, and where the gradient
        # of one leaf was the sum of a larger one has room.
        zeros, structure = jax.tree.flatten(start)
        order = sorted(range(len(zeros)), key=lambda k: zeros[k].size)

        # Neither indices nor flags are stacked: each would be as much as a norm.
        def step(carry: PyTree, known: PyTree) -> tuple[Any, Any]:
            i, total = carry
            chosen = jax.tree.map(functools.partial(take, i), examples)
            part, found = fun(*chosen, *known)
            parts = jax.tree.leaves(part)
            return (
                i + 1,
                [x + parts[k] for x, k in zip(total, order, strict=True)],
            ), found

        carry = (jnp.int32(0), [zeros[k] for k in order])
        (_, total), found = lax.scan(step, carry, known, self.steps)
        sums = [
            x
            for _, x in sorted(zip(order, total, strict=True), key=lambda pair: pair[0])
        ]
        return jax.tree.unflatten(structure, sums), found

    def _joined(self, x: jax.Array) -> jax.Array:
        """What was stacked, in the order of the batch."""
        if self.steps == 1:
            return x
        swapped = jnp.swapaxes(x, 0, 1)
        return swapped.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def _no_grads(self) -> list[jax.Array]:
        return [
            self._varied(jnp.zeros_like(x, dtype=widened(x, self.dtype)))
            for x in self.leaves.arrays
        ]

    def _no_counts(self) -> Counts:
        groups = () if self.groups.count is None else (self.groups.count,)
        zeros = Counts(*(jnp.zeros(s, jnp.int32) for s in (groups, (), ())))
        return jax.tree.map(self._varied, zeros)

    def _varied(self, x: PyTree) -> Any:
        return mesh.vary(jnp.asarray(x), self.axes) if self.axes else x

    def _gradients(self, batch: dict[int, PyTree]) -> tuple[list[jax.Array], Any]:
        """The gradient of each example, and what else its function returned."""
        args, axes = self._placed(batch)
        gradient = jax.grad(self.fun, self.argnums, has_aux=True)
        grads, aux = jax.vmap(gradient, axes)(*args)
        return in_rows(self._arrays_of(grads)), aux

    def _arrays_of(self, grads: PyTree) -> list[jax.Array]:
        flat = jax.tree.leaves(grads)
        return [flat[i] for i in self.leaves.indices]

    def _placed(self, batch: dict[int, PyTree]) -> tuple[list[Any], list[Any]]:
        args = [batch.get(i, arg) for i, arg in enumerate(self.args)]
        for i in self._argnums():
            # By the same parameter on all devices a gradient would be summed over them.
            args[i] = jax.tree.map(self._varied, args[i])
        return args, [0 if i in batch else None for i in range(len(args))]

    def _measure(
        self, batch: dict[int, PyTree], mask: jax.Array | None
    ) -> tuple[Counts, tuple[jax.Array, Any]]:
        arrays, aux = self._gradients(batch)
        norms = self._measured(arrays).norms
        return self._counts(norms, mask), (norms, aux)

    def _clip(
        self, batch: dict[int, PyTree], mask: jax.Array | None
    ) -> tuple[tuple[list[jax.Array], Counts], tuple[jax.Array, Any]]:
        arrays, aux = self._gradients(batch)
        found = self._measured(arrays)
        grads = weighted_sum(arrays, self.groups, found, mask)
        return (grads, self._counts(found.norms, mask)), (found.norms, aux)

    def _counts(self, norms: jax.Array, mask: jax.Array | None) -> Counts:
        finite = all_finite(norms)
        counted = finite | True if mask is None else mask
        over = ~(norms <= like_norms(self.limits, norms))
        counts = Counts(
            _count(over & along(counted, over.ndim)),
            _count(~finite & counted),
            _count(counted),
        )
        return jax.tree.map(self._varied, counts)

    def _measured(self, arrays: list[jax.Array]) -> Measured:
        groups, limits, response = self.groups, self.limits, self.response
        return measured(arrays, groups, limits, self.ord, response, self._places())

    def _places(self) -> list[mesh.Placement]:
        """Over which mesh axes each parameter is sharded; other examples aside."""
        arrays, paths = self.leaves.arrays, self.leaves.paths
        blind = mesh.is_unknown(None, None)
        found = []
        for place in mesh.placements(arrays, paths, () if blind else None, None):
            kept = tuple(name for name in place.axes if name not in self.axes)
            found.append(mesh.Placement(kept, None if kept else ()))
        return found

    def _weighted_gradient(
        self, batch: dict[int, PyTree], mask: jax.Array | None, norms: jax.Array
    ) -> tuple[list[jax.Array], None]:
        """The gradient of the weighted sum of the examples' losses."""
        finite = all_finite(norms)
        keep = finite if mask is None else finite & mask
        scale = scales_of(norms, self.limits, self.response)
        weights = jnp.where(keep, scale.fine, 0)
        tame = (weights > 2.0**-40) & (weights < 2.0**40) & (scale.coarse == 1)
        # At the largest number a norm may be more.
        tame &= norms < jnp.finfo(norms.dtype).max

        def at_once(batch: PyTree) -> list[jax.Array]:
            # 0 times NaN is NaN: another example stands in, with weight 0.
            clean = jax.tree.map(functools.partial(_replaced, finite), batch)
            args, axes = self._placed(clean)

            def total(*args: PyTree) -> jax.Array:
                losses, _ = jax.vmap(self.fun, axes)(*args)
                return jnp.sum(weights.astype(losses.dtype) * losses)

            grads = self._arrays_of(jax.grad(total, self.argnums)(*args))
            nothing = ~jnp.any(keep)
            return [
                jnp.where(nothing, 0, x.astype(widened(x, self.dtype))) for x in grads
            ]

        def each(batch: PyTree) -> list[jax.Array]:
            arrays, _ = self._gradients(batch)
            return weighted_sum(arrays, self.groups, self._measured(arrays), mask)

        # With a tiny or huge weight numbers on the way back might leave the range.
        usual = jnp.all(tame | (weights == 0))
        return lax.cond(usual, at_once, each, batch), None

    def _argnums(self) -> tuple[int, ...]:
        return (self.argnums,) if isinstance(self.argnums, int) else self.argnums


def example_axes(batch: list[PyTree], axis_name: AxisNames) -> tuple[str, ...]:
    """The mesh axes of manual code over which the examples are spread."""
    if axis_name is not None:
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        return tuple(name for name in names if mesh._is_bound(name))
    if mesh.blind_axes():
        raise ValueError(
            "Cannot tell over which mesh axes the examples are spread: JAX does not say"
            " it inside pmap, or inside shard_map with check_vma=False. Pass"
            " axis_name= with these axes, or axis_name=() if every device has the same"
            " examples."
        )
    return tuple(sorted({name for x in batch for name in mesh.varying(x)}))


def refuse_shards(leaves: Leaves, axes: tuple[str, ...]) -> None:
    """Of parameters that are cut over the examples' axes the sum would mix shards."""
    for path, leaf in zip(leaves.paths, leaves.arrays, strict=True):
        both = sorted({*mesh.varying(leaf)} & {*axes})
        if both:
            raise ValueError(
                f"{show(path)} varies over {both}, as the examples do: shards of it"
                " cannot be told from copies. Gather it before clipped_grad; or, if it"
                f" is the same on all devices, pass axis_name={axes}."
            )


def _count(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags, axis=0, dtype=jnp.int32)


def _replaced(finite: jax.Array, x: jax.Array) -> jax.Array:
    """The examples, with the first finite one in the place of each that is not."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _replaced(finite, jax.random.key_data(x))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # Made from `finite`, as it is sharded as the examples are.
    is_first = finite & (jnp.arange(x.shape[0]) == jnp.argmax(finite))
    here = along(is_first, x.ndim)
    first = jnp.sum(jnp.where(here, x, jnp.zeros_like(x)), axis=0, dtype=x.dtype)
    return jax.vmap(jnp.where, (0, 0, None))(finite, x, first)


def _is_narrow(fun: Callable[..., PyTree], batch: PyTree) -> bool:
    """Whether anything in a program is computed in less than float32."""

    def inside(jaxpr: Any) -> bool:
        for equation in jaxpr.eqns:
            for variable in (*equation.invars, *equation.outvars):
                dtype = getattr(variable.aval, "dtype", jnp.int32)
                if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32:
                    return True
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns") and inside(inner):
                    return True
        return False

    return inside(jax.make_jaxpr(fun)(batch).jaxpr)
