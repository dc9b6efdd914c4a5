"""How values lie on the device mesh: the one shim around JAX's sharding types.

Sums over a mesh need one fact about each leaf: over which mesh axes it is sharded.
Explicit axes and `shard_map(check_vma=True)` have it in the leaf's type; elsewhere
in manual code the caller says it, with `axis_name=` or `specs=`. With Auto axes and
on one device there is nothing to do: XLA adds what a plain sum needs.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._trees.arguments import AxisNames, Specs
from .._trees.leaves import Path, from_prefix, show
from .._trees.types import Shaped
from .config import config

Axes = tuple[Any, ...]  # names, or what JAX 0.7 puts in the place of one of pmap


class Placement(NamedTuple):
    """The mesh axes over which a leaf is sharded, and which array dimension each cuts.

    `dims` is None where only the set of axes is known.
    """

    axes: Axes
    dims: tuple[Axes, ...] | None

    def cut_by(self, dims: Sequence[Axes]) -> "Placement":
        """The placement after a further cut of each dimension."""
        axes = self.axes + tuple(name for d in dims for name in d)
        if self.axes and self.dims is None:
            return Placement(axes, None)
        outer = self.dims or ((),) * len(dims)
        return Placement(axes, tuple(a + b for a, b in zip(outer, dims, strict=True)))

    def without(self, reduced: Sequence[int]) -> "Placement":
        """The placement of what is left when some dimensions are summed up."""
        if not self.dims:
            return self
        dims = tuple(() if i in reduced else d for i, d in enumerate(self.dims))
        return Placement(tuple(name for d in dims for name in d), dims)


def placements(
    arrays: Sequence[Shaped], paths: list[Path], axis_name: AxisNames, specs: Specs
) -> list[Placement]:
    """Where each leaf of manual code is sharded; `()` outside of manual code."""
    manual = manual_axes()
    if specs is not None:
        given = from_prefix(
            specs,
            paths,
            "a PartitionSpec in specs=",
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        return [
            _from_spec(s, x, p) for s, x, p in zip(given, arrays, paths, strict=True)
        ]
    if axis_name is not None:
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        _refuse_misspelled(names, "axis_name=")
        bound = tuple(name for name in names if _is_bound(name))
        return [Placement(bound, () if not bound else None) for _ in arrays]
    if is_unknown(axis_name, specs):
        blind = blind_axes()
        raise ValueError(
            f"Cannot tell over which of the mesh axes {_quoted(blind)} the updates are"
            " sharded: JAX does not say it inside pmap, or inside shard_map with"
            " check_vma=False. Pass axis_name=() if every device holds the same updates"
            f" (as after jax.lax.pmean), axis_name={_example(blind)} if every leaf is"
            " sharded over it, or specs= with a PartitionSpec for each leaf. If you"
            " cannot edit the line that makes the clipper, and every device holds the"
            ' same updates, call optax_clipx.config.update("blind_axes", "replicated")'
            " once before the program is traced."
        )
    return [_from_type(x, p, manual) for x, p in zip(arrays, paths, strict=True)]


def whole_shape(shape: tuple[int, ...], place: Placement) -> tuple[int, ...]:
    """The shape on the whole mesh of a leaf of manual code; its own where unknown."""
    if not place.dims:
        return shape
    return tuple(n * size_of(axes) for n, axes in zip(shape, place.dims, strict=True))


def is_unknown(axis_name: AxisNames, specs: Specs) -> bool:
    """Whether nobody says over which axes the updates are sharded."""
    told = axis_name is not None or specs is not None
    return not told and config.blind_axes == "error" and bool(blind_axes())


def blind_axes() -> Axes:
    """The manual axes of several devices, where types do not say how values lie."""
    manual = manual_axes()
    if not manual or _has_types(manual):
        return ()
    return tuple(name for name in manual if lax.axis_size(name) > 1)


def axes_to_sum(arrays: Sequence[ArrayLike], places: Sequence[Placement]) -> Axes:
    """The axes of one sum over all leaves: where any is sharded, or varies by type."""
    axes = {name for place in places for name in place.axes}
    for array in arrays:
        axes |= varying(array)
    return tuple(sorted(axes))


def sum_over(value: jax.Array, axes: Axes) -> jax.Array:
    """`lax.psum`, for a value that varies over some of the axes only."""
    return lax.psum(vary(value, axes), axes) if axes else value


def max_over(value: jax.Array, axes: Axes) -> jax.Array:
    """`lax.pmax`, for a value that varies over some of the axes only."""
    return _pmax(vary(value, axes), axes) if axes else value


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _pmax(value: jax.Array, axes: Axes) -> jax.Array:
    return lax.pmax(value, axes)


@_pmax.defjvp
def _pmax_jvp(axes: Axes, primals: PyTree, tangents: PyTree) -> tuple[Any, Any]:
    # JAX has none. As that of `jnp.max`: the mean over all that are the largest.
    (value,), (tangent,) = primals, tangents
    top = lax.pmax(value, axes)
    largest = value == top
    total = lax.psum(jnp.where(largest, tangent, 0), axes)
    return top, total / lax.psum(largest.astype(tangent.dtype), axes)


def mean_over_devices(value: jax.Array, axis_name: AxisNames) -> jax.Array:
    """The mean over the manual axes over which a value varies, or may vary."""
    axes = set(varying(value))
    if axis_name is not None:
        names = (axis_name,) if isinstance(axis_name, str) else axis_name
        axes |= {name for name in names if _is_bound(name)}
    manual = manual_axes()
    if manual and not _has_types(manual):
        axes |= set(manual)
    ordered = tuple(sorted(axes))
    return sum_over(value, ordered) / size_of(ordered) if ordered else value


def size_of(axes: Axes) -> int:
    """The number of devices along the axes together."""
    return math.prod(lax.axis_size(name) for name in axes)


def index_in(axes: Axes) -> jax.Array:
    """This device's number along the axes together."""
    index = jnp.int32(0)
    for name in axes:
        index = index * lax.axis_size(name) + lax.axis_index(name)
    return index


