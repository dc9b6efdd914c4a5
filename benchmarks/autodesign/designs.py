"""The rules that were tried for `auto_clip`, and those they are compared with."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clipbench.earlier import twice_a_low_quantile

import optax_clipx as clipx
from autodesign.training import Design, constant, hard
from optax_clipx._methods.auto import compress
from optax_clipx._thresholds.base import memory, per_norm, put
from optax_clipx.thresholds import Context, Threshold

BASELINES = {
    "none": Design(constant(jnp.inf), guarded=False),
    "fixed 1.0": Design(constant(1.0)),
    "zclip": Design(clipx.thresholds.zscore(2.5)),
    "AutoClip": Design(clipx.thresholds.quantile(0.1)),
}
FIRST = 10  # norms; their median is the anchor
PACE = 0.02  # of a tracked quantile's logarithm, after the first steps


class Anchor(NamedTuple):
    """The first norms, how many norms there were, and the first value of the loss."""

    first: jax.Array
    seen: jax.Array
    value: jax.Array


def anchored(
    anchor: Anchor, norm: jax.Array, context: Context, place: float = 0.5
) -> Any:
    """The median of the first norms, this one included, and the memory after it."""
    size = anchor.first.shape[-1]
    first = put(anchor.first, anchor.seen, norm)
    seen = jnp.minimum(anchor.seen + 1, 2**20)
    count = jnp.minimum(seen, size)
    used = jnp.arange(size) < count[..., None]
    ordered = jnp.sort(jnp.where(used, first, jnp.inf), axis=-1)
    rank = (count * place).astype(jnp.int32)
    middle = jnp.take_along_axis(ordered, rank[..., None], axis=-1)[..., 0]
    value = jnp.where(anchor.seen == 0, context.extra["value"], anchor.value)
    return middle, Anchor(first, seen, value)


def no_anchor(norms: jax.Array, size: int = FIRST) -> Anchor:
    """Before the first norm."""
    return Anchor(memory(norms, size=size), memory(norms, jnp.int32), memory(norms))


class Levels(NamedTuple):
    """What a rule may look at: all but the anchor are of the steps before this one.

    Attributes:
        norm: of this step.
        anchor: the median of the first norms.
        level: a quantile of the norms, tracked.
        lowest: the lowest that it has been.
        mean: a moving average of the logarithm of the norms.
        spread: a moving average of the distance from it.
        seen: how many norms there were, this one included.
        fallen: the loss divided by its first value.
        step: the number of the step.
    """

    norm: Any
    anchor: Any
    level: Any
    lowest: Any
    mean: Any
    spread: Any
    seen: Any
    fallen: Any
    step: Any


def rule(
    threshold: Callable[[Levels], Any],
    share: float = 0.5,
    size: int = FIRST,
    place: float = 0.5,
    pace: float = PACE,
    steady: bool = False,
    again: tuple[float, int] | None = None,
) -> Threshold:
    """A rule from what it makes of the levels; `share` is below the tracked one.

    The anchor is at this place of so many first norms in their order. A steady level is
    the anchor until all of these are there, and only then follows the norms. With
    `again`, so many times the anchor and so many norms, the rule starts again after so
    many norms in a row above it.
    """
    factor, in_a_row = again or (jnp.inf, 1)

    def update(norm: jax.Array, state: Any, context: Context) -> Any:
        memory, level, lowest, mean, spread, far = state
        anew = far >= in_a_row
        memory = memory._replace(seen=jnp.where(anew, 0, memory.seen))
        anchor, memory = anchored(memory, norm, context, place)
        far = jnp.where(norm > factor * anchor, jnp.where(anew, 0, far) + 1, 0)
        begun = memory.seen > 1
        log = jnp.log(norm)
        level, lowest, mean = (
            jnp.where(begun, x, y)
            for x, y in ((level, norm), (lowest, norm), (mean, log))
        )
        value = context.extra["value"]
        fallen = jnp.where(jnp.isfinite(value), value / memory.value, jnp.inf)
        limit = threshold(
            Levels(
                norm, anchor, level, lowest, mean, spread, memory.seen, fallen,
                context.step,
            )
        )  # fmt: skip
        rate = jnp.maximum(pace, 1 / (memory.seen + 1))
        level = level * jnp.exp(rate * jnp.where(norm > level, share, share - 1))
        if steady:
            level = jnp.where(memory.seen <= size, anchor, level)
        lowest = jnp.where(memory.seen <= FIRST, level, jnp.minimum(lowest, level))
        off = jnp.clip(log - mean, -3, 3)
        mean = mean + rate * off
        spread = spread + rate * (jnp.abs(off) - spread)
        return limit, (memory, level, lowest, mean, spread, far)

    def init(norms: jax.Array) -> Any:
        levels = (memory(norms) for _ in range(4))
        return no_anchor(norms, size), *levels, memory(norms, jnp.int32)

    return per_norm(init, update)


def simple(
    threshold: Callable[[Levels], Any],
    share: float = 0.5,
    response: Callable[[Any, Any], Any] = hard,
    **options: Any,
) -> Design:
    """A design with a rule of its levels."""
    return Design(rule(threshold, share, **options), response)


def smooth(norm: Any, limit: Any, p: float = 1.0) -> Any:
    """The norm approaches the threshold from below."""
    return (1 + (norm / limit) ** p) ** (-1 / p)


def logarithmic(norm: Any, limit: Any, most: float = jnp.inf) -> Any:
    """Above the threshold the norm grows as its logarithm, to so many thresholds."""
    over = jnp.maximum(norm / limit, 1)
    return jnp.minimum(1 + jnp.log(over), most) / over


def root(norm: Any, limit: Any, most: float = 10.0) -> Any:
    """Above the threshold the norm grows as its root, to ten times the threshold."""
    over = jnp.maximum(norm / limit, 1)
    return jnp.minimum(jnp.sqrt(over), most) / over


def as_power(norm: Any, limit: Any, power: float, most: float = 30.0) -> Any:
    """Above the threshold the norm grows as a power, to so many times the threshold."""
    over = jnp.maximum(norm / limit, 1)
    return jnp.minimum(over**power, most) / over


def enlarged(norm: Any, limit: Any) -> Any:
    """Every norm becomes the threshold."""
    return limit / norm


def families() -> dict[str, Design]:
    """Every design by its name, in the order in which they were tried."""
    designs: dict[str, Design] = {
        "twice the 5th percentile": Design(twice_a_low_quantile())
    }
    for c in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        designs[f"anchor {c:g}"] = simple(lambda s, c=c: c * s.anchor)
    for c, k in ((0.1, 1.0), (0.3, 1.0), (0.3, 2.0), (1.0, 2.0)):
        designs[f"anchor {c:g} or {k:g} times 5th percentile"] = simple(
            lambda s, c=c, k=k: jnp.minimum(c * s.anchor, k * s.level), 0.05
        )
    for c in (0.1, 0.3, 1.0):
        designs[f"median {c:g}"] = simple(lambda s, c=c: c * s.level)
        designs[f"lowest median {c:g}"] = simple(lambda s, c=c: c * s.lowest)
    for c in (0.1, 0.3):
        designs[f"anchor and median {c:g}"] = simple(
            lambda s, c=c: c * jnp.sqrt(s.anchor * s.level)
        )
        designs[f"anchor and lowest median {c:g}"] = simple(
            lambda s, c=c: c * jnp.sqrt(s.anchor * s.lowest)
        )
    for k in (1.0, 2.0, 4.0):
        designs[f"anchor, spread {k:g}"] = simple(
            lambda s, k=k: s.anchor * jnp.exp(-k * s.spread)
        )
    for c in (0.1, 0.3):
        designs[f"anchor {c:g}, smooth"] = simple(
            lambda s, c=c: c * s.anchor, response=smooth
        )
    designs["anchor 0.1, enlarged"] = simple(
        lambda s: 0.1 * s.anchor, response=enlarged
    )
    designs["anchor 1, enlarged"] = simple(lambda s: s.anchor, response=enlarged)
    for c in (0.1, 0.3, 1.0):
        designs[f"anchor {c:g}, falls with the loss"] = simple(
            lambda s, c=c: c * s.anchor * jnp.clip(s.fallen, 0.01, 1)
        )
    for c in (0.1, 0.3):
        designs[f"anchor {c:g}, slow start"] = simple(
            lambda s, c=c: c * s.anchor * jnp.minimum(1, 0.1 + s.seen / 100)
        )
    return designs | second_round()


def second_round() -> dict[str, Design]:
    """What the first ones suggested: other responses, and anchors that follow up."""
    designs: dict[str, Design] = {}
    for c in (0.01, 0.03, 0.1, 0.3, 1.0):
        designs[f"anchor {c:g}, logarithmic"] = simple(
            lambda s, c=c: c * s.anchor, response=logarithmic
        )
    for c in (0.03, 0.1, 0.3):
        designs[f"anchor {c:g}, root"] = simple(
            lambda s, c=c: c * s.anchor, response=root
        )
    for c in (0.1, 0.3):
        designs[f"median {c:g}, logarithmic"] = simple(
            lambda s, c=c: c * s.level, response=logarithmic
        )
        designs[f"anchor and median {c:g}, logarithmic"] = simple(
            lambda s, c=c: c * jnp.sqrt(s.anchor * s.level), response=logarithmic
        )
        designs[f"anchor or 5th percentile {c:g}"] = simple(
            lambda s, c=c: c * jnp.maximum(s.anchor, s.level), 0.05
        )
        designs[f"anchor or 5th percentile {c:g}, logarithmic"] = simple(
            lambda s, c=c: c * jnp.maximum(s.anchor, s.level),
            0.05,
            response=logarithmic,
        )
        designs[f"anchor or median {c:g}"] = simple(
            lambda s, c=c: c * jnp.maximum(s.anchor, s.level)
        )
    designs["anchor 0.1, logarithmic, slow start"] = simple(
        lambda s: 0.1 * s.anchor * jnp.minimum(1, 0.1 + s.seen / 100),
        response=logarithmic,
    )
    designs["lowest median 0.3, logarithmic"] = simple(
        lambda s: 0.3 * s.lowest, response=logarithmic
    )
    for c in (0.15, 0.2):
        designs[f"anchor {c:g}"] = simple(lambda s, c=c: c * s.anchor)
    for c in (0.05, 0.1, 0.2):
        for size, place in ((3, 0.5), (5, 0.5), (10, 0.8)):
            designs[f"anchor {c:g}, {place:g} of the first {size}"] = simple(
                lambda s, c=c: c * s.anchor, size=size, place=place
            )
    return designs | third_round()


def grown(s: Levels, start: float = 0.1, steps: int = 100) -> Any:
    """From this to 1 in so many steps."""
    return jnp.minimum(1, start + (1 - start) * s.seen / steps)


def third_round() -> dict[str, Design]:
    """Slow starts; the anchor is the lower median from here on."""
    designs: dict[str, Design] = {}

    def add(name: str, threshold: Any, *options: Any, **named: Any) -> None:
        designs[name] = simple(threshold, *options, place=0.49, **named)

    for c, start, steps in (
        (0.3, 0.1, 30),
        (0.3, 0.1, 100),
        (0.3, 0.1, 300),
        (0.5, 0.1, 100),
        (1.0, 0.03, 300),
    ):
        add(
            f"slow start {c:g}, from {start:g} in {steps}",
            lambda s, c=c, a=start, b=steps: c * s.anchor * grown(s, a, b),
        )
    for c, start, steps in (
        (0.03, 0.1, 100),
        (0.05, 0.1, 100),
        (0.1, 0.1, 30),
        (0.1, 0.1, 100),
        (0.1, 0.1, 300),
        (0.1, 0.03, 100),
        (0.1, 0.3, 100),
        (0.2, 0.1, 100),
        (0.3, 0.1, 100),
    ):
        add(
            f"logarithmic slow start {c:g}, from {start:g} in {steps}",
            lambda s, c=c, a=start, b=steps: c * s.anchor * grown(s, a, b),
            response=logarithmic,
        )
    for most in (4.0, 8.0):
        add(
            f"logarithmic slow start 0.1, at most {most:g} thresholds",
            lambda s: 0.1 * s.anchor * grown(s),
            response=functools.partial(logarithmic, most=most),
        )
    combinations: dict[str, tuple[float, Callable[[Levels], Any]]] = {
        "or 4 times 5th percentile": (
            0.05,
            lambda s: jnp.minimum(0.1 * s.anchor * grown(s), 4 * s.level),
        ),
        "or median": (0.5, lambda s: jnp.minimum(0.1 * s.anchor * grown(s), s.level)),
        "at least 0.1 times 5th percentile": (
            0.05,
            lambda s: 0.1 * grown(s) * jnp.maximum(s.anchor, s.level),
        ),
        "and median": (
            0.5,
            lambda s: 0.1 * grown(s) * jnp.sqrt(s.anchor * s.level),
        ),
        "of the median": (0.5, lambda s: 0.1 * grown(s) * s.level),
        "of the lowest median": (0.5, lambda s: 0.1 * grown(s) * s.lowest),
    }
    for name, (share, threshold) in combinations.items():
        add(
            f"logarithmic slow start 0.1, {name}",
            threshold,
            share,
            response=logarithmic,
        )
    add(
        "logarithmic slow start 0.1, of the first 5",
        lambda s: 0.1 * s.anchor * grown(s),
        response=logarithmic,
        size=5,
    )
    add(
        "slow start 0.1, root",
        lambda s: 0.1 * s.anchor * grown(s),
        response=root,
    )
    return designs | fourth_round()


def fourth_round() -> dict[str, Design]:
    """Logarithmic slow starts from higher up, to at most eight thresholds."""
    response = functools.partial(logarithmic, most=8.0)
    designs: dict[str, Design] = {}
    for c, start, steps, size in (
        (0.1, 0.3, 100, 10),
        (0.1, 0.3, 100, 5),
        (0.1, 0.3, 50, 10),
        (0.1, 0.3, 200, 10),
        (0.1, 0.5, 100, 10),
        (0.15, 0.2, 100, 10),
        (0.15, 0.3, 100, 10),
        (0.2, 0.3, 100, 10),
    ):
        designs[f"to eight thresholds {c:g}, from {start:g} in {steps}, of {size}"] = (
            simple(
                lambda s, c=c, a=start, b=steps: c * s.anchor * grown(s, a, b),
                response=response,
                size=size,
                place=0.49,
            )
        )
    for c in (0.1, 0.15):
        designs[f"to eight thresholds {c:g}, from 0.3 in 100, or median"] = simple(
            lambda s, c=c: jnp.minimum(c * s.anchor * grown(s, 0.3), s.level),
            response=response,
            place=0.49,
        )
    return designs


def starts(c: float, start: float, steps: int = 100) -> str:
    """How a slow start is called."""
    return f"{c:g}, from {start:g} in {steps}"


def later_designs() -> dict[str, Design]:
    """The second list: units that are, or contain, a running median of the norms.

    All responses are logarithmic, to eight thresholds. The running median is the lower
    median of the first ten norms until these are there.
    """
    response = functools.partial(logarithmic, most=8.0)
    designs: dict[str, Design] = {}

    def add(
        name: str, unit: Callable[[Levels], Any], *slow: Any, **options: Any
    ) -> None:
        c, rest = slow[0], slow[1:]
        designs[f"{name} {starts(*slow)}"] = simple(
            lambda s: c * grown(s, *rest) * unit(s),
            response=response,
            place=0.49,
            steady=True,
            **options,
        )

    for c in (0.05, 0.07, 0.1, 0.15):
        for start in (0.1, 0.3):
            add("median", lambda s: s.level, c, start)
    add("median", lambda s: s.level, 0.1, 0.1, 30)
    add("median", lambda s: s.level, 0.1, 0.1, 300)
    add("median", lambda s: s.level, 0.1, 0.03)
    for c in (0.05, 0.07, 0.1):
        for start in (0.1, 0.3):
            add("anchor and median", lambda s: jnp.sqrt(s.anchor * s.level), c, start)
    for c in (0.07, 0.1):
        add("anchor or median", lambda s: jnp.minimum(s.anchor, s.level), c, 0.1)
    add("anchor or median", lambda s: jnp.minimum(s.anchor, s.level), 0.1, 0.3)
    for c in (0.1, 0.15):
        add("25th percentile", lambda s: s.level, c, 0.1, share=0.25)
    for start in (0.1, 0.3):
        add("slow median", lambda s: s.level, 0.1, start, pace=0.005)
    add("fast median", lambda s: s.level, 0.1, 0.1, pace=0.05)
    return designs


AGAIN = (30.0, 50)  # times the median of the first norms, and norms: as the package


def last_designs() -> dict[str, Design]:
    """The list of the fourth round: variants of the package's rule.

    All of them start again after many norms far above the first ones. The threshold is
    bounded by the usual norm, if the name does not say otherwise.
    """
    designs: dict[str, Design] = {}

    def usual(s: Levels) -> Any:
        return s.level

    def add(
        name: str,
        c: float = 0.1,
        start: float = 0.3,
        steps: int = 100,
        unit: Callable[[Levels], Any] = lambda s: s.anchor,
        bound: Callable[[Levels], Any] = usual,
        power: float | None = None,
        **options: Any,
    ) -> None:
        response: Any = functools.partial(logarithmic, most=8.0)
        if power is not None:
            response = functools.partial(as_power, power=power)
        designs[name] = simple(
            lambda s: jnp.minimum(c * grown(s, start, steps) * unit(s), bound(s)),
            response=response,
            **{"place": 0.49, "again": AGAIN, **options},
        )

    for far, count in ((30.0, 100), (100.0, 50), (100.0, 100), (300.0, 50)):
        add(f"again after {count} above {far:g}", again=(far, count))
    for c in (0.05, 0.15, 0.2, 0.3, 0.5, 1.0):
        add(f"unit {c:g}", c)
    for start in (0.1, 1.0):
        add(f"from {start:g} in 100", start=start)
    add("from 0.3 in 300", steps=300)
    for c, start, steps in ((0.2, 0.1, 100), (0.3, 0.1, 100), (0.3, 0.1, 300)):
        add(f"unit {starts(c, start, steps)}", c, start, steps)
    for c in (0.03, 0.1):
        for power in (0.4, 0.5, 0.6, 0.7):
            add(f"unit {c:g}, to the power {power:g}", c, power=power)
    add("of the first 5", size=5)
    add("of the first 20", size=20)
    add("of the higher of both", unit=lambda s: jnp.maximum(s.anchor, s.level))
    add("of both", unit=lambda s: jnp.sqrt(s.anchor * s.level))
    for k in (0.3, 3.0):
        add(f"or {k:g} times median", bound=lambda s, k=k: k * s.level)
    add("without the usual norm", bound=lambda s: jnp.inf)
    return designs


FIRST_CHOSEN = "to eight thresholds 0.1, from 0.3 in 100, or median"
PACKAGE = "auto_clip of the package"
MOST_CELLS = "logarithmic slow start 0.1, of the median"


@functools.cache
def all_designs() -> dict[str, Design]:
    """Baselines and the first list, in the order in which they were tried."""
    return BASELINES | families()


@functools.cache
def second_list() -> dict[str, Design]:
    """Baselines, the best two of the first list, and the second list."""
    first = families()
    best = {name: first[name] for name in (FIRST_CHOSEN, MOST_CELLS)}
    return BASELINES | best | later_designs()


def third_list() -> dict[str, Design]:
    """Baselines, and the rule that both rounds chose: as designed, as in the package.

    The package's rule also starts again after 50 norms in a row far above the first
    ones.
    """
    package = Design(clipx.thresholds.auto(), compress)
    return BASELINES | {FIRST_CHOSEN: families()[FIRST_CHOSEN], PACKAGE: package}


def fourth_list() -> dict[str, Design]:
    """Baselines, the design that two rounds chose, the package's, and the last list."""
    return third_list() | last_designs()
