"""What the fuzzing draws: configurations, and sequences of gradients with faults."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from all_methods import (
    ALL_METHODS,
    EVERY,
    OPTIMIZERS,
    WRAPPERS as WRAPPED,
    has_few_axes,
)
from hypothesis import strategies as st
from jax import lax

import optax_clipx as clipx

STEPS = 40  # of one sequence
FAULTS = ("nan", "inf", "-inf", "zero", "spike", "one", "denormal", "level", "extreme")
POLICIES = ("propagate", "zero", "sanitize")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


class Pair(NamedTuple):
    first: Any
    second: Any


class Config(NamedTuple):
    """One method in one wrapper, on one tree."""

    name: str
    outer: str
    policy: str
    limit: float | None
    tree: Any  # of arrays of zeros, of float0 and of nothing
    params: list[np.ndarray]  # of the leaves that are arrays
    chosen: list[bool]  # the leaves that reach the method
    center: float  # the usual magnitude, as a power of 10

    def __repr__(self):
        kinds = [f"{x.dtype}{list(x.shape)}" for x in self.params]
        limit = "" if self.limit is None else f", limit={self.limit:.3g}"
        return (
            f"<{self.outer}({self.name}{limit}), {self.policy}, {kinds} in"
            f" {jax.tree.structure(self.tree)}, usually 1e{self.center:.0f}>"
        )


WRAPPERS: dict[str, Callable[..., Any]] = {
    "itself": lambda tx, mask: tx,
    "track_norms": lambda tx, mask: clipx.track_norms(tx),
    "skip_spikes": lambda tx, mask: clipx.skip_spikes(
        tx,
        threshold=clipx.thresholds.zscore(
            4.0, warmup_steps=3, stats="skip", patience=5
        ),
    ),
    "error_feedback": lambda tx, mask: clipx.error_feedback(tx),
    "excluding": lambda tx, mask: clipx.excluding(tx, has_few_axes),
    "masked": lambda tx, mask: optax.masked(tx, mask),
    "reset_moments": lambda tx, mask: clipx.reset_moments(tx, every=5, warmup=2),
    "chain": lambda tx, mask: optax.chain(tx, clipx.zclip(warmup_steps=2)),
}


def draw_config(name: str, seed: int) -> Config:
    """A configuration; the same for the same seed."""
    rng = np.random.default_rng([seed, *name.encode()])
    outer = str(rng.choice(list(WRAPPERS), p=[0.44, *[0.08] * 7]))
    policy = str(rng.choice(POLICIES))
    limit = None
    if name in ALL_METHODS:
        limit = float(10.0 ** rng.choice([rng.uniform(-35, 35), rng.uniform(-2, 2)]))
    dtypes = ["float32", "float32", "bfloat16", "float16"]
    if EVERY[name].complex and rng.random() < 0.3:
        dtypes.append("complex64")
    if rng.random() < 0.15:
        dtypes = ["float64", "float64", "float32"]
    # optax's momentum does not take float0.
    odd = None if name in WRAPPED | OPTIMIZERS else np.zeros(2, jax.dtypes.float0)
    tree = draw_tree(rng, dtypes, odd, 0)
    # excluding() refuses a tree of which it would leave out nothing.
    tree = Pair(tree, (np.zeros(3, jnp.dtype(dtypes[0])),))
    leaves = list(filter(is_measured, jax.tree.leaves(tree)))
    params = [values(rng, x.shape, x.dtype, rng.uniform(-3, 1)) for x in leaves]
    leaves_out = name in ("excluding", "excluding_labels") and outer != "skip_spikes"
    chosen = [
        {"excluding": not has_few_axes((), x), "masked": x.ndim % 2 == 1}.get(
            outer, True
        )
        and not (leaves_out and has_few_axes((), x))
        for x in leaves
    ]
    center = rng.choice([rng.uniform(-30, 30), rng.uniform(-2, 2)])
    return Config(name, outer, policy, limit, tree, params, chosen, float(center))


def draw_tree(rng: np.random.Generator, dtypes: list[str], odd: Any, depth: int) -> Any:
    """A nested tree of a few leaves, and an odd one that is no gradient."""

    def child() -> Any:
        return draw_tree(rng, dtypes, odd, depth + 1)

    kind = rng.integers(0, 6) if depth < 2 else 6
    if kind == 0:
        return {"b": child(), "a": child()}
    if kind == 1:
        return [child()]
    if kind == 2:
        return (child(), None, child())
    if kind == 3:
        return Layer(child(), None)
    if kind == 4:
        return Pair(child(), {"integers": odd})
    shapes = [(), (1,), (4,), (2, 3), (3, 1, 2), (0, 2)]
    shape = shapes[rng.integers(0, len(shapes))]
    return np.zeros(shape, jnp.dtype(str(rng.choice(dtypes))))


def is_measured(leaf: Any) -> bool:
    return leaf.dtype != jax.dtypes.float0


def with_arrays(config: Config, arrays: list[Any]) -> Any:
    """The tree with these arrays in it."""
    rest = iter(arrays)
    return jax.tree.map(lambda x: next(rest) if is_measured(x) else x, config.tree)


def params_of(config: Config) -> Any:
    """The parameters; opposite a gradient of float0 there are integers."""
    rest = iter(config.params)
    return jax.tree.map(
        lambda x: jnp.asarray(next(rest)) if is_measured(x) else jnp.arange(2),
        config.tree,
    )


def transformation(config: Config) -> Any:
    """The method in its wrapper."""
    options = {"nonfinite": config.policy}
    if config.limit is None:
        tx = EVERY[config.name].make(**options)
    else:
        tx = ALL_METHODS[config.name](config.limit, **options)
    # MaskedNode takes a leaf out as None does, so that masks are of arrays alone.
    rest = iter(config.chosen)
    mask = jax.tree.map(lambda x: next(rest) if is_measured(x) else False, config.tree)
    return WRAPPERS[config.outer](tx, mask)


def compiled(config: Config) -> Callable[[list[np.ndarray]], Any]:
    """All updates and states of a sequence, as one compiled loop."""
    tx, params = transformation(config), params_of(config)
    start = tx.init(params)

    def step(state: Any, arrays: list[Any]) -> Any:
        updates = with_arrays(config, arrays)
        found, new = tx.update(updates, state, params)
        assert jax.tree.structure(found) == jax.tree.structure(updates)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        out = []
        for got, given in zip(*map(jax.tree.leaves, (found, updates)), strict=True):
            if is_measured(given):
                assert jax.typeof(got) == jax.typeof(given)
                out.append(got)
            else:
                assert got is given
        assert not any(x.weak_type for x in jax.tree.leaves((out, new)))
        return new, (out, new)

    # The level is that of LLVM: what XLA itself rewrites is the same, in half the time.
    run = jax.jit(
        lambda state, arrays: lax.scan(step, state, arrays),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return lambda arrays: jax.device_get(run(start, arrays)[1])


class Sequence(NamedTuple):
    """Of each step what goes wrong, and how far."""

    seed: int
    steps: list[tuple[str, float]]

    def __repr__(self):
        kinds = [f"{t}: {kind}" for t, (kind, _) in enumerate(self.steps)]
        faults = [k for k in kinds if not k.endswith("usual")]
        return f"<seed {self.seed}, {', '.join(faults)}>"


kinds = st.one_of(st.just("usual"), st.sampled_from(("usual", *FAULTS)))
sequences = st.builds(
    Sequence,
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(kinds, st.floats(0, 1)), min_size=STEPS, max_size=STEPS),
)


def gradients(config: Config, sequence: Sequence) -> list[np.ndarray]:
    """The gradients of all steps, stacked leaf by leaf."""
    rng = np.random.default_rng(sequence.seed)
    level, rows = 0.0, []
    for kind, far in sequence.steps:
        if kind == "level":
            level = 6 * far - 3
        rows.append(one_step(config, rng, kind, far, config.center + level))
    return [np.stack(leaf) for leaf in zip(*rows, strict=True)]


def one_step(
    config: Config, rng: np.random.Generator, kind: str, far: float, power: float
) -> list[np.ndarray]:
    """The gradients of one step."""
    power += 6 * far * (kind == "spike")
    spread = 4 * far * (kind == "extreme")
    if kind == "extreme":
        power = rng.uniform(-45, 39)
    leaves = [values(rng, x.shape, x.dtype, power, spread) for x in config.params]
    if kind == "zero":
        leaves = [np.zeros_like(x) for x in leaves]
    if kind == "denormal":
        leaves = [x * 0 + least(x.dtype) * x.dtype.type(0.25) for x in leaves]
    filled = [x for x in leaves if x.size]
    if kind in ("nan", "inf", "-inf", "one"):
        leaf = filled[rng.integers(0, len(filled))]
        largest = jnp.finfo(leaf.dtype).max
        value = largest * far if kind == "one" else float(kind)
        leaf.flat[rng.integers(0, leaf.size)] = value
    return leaves


def values(
    rng: np.random.Generator, shape: Any, dtype: Any, power: float, spread: float = 0.3
) -> np.ndarray:
    """Numbers of about a power of ten, finite in their dtype."""
    info = jnp.finfo(dtype)
    powers = rng.normal(power, spread, shape)
    edge = np.log10(float(info.max)) - 0.01
    sizes = 10.0 ** np.clip(powers, np.log10(float(info.tiny)) + 0.01, edge)
    sizes = sizes * rng.choice([-1.0, 1.0], shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        sizes = sizes * np.exp(1j * rng.uniform(0, 6, shape)) * 0.7
    return np.asarray(sizes).astype(dtype)


def least(dtype: Any) -> Any:
    return jnp.finfo(dtype).tiny