def map_local(
    fun: Callable[..., PyTree],
    arrays: Sequence[ArrayLike],
    places: Sequence[Placement],
    extras: PyTree,
    out_specs: Callable[..., PyTree],
) -> Any:
    """Calls `fun(shards, placements, extras)` with the shards of Explicit axes.

    The placements are those given, cut further by the Explicit axes; without such axes
    the function is called with what is given. The extras are scalars. `out_specs(dims)`
    gives the PartitionSpecs of what `fun` returns, from the Explicit axes that cut each
    dimension of each array.
    """
    dims = [explicit_dims(x) for x in arrays]
    if not any(map(is_cut, arrays)):
        return fun(list(arrays), list(places), extras)
    cut = [p.cut_by(d) for p, d in zip(places, dims, strict=True)]
    return jax.shard_map(
        lambda shards, extras: fun(shards, cut, extras),
        in_specs=([PartitionSpec(*d) for d in dims], PartitionSpec()),
        out_specs=out_specs(dims),
        axis_names={name for d in dims for axes in d for name in axes},
    )(list(arrays), extras)


def explicit_dims(array: ArrayLike) -> tuple[Axes, ...]:
    """The Explicit mesh axes that cut each dimension of an array."""
    kind = jax.typeof(array)
    sharding = kind.sharding
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    dims = [
        tuple(name for name in _names(entry) if types.get(name) == AxisType.Explicit)
        for entry in sharding.spec
    ]
    return (*dims, *[()] * (kind.ndim - len(dims)))


def cut_sizes(array: ArrayLike) -> tuple[int, ...]:
    """Into how many parts the Explicit mesh axes cut each dimension of an array."""
    mesh = jax.typeof(array).sharding.mesh
    return tuple(
        math.prod(mesh.shape[name] for name in axes) for axes in explicit_dims(array)
    )


def knows_shards(array: ArrayLike) -> bool:
    """Whether all is known of how an array is sharded: no mesh axis is Auto."""
    meshes = (jax.typeof(array).sharding.mesh, jax.sharding.get_abstract_mesh())
    return not any(
        kind == AxisType.Auto and mesh.shape[name] > 1
        for mesh in meshes
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    )


