"""Sums of clipped gradients of single examples, by microbatch, in one pass or two."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _mesh, _scaling
from ._example_groups import ExampleGroups, along
from ._leaves import Leaves
from ._reductions import _norms, as_they_are, times, widened
from ._scaling import Scales


class Sums(NamedTuple):
    """What is summed up over the examples of all devices."""

    grads: list[jax.Array]
    over: jax.Array  # for each group how many examples were above its limit
    nonfinite: jax.Array
    count: jax.Array


class Example(NamedTuple):
    """What is known of each example, along axis 0."""

    norms: jax.Array  # packed
    scales: Scales
    finite: jax.Array
    aux: Any


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
    response: _scaling.Response
    axes: tuple[str, ...]  # the mesh axes of manual code that hold other examples
    dtype: Any

    def sums(self, mask: Any, two_pass: bool) -> tuple[Sums, jax.Array, Any]:
        """The sums, the norms of the examples, and what else `fun` returned."""
        examples = ({i: self.args[i] for i in self.batch_argnums}, mask)
        whole = self.groups.of_one.count is None
        if two_pass and whole and not _is_narrow(self._gradients, examples[0]):
            # Where products are rounded, both passes must round alike.
            with jax.default_matmul_precision("highest"):
                _, found = self._over_microbatches(self._measure, examples)
                known = (*examples, found.scales, found.finite)
                grads, _ = self._over_microbatches(self._weighted_gradient, known)
        else:
            grads, found = self._over_microbatches(self._clip, examples)
        counted = found.finite | True if mask is None else mask
        over = ~(found.norms <= self._limits_of(found.norms))
        sums = Sums(
            grads,
            _count(over & along(counted, over.ndim)),
            _count(~found.finite & counted),
            _count(counted),
        )
        if self.axes:
            sums = lax.psum(jax.tree.map(self._varied, sums), self.axes)
        return sums, found.norms, found.aux

    def _over_microbatches(
        self, fun: Callable[..., tuple[Any, Any]], examples: Any
    ) -> tuple[Any, Any]:
        """Adds up the first output of a function of examples, joins the second."""
        if self.steps == 1:
            return fun(*examples)

        # Every steps-th example: so each microbatch lies on the devices as all of them
        # do, and the batch is not copied.
        def take(i: jax.Array, x: jax.Array) -> jax.Array:
            parts = x.reshape(x.shape[0] // self.steps, self.steps, *x.shape[1:])
            return lax.dynamic_index_in_dim(parts, i, 1, keepdims=False)

        def step(total: Any, i: jax.Array) -> tuple[Any, Any]:
            part, found = fun(*jax.tree.map(functools.partial(take, i), examples))
            return jax.tree.map(jnp.add, total, part), found

        start = None if fun == self._measure else self._zeros()
        total, found = lax.scan(step, start, jnp.arange(self.steps))
        return total, jax.tree.map(_joined, found)

    def _zeros(self) -> list[jax.Array]:
        return [
            self._varied(jnp.zeros_like(x, dtype=widened(x, self.dtype)))
            for x in self.leaves.arrays
        ]

    def _varied(self, x: Any) -> jax.Array:
        return _mesh._vary(jnp.asarray(x), self.axes) if self.axes else x

    def _gradients(self, batch: dict[int, Any]) -> tuple[list[jax.Array], Any]:
        """The gradient of each example, and what else its function returned."""
        args, axes = self._placed(batch)
        grads, aux = jax.vmap(jax.grad(self.fun, self.argnums, has_aux=True), axes)(
            *args
        )
        flat = jax.tree.leaves(grads)
        # Behind a barrier, so that what is measured is what is added up: XLA may keep
        # the digits that one consumer of a bfloat16 array would not see.
        return list(
            lax.optimization_barrier([flat[i] for i in self.leaves.indices])
        ), aux

    def _placed(self, batch: dict[int, Any]) -> tuple[list[Any], list[Any]]:
        args = [batch.get(i, arg) for i, arg in enumerate(self.args)]
        for i in self._argnums():
            # By the same parameter on all devices a gradient would be summed over them.
            args[i] = jax.tree.map(self._varied, args[i])
        return args, [0 if i in batch else None for i in range(len(args))]

    def _measure(self, batch: dict[int, Any], mask: Any) -> tuple[None, Example]:
        arrays, aux = self._gradients(batch)
        return None, self._measured(arrays, aux)

    def _clip(
        self, batch: dict[int, Any], mask: Any
    ) -> tuple[list[jax.Array], Example]:
        arrays, aux = self._gradients(batch)
        found = self._measured(arrays, aux)
        return self._weighted_sum(arrays, mask, found.scales, found.finite), found

    def _measured(self, arrays: list[jax.Array], aux: Any) -> Example:
        places = tuple(self._places())
        groups, ord = self.groups, self.ord
        (norms,) = _norms((tuple(arrays),), (), groups, ord, places, as_they_are)
        limits = self._limits_of(norms.value)
        scales = _scaling.scales(norms, limits, self.response)
        finite = jnp.isfinite(norms.value)
        if finite.ndim > 1:
            finite = jnp.all(finite, axis=1)
        return Example(norms.value, scales, finite, aux)

    def _places(self) -> Iterator[_mesh.Placement]:
        """Over which mesh axes each parameter is sharded; other examples aside."""
        blind = _mesh.is_unknown(None, None)
        for place in _mesh.placements(
            self.leaves.arrays, self.leaves.paths, () if blind else None, None
        ):
            kept = tuple(name for name in place.axes if name not in self.axes)
            yield _mesh.Placement(kept, None if kept else ())

    def _limits_of(self, norms: jax.Array) -> jax.Array:
        # Zeros made from the norms, so that limits lie on the mesh as they do.
        zeros = (norms != norms).astype(norms.dtype) * 0
        limits = self.limits.astype(norms.dtype)
        return zeros + (limits if norms.ndim == 1 else limits[None])

    def _weighted_sum(
        self, arrays: list[jax.Array], mask: Any, scales: Scales, finite: jax.Array
    ) -> list[jax.Array]:
        """The scaled gradients added up in the accumulator's dtype."""
        keep = finite if mask is None else finite & mask
        spread = self.groups.spread
        coarse, fine = spread(scales.coarse), spread(scales.fine)
        flags = [along(keep, x.ndim) for x in arrays]
        wide = [x.astype(widened(x, self.dtype)) for x in arrays]

        def one_by_one(wide: Any, flags: Any, coarse: Any, fine: Any) -> list[Any]:
            return [
                jnp.sum(jnp.where(k, times(times(x, c), f), 0), axis=0)
                for x, k, c, f in zip(wide, flags, coarse, fine, strict=True)
            ]

        def product(x: jax.Array, weights: jax.Array) -> jax.Array:
            return jnp.tensordot(weights.reshape(-1), x, 1, precision="highest")

        # On CPU a sum along the first axis takes up to 80 times as long as a product
        # of a vector and a matrix, but there 0 times NaN is NaN.
        def on_cpu(wide: Any, flags: Any, coarse: Any, fine: Any) -> list[Any]:
            weights = [jnp.where(k, f, 0) for k, f in zip(flags, fine, strict=True)]
            usual = jnp.all(finite)
            for c in jax.tree.leaves(scales.coarse):
                usual = usual & jnp.all(c == 1)

            def plain(wide: Any) -> list[Any]:
                return list(map(product, wide, weights))

            def careful(wide: Any) -> list[Any]:
                kept = zip(wide, flags, coarse, strict=True)
                rid = [jnp.where(k, times(x, c), 0) for x, k, c in kept]
                return list(map(product, rid, weights))

            return lax.cond(usual, plain, careful, wide)

        plain_types = all(
            not jnp.iscomplexobj(x) and not _is_cut(x) for x in arrays
        )
        if not plain_types:
            return one_by_one(wide, flags, coarse, fine)
        return lax.platform_dependent(
            wide, flags, coarse, fine, cpu=on_cpu, default=one_by_one
        )

    def _weighted_gradient(
        self, batch: dict[int, Any], mask: Any, scales: Scales, finite: jax.Array
    ) -> tuple[list[jax.Array], None]:
        """The gradient of the weighted sum of the examples' losses."""
        keep = finite if mask is None else finite & mask
        info = jnp.finfo(self.dtype)
        fine = jnp.where(keep, scales.fine, 0)
        tame = (fine == 0) | ((fine > info.tiny * 2**20) & (fine < info.max * 2**-20))
        usual = jnp.all(tame & (~keep | (scales.coarse == 1)))

        def at_once(batch: Any) -> list[jax.Array]:
            # 0 times NaN is NaN: another example stands in, with weight 0.
            clean = jax.tree.map(functools.partial(_replaced, finite), batch)

            args, axes = self._placed(clean)

            def total(*args: Any) -> jax.Array:
                losses, _ = jax.vmap(self.fun, axes)(*args)
                return jnp.sum(fine.astype(losses.dtype) * losses)

            flat = jax.tree.leaves(jax.grad(total, self.argnums)(*args))
            found = [flat[i] for i in self.leaves.indices]
            none = ~jnp.any(keep)
            return [
                jnp.where(none, 0, x.astype(widened(x, self.dtype))) for x in found
            ]

        def each(batch: Any) -> list[jax.Array]:
            arrays, _ = self._gradients(batch)
            return self._weighted_sum(arrays, mask, scales, finite)

        return lax.cond(usual, at_once, each, batch), None

    def _argnums(self) -> tuple[int, ...]:
        return (self.argnums,) if isinstance(self.argnums, int) else self.argnums


