"""A step of clipping as an optax transformation: state, policies, empty trees."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import PyTree

from .._devices.mesh import mesh_of
from .._reductions.groups import Packed
from .._thresholds.base import Context, Threshold, no_memory
from .._trees.arithmetic import is_concrete
from .._trees.leaves import Leaves, flatten
from .._trees.types import AnyArray
from . import metrics as _metrics, policies, summary as _summary
from .known_norm import Known, find_norm
from .metrics import ClipState
from .policies import Options as Options
from .summary import Summary


class Memory(NamedTuple):
    """What a clipper has from the steps before."""

    rule: Any = ()
    steps: Any = 0
    metrics: Any = None

    def after(self, summary: Summary, rule: PyTree) -> "Memory":
        """What it has after one more step."""
        memory = self.with_rule(summary.nonfinite, rule)
        return memory._replace(metrics=self.metrics_after(summary))

    def with_rule(self, nonfinite: jax.Array, rule: PyTree) -> "Memory":
        """A step that is not finite teaches no rule."""

        def kept(new: AnyArray, old: AnyArray) -> jax.Array:
            new = lax.convert_element_type(new, old.dtype)
            return lax.select(nonfinite, old, new)

        return self._replace(rule=jax.tree.map(kept, rule, self.rule))

    def metrics_after(self, summary: Summary) -> Any:
        """The metrics after one more step, where they are kept."""
        if self.metrics is None:
            return None
        return _metrics.advance(self.metrics, summary)


class Given(NamedTuple):
    """What goes into a step."""

    leaves: Leaves
    params: Any
    memory: Memory
    extra: Mapping[str, Any]
    known: Known = None  # the 2-norm of the leaves, if somebody has it already


Step = Callable[[Given], tuple[list[Any], Memory]]


def transformation(
    init_rule: Callable[[Leaves], Any] | None,
    step: Step,
    rule: Threshold,
    options: Options,
) -> optax.GradientTransformationExtraArgs:
    """A step as an optax transformation: state, policies, leaves that pass through.

    `step(given)` gives the new arrays and what is remembered.
    `init_rule` is None where nothing is remembered. Then `init` does not look at the
    parameters, and `update` takes any state.
    """
    policies.check_policy(options.nonfinite)
    clipper = _Clipper(init_rule, rule, options)
    compiled = jax.jit(step)
    used: list[bool] = []

    def update(
        updates: PyTree, state: PyTree = None, params: PyTree = None, **extra: PyTree
    ) -> tuple[Any, Any]:
        leaves, state = flatten(updates), clipper.started(state, updates)
        memory = clipper.memory(state)
        if not leaves.arrays:
            return updates, _after_nothing(state)
        needed, known = params if rule.uses_params else None, find_norm(leaves.arrays)
        given, run = Given(leaves, needed, memory, extra, known), step
        if is_concrete(given) and options.nonfinite != "raise":
            # From the second step on: `inject_hyperparams` makes each step a new one.
            run = compiled if used and options.norm_arg not in extra else step
            used[:] = [True]
        with mesh_of(leaves.arrays):
            arrays, memory = run(given)
        kept = isinstance(state, ClipState)
        after = ClipState(memory.metrics, memory.rule) if kept else state
        return leaves.rebuild(arrays), after

    return optax.GradientTransformationExtraArgs(clipper.init, update)


class _Clipper(NamedTuple):
    """What a clipper remembers: how it begins, and whether a state is its own."""

    init_rule: Callable[[Leaves], Any] | None
    rule: Threshold
    options: Options

    def init(self, params: PyTree) -> Any:
        with mesh_of(jax.tree.leaves(params), auto=True):
            rule_state: Any = ()
            if self.init_rule is not None:
                rule_state = self.init_rule(flatten(params, updates=False))
            if not self._keeps_metrics() and not jax.tree.leaves(rule_state):
                return optax.EmptyState()
            return ClipState(_metrics.fresh(self.options.metrics), rule_state)

    def started(self, state: PyTree, updates: PyTree) -> Any:
        """The state, or a new one where there is none and none is needed."""
        if state is not None:
            return state
        state = self.init(updates)
        if jax.tree.leaves(getattr(state, "rule", ())):
            raise ValueError(
                "Expected the state of an adaptive clipper, got None. Call"
                " init(params) first and pass its state on."
            )
        return state

    def memory(self, state: PyTree) -> Memory:
        """What a state remembers; a state of another clipper is refused."""
        kept = isinstance(state, ClipState)
        needed = self.init_rule is not None or self.rule.uses_step
        empty = not self._keeps_metrics() and isinstance(state, optax.EmptyState)
        if needed and not empty:
            check_state(state, ClipState)
        if self.init_rule is None and kept and jax.tree.leaves(state.rule):
            raise TypeError(of_another_rule("nothing", state.rule))
        if not kept:
            return Memory((), jnp.zeros((), jnp.int32), None)
        return Memory(state.rule, state.metrics.steps, state.metrics)

    def _keeps_metrics(self) -> bool:
        return self.options.metrics or self.rule.uses_step


def _after_nothing(state: PyTree) -> Any:
    """The state after updates without any leaf."""
    if not isinstance(state, ClipState):
        return state
    metrics = _metrics.advance(state.metrics, _summary.nothing())
    return ClipState(metrics, state.rule)


def check_state(state: object, kind: type) -> None:
    """Refuses a state that is not of the kind that `init` makes."""
    if isinstance(state, kind):
        return
    raise TypeError(
        f"Expected the {kind.__name__} that init(params) returned, got a state of type"
        f" {kind_of(state)}. Call state = tx.init(params) once and pass"
        " on what update returns; for a checkpoint of another optimizer call"
        " optax_clipx.carry_over(old_state, tx.init(params))."
    )


def check_memory(memory: object, kind: type) -> None:
    """Refuses what another clipper remembers, or an older version of this one."""
    if not isinstance(memory, kind):
        raise TypeError(of_another_rule(kind.__name__, memory))


def checked(rule: Threshold) -> Threshold:
    """The rule, which refuses a state that its `init` did not make of such norms.

    One of other leaves might broadcast without an error.
    """
    if rule.init is no_memory:
        return rule
    usual: dict[Any, Any] = {}  # by the shapes of norms

    def init(norms: Packed) -> Any:
        state = rule.init(norms)
        usual[_shapes(norms)] = jax.tree.map(jax.typeof, state)
        return state

    def update(norms: Packed, state: PyTree, context: Context) -> tuple[Any, Any]:
        shapes = _shapes(norms)
        if shapes not in usual:
            jax.eval_shape(init, norms)
        _refuse_state_of_others(usual[shapes], state)
        return rule.update(norms, state, context)

    return rule._replace(init=init, update=update)


def _shapes(tree: PyTree) -> tuple[tuple[int, ...], ...]:
    return tuple(map(jnp.shape, jax.tree.leaves(tree)))


def _refuse_state_of_others(usual: PyTree, state: PyTree) -> None:
    kinds = {type(s) for s in (usual, state) if not jax.tree_util.all_leaves([s])}
    if len(kinds) > 1:
        raise TypeError(of_another_rule(kind_of(usual), state))
    want, got = _shapes(usual), _shapes(state)
    if want != got:
        raise ValueError(
            "Expected a state that init made for leaves like these, in which the rule"
            f" remembers arrays of shapes {list(want)}, got {list(got)}. Make a new one"
            " with init(params), or pass the updates it was made for."
        )


def of_another_rule(usual: str, memory: object) -> str:
    """The message for what another clipper remembers."""
    return (
        f"Expected a state whose rule remembers {usual}, as init of this"
        f" clipper makes it, got the {kind_of(memory)} of another clipper. Make a new"
        " one with init(params), or call optax_clipx.carry_over(old_state,"
        " tx.init(params))."
    )


def kind_of(state: PyTree) -> str:
    """The type of a state for an error message; of a chain's the types of its parts."""
    if type(state) not in (tuple, list):
        return type(state).__name__
    parts = ", ".join(dict.fromkeys(type(part).__name__ for part in state))
    return f"{type(state).__name__} of {parts}" if parts else "nothing"