def can_be_joined(arrays: Sequence[ArrayLike]) -> bool:
    """Whether arrays can become one, or be cut up: nothing hides how they lie.

    Under vmap an Explicit axis may cut them where their types do not show it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    hidden = any(
        kind == AxisType.Explicit and mesh.shape[name] > 1
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    )
    memories = {jax.typeof(x).memory_space for x in arrays}
    return not hidden and len(memories) == 1 and all(map(knows_shards, arrays))


def is_cut(array: ArrayLike) -> bool:
    """Whether an array is cut along Explicit mesh axes."""
    return any(name for names in explicit_dims(array) for name in names)


def lies_whole(array: ArrayLike) -> bool:
    """Whether each device holds all of an array, as far as types say."""
    return knows_shards(array) and not is_cut(array) and not varying(array)


@contextlib.contextmanager
def mesh_of(arrays: Sequence[PyTree], auto: bool = False) -> Iterator[None]:
    """Sets the mesh on which the arrays lie, where the caller has set none.

    Without it, new arrays would lie on no mesh: they would not go together with
    Explicit ones, and as a state they would change their type at the first update.
    Meshes whose axes are all Auto count if `auto` is set.
    """
    found = [x for x in arrays if _has_mesh(x, auto)]
    if not found or not jax.sharding.get_abstract_mesh().empty:
        yield
        return
    traced = [x for x in found if isinstance(x, jax.core.Tracer)]
    context: Any
    if traced:
        context = _abstract_mesh(jax.typeof(traced[0]).sharding.mesh)
    elif isinstance(jnp.zeros(()), jax.core.Tracer):  # arrays closed over by a jit
        mesh = found[0].sharding.mesh
        context = _abstract_mesh(mesh.abstract_mesh)
    else:
        context = jax.set_mesh(found[0].sharding.mesh)
    with context:
        yield


def _abstract_mesh(mesh: AbstractMesh) -> Any:
    """The context in which traced values lie on a mesh."""
    if not hasattr(jax.sharding, "use_abstract_mesh"):  # JAX 0.7
        raise ValueError(
            "Cannot set the mesh of traced updates with Explicit axes on JAX"
            f" {jax.__version__}. Set it around the program with jax.set_mesh(mesh), or"
            " install jax>=0.8."
        )
    return jax.sharding.use_abstract_mesh(mesh)


def _has_mesh(array: PyTree, auto: bool) -> bool:
    if isinstance(array, jax.core.Tracer):
        sharding = jax.typeof(array).sharding
    else:
        sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return False
    # Types of traced values say nothing of Auto axes, and need not.
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return explicit or (auto and not isinstance(array, jax.core.Tracer))


def refuse_unreduced(arrays: Sequence[ArrayLike], paths: Sequence[Path]) -> None:
    """A norm of partial sums has no meaning: ask for the reduction first."""
    for array, path in zip(arrays, paths, strict=True):
        unreduced = getattr(jax.typeof(array).sharding.spec, "unreduced", ())
        manual = getattr(jax.typeof(array), "manual_axis_type", None)
        unreduced = set(unreduced) | set(getattr(manual, "unreduced", ()))
        if unreduced:
            raise ValueError(
                f"The updates at {show(path)} are unreduced over the mesh axes"
                f" {_quoted(sorted(unreduced))}: each device holds a partial sum, whose"
                " norm means nothing. Reduce them first, with jax.reshard or"
                " jax.lax.psum."
            )


def manual_axes() -> Axes:
    """The mesh axes of the manual code that is being traced."""
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    if not axes and jax.__version_info__ < (0, 8):
        # There pmap is no shard_map, and its axes are known by their names alone. So
        # are those of vmap: a program that names them has to pass axis_name=().
        axes = tuple(jax.core.unsafe_get_axis_names_DO_NOT_USE())
    return axes


def _has_types(manual: Axes) -> bool:
    # An axis index varies over its axis; where the types are off, it does not say so.
    return manual[0] in varying(lax.axis_index(manual[0]))


def varying(value: PyTree) -> frozenset[str]:
    """The manual mesh axes over which a value varies, by its type."""
    kind = jax.typeof(value)
    if hasattr(kind, "vma"):  # until JAX 0.9
        return frozenset(kind.vma)
    return frozenset(kind.manual_axis_type.varying)


def vary(value: jax.Array, axes: Axes) -> jax.Array:
    """The value, typed as varying over the axes where types say so."""
    if not axes or not _has_types(manual_axes() or axes):
        return value
    missing = tuple(name for name in axes if name not in varying(value))
    if not missing:
        return value
    if not hasattr(lax, "pcast"):  # JAX 0.7
        return lax.pvary(value, missing)  # type: ignore[attr-defined]
    return lax.pcast(value, missing, to="varying")


def _from_type(array: Shaped, path: Path, manual: Axes) -> Placement:
    axes = tuple(name for name in manual if name in varying(array))
    return Placement(axes, None if axes else ())


def _from_spec(spec: object, array: Shaped, path: Path) -> Placement:
    if not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"Expected a jax.sharding.PartitionSpec in specs= for {show(path)}, got"
            f" {spec!r}."
        )
    if len(spec) > array.ndim:
        raise ValueError(
            f"Expected a PartitionSpec of at most {array.ndim} entries for"
            f" {show(path)} of shape {array.shape}, got {spec}."
        )
    _refuse_misspelled([n for entry in spec for n in _names(entry)], "specs=")
    dims = [tuple(n for n in _names(entry) if _is_bound(n)) for entry in spec]
    dims += [()] * (array.ndim - len(dims))
    return Placement(tuple(name for d in dims for name in d), tuple(dims))


def _names(entry: PyTree) -> Axes:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _refuse_misspelled(names: Sequence[str], argument: str) -> None:
    """In manual code a name that is no axis at all would leave a sum out."""
    manual = manual_axes()
    there = tuple(jax.sharding.get_abstract_mesh().axis_names) or manual
    unknown = [n for n in names if n not in there and not _is_bound(n)]
    if manual and unknown:
        raise ValueError(
            f"Expected {argument} to name axes of the mesh, got {_quoted(unknown)}; the"
            f" mesh has {_quoted(there)}."
        )


def _is_bound(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _example(names: Axes) -> str:
    return repr(names[0]) if len(names) == 1 else repr(tuple(names))