def example_axes(batch: list[Any], axis_name: Any) -> tuple[str, ...]:
    """The mesh axes of manual code over which the examples are spread."""
    if axis_name is not None:
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        return tuple(name for name in names if _mesh._is_bound(name))
    if _mesh.is_unknown(None, None):
        raise ValueError(
            "Cannot tell over which mesh axes the examples are spread: inside pmap, and"
            " shard_map with check_vma=False, types do not say. Pass axis_name= with"
            " these axes, or axis_name=() if every device has the same examples."
        )
    return tuple(sorted({name for x in batch for name in _mesh.varying(x)}))


def _joined(x: jax.Array) -> jax.Array:
    swapped = jnp.swapaxes(x, 0, 1)
    return swapped.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _count(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags.astype(jnp.int32), axis=0)


def _is_cut(x: jax.Array) -> bool:
    """Whether the examples lie along an Explicit mesh axis."""
    return any(name for names in _mesh._explicit_dims(jax.typeof(x)) for name in names)


def _replaced(finite: jax.Array, x: jax.Array) -> jax.Array:
    """The examples, with the first finite one in the place of each that is not."""
    index = jnp.argmax(finite)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        first = x[index]
    else:
        here = along(jnp.arange(x.shape[0]) == index, x.ndim)
        first = jnp.sum(jnp.where(here, x, jnp.zeros_like(x)), axis=0, dtype=x.dtype)
    return jnp.where(along(finite, x.ndim), x, first[None])


def _is_narrow(fun: Callable[..., Any], batch: Any) -> bool:
    """Whether anything in a program is computed in less than float32."""
    def inside(jaxpr: Any) -> bool:
        for equation in jaxpr.eqns:
            for variable in (*equation.invars, *equation.outvars):
                dtype = getattr(variable.aval, "dtype", None)
                if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                    if jnp.finfo(dtype).bits < 32:
                        return True
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns") and inside(inner):
                    return True
        return False

    return inside(jax.make_jaxpr(fun)(batch).jaxpr)
