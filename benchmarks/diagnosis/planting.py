"""Draws runs: what each is trained with, and which faults are planted into it.

A fault changes the settings of a run at a random step by a random size. Each run has a
twin: the same parameters, data and settings without the fault. Twins are the healthy
runs, and drifting, noisy and decaying ones are among them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diagnosis.cells import Cell, cells_of
from diagnosis.training import Columns, Settings, leaves_of, task_named

Generator = np.random.Generator
SEEDS = {
    "design": 1_000_000,
    "test": 2_000_000,
    "second": 7_000_000,
    "third": 11_000_000,
}
SECOND = 0.4  # how many runs have a second fault


class Fault(NamedTuple):
    """A fault that was planted.

    Attributes:
        kind: how it was planted, a key of `KINDS`.
        code: what a diagnosis calls it.
        size: by how much the settings were changed.
        steps: where; none if it is there from the first step on, or comes gradually.
    """

    kind: str
    code: str
    size: float
    steps: tuple[int, ...]


class Kind(NamedTuple):
    """A way to plant a fault.

    Attributes:
        code: what a diagnosis calls it.
        plant: changes settings; given a generator, the settings, a step, a size, and
            the clean norms of the run. Returns the steps of the fault.
        design: the smallest and the largest size in the design half.
        test: the same in the test halves.
        clippers: of which cells it is planted.
        second: whether it may be the second fault of a run.
        first: whether a second one may be added to it.
        late: whether nothing is seen of what comes after it.
        weight: how many runs there are of it, as a factor.
    """

    code: str
    plant: Callable[[Generator, Settings, int, float, Columns], tuple[int, ...]]
    design: tuple[float, float]
    test: tuple[float, float]
    clippers: tuple[str, ...] = ("fixed",)
    second: bool = False
    first: bool = True
    late: bool = False
    weight: float = 1.0


def _scaled(rng: Generator, s: Settings) -> np.ndarray:
    """What a bad batch is too large in: its loss or its inputs."""
    return s.loss_scale if rng.random() < 0.5 else s.input_scale


def bad_batches(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """One to four bad batches, the first at the step."""
    steps = step + 37 * np.arange(rng.integers(1, 5)) + rng.integers(0, 9, 4)[0]
    steps = steps[steps < len(s.rate) - 30]
    steps[1:] += rng.integers(0, 20, len(steps) - 1)
    _scaled(rng, s)[steps] *= size
    return tuple(steps.tolist())


def bad_shard(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """The same bad batch in every pass through the data."""
    period = int(rng.integers(30, len(s.rate) // 8))
    steps = np.arange(int(rng.integers(30, 60)), len(s.rate), period)
    _scaled(rng, s)[steps] *= size
    return tuple(steps.tolist())


def other_scale(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A loss scale that is not divided out from some step on."""
    s.loss_scale[step:] *= size if rng.random() < 0.6 else 1 / size
    return (step,)


def raised_scale(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A loss scale that is too large from some step on, where norms are skipped."""
    s.loss_scale[step:] *= size
    return (step,)


def other_batch(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """Smaller batches from some step on; the size is the fraction that is left."""
    s.part[:step], s.part[step:] = 1.0, 1 / size
    return (step,)


def wrong_sign(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """Weights that grow by their decay, whose sign is wrong."""
    s.decay = -np.log(size) / float(s.rate.sum())
    return ()


def higher_rate(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A learning rate that is far too high from some step on."""
    s.rate[step:] = s.rate[step] * size
    return (step,)


def rate_burst(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A learning rate that is far too high for a few steps."""
    s.rate[step : step + int(rng.integers(1, 5))] *= size
    return (step,)


def not_finite(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A NaN or an infinity, in the gradient or in the inputs."""
    _scaled(rng, s)[step] = rng.choice([np.nan, np.inf])
    return (step,)


def low_limit(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A threshold below the norms."""
    s.limit = float(np.quantile(_settled(clean), 0.01)) / size
    return ()


def high_limit(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A threshold above all norms."""
    s.limit = float(clean["clip/norm"].max()) * size
    return ()


def dominating(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """One leaf with a large gradient, below a threshold that lets it pass."""
    limit = s.limit
    starving(rng, s, step, size, clean)
    s.limit = limit * size
    return ()


def starving(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """The same with the threshold that fits the other leaves.

    The size is the norm of the leaf divided by that of the others together.
    """
    leaves = [x for name, x in clean.items() if name.startswith("track_norms/")]
    squares = np.median(np.square(leaves), axis=1)
    at = rng.choice(np.flatnonzero(squares > 1e-8 * squares.sum()))
    others = squares.sum() - squares[at]
    s.gains[at] = size * np.sqrt(others / squares[at])
    return ()


def frozen(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A leaf without gradient from some step on."""
    s.gains[rng.integers(len(s.gains))] = 0.0
    s.gains_from = step
    return (step,)


def shrinking_backward(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """Gradients that each layer of a stack hands on too small."""
    names = [
        n.removeprefix("track_norms/") for n in clean if n.startswith("track_norms/")
    ]
    inside = [n.split("/")[1] if n.startswith("layers/") else None for n in names]
    last = max(int(x) for x in inside if x is not None)
    depth = np.array([last if x is None else int(x) for x in inside])
    s.gains *= size ** (depth - last)
    return ()


def growing_backward(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """Gradients that each layer of a stack hands on too large."""
    return shrinking_backward(rng, s, step, 1 / size, clean)


def large_kernels(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """Kernels of a stack that begin too large."""
    s.init_gain = size
    return ()


def weighted(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A weight of the loss that rises as the learning rate falls."""
    s.rate = cosine(len(s.rate), s.rate.max(), 0.1)
    s.loss_scale *= (s.rate.max() / s.rate) ** (np.log(size) / np.log(10))
    return ()


def decayed(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """Weights of which only the direction counts, their decay, and a cosine."""
    s.invariant = 1.0
    s.decay = size / float(s.rate.max())
    s.rate = cosine(len(s.rate), s.rate.max(), 0.05)
    return ()


def early_batch(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A bad batch in the warm-up of a rule that adapts."""
    step = int(rng.integers(3, 40))
    _scaled(rng, s)[step] *= size
    return (step,)


def above_all(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A loss scale that lifts even the smallest of the clean norms above the limit.

    Loss scales are as large as 65,536 where they are not divided out. The limit of the
    rule that skips is four times the threshold.
    """
    s.loss_scale[step:] *= max(1, 4 * s.limit / _settled(clean).min()) * size
    return (step,)


def early_scale(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A bad batch in the warm-up, whose norm is a multiple of those that follow.

    Only its loss is too large: large inputs may make an activation flat.
    """
    step = int(rng.integers(3, 40))
    norms = clean["clip/norm"]
    usual = float(np.median(norms[step + 1 : step + 201]))
    s.loss_scale[step] *= size * usual / norms[step]
    return (step,)


def restart(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """A checkpoint that is taken up again, with other data."""
    s.switch, s.later = step, s.seed + 500_000
    return (step,)


def mixed(
    rng: Generator, s: Settings, step: int, size: float, clean: Columns
) -> tuple[int, ...]:
    """Another run, whose rows alternate with those of the twin in one file."""
    s.seed += 700_000
    s.later = s.seed
    return ()


KINDS = {
    "bad batches": Kind(
        *("spikes", bad_batches, (6, 60), (5, 100)),
        clippers=("fixed", "auto", "quantile"),
        second=True,
    ),
    "bad shard": Kind("periodic-spikes", bad_shard, (6, 40), (5, 60), weight=1.7),
    "loss scale": Kind(
        *("level-shift", other_scale, (2, 16), (1.7, 32)),
        clippers=("fixed", "auto"),
        second=True,
    ),
    "batch size": Kind("level-shift", other_batch, (6, 12), (6, 12), weight=0.5),
    "wrong sign": Kind(
        *("growing-norms", wrong_sign, (12, 80), (10, 150)), first=False, weight=1.7
    ),
    "higher rate": Kind(
        "loss-diverged", higher_rate, (60, 500), (50, 1000), late=True, weight=1.5
    ),
    "rate burst": Kind(
        "update-before-loss", rate_burst, (40, 300), (30, 500), weight=1.5
    ),
    "not finite": Kind(
        *("nonfinite", not_finite, (1, 1), (1, 1)),
        clippers=("fixed", "auto", "quantile"),
        second=True,
        late=True,
    ),
    "low limit": Kind("always-clipped", low_limit, (1.2, 20), (1.1, 50), second=True),
    "high limit": Kind("never-clipped", high_limit, (1.2, 30), (1.1, 100)),
    "dominating": Kind("dominant-leaf", dominating, (5, 40), (4.5, 80)),
    "starving": Kind("starved-leaves", starving, (12, 60), (10, 100), weight=1.3),
    "frozen": Kind("dead-leaf", frozen, (1, 1), (1, 1), second=True),
    "large kernels": Kind(
        "exploding-by-depth", large_kernels, (200, 1e4), (150, 1e5), weight=0.4
    ),
    "growing backward": Kind(
        "exploding-by-depth", growing_backward, (200, 1e4), (150, 1e5), weight=1.1
    ),
    "shrinking backward": Kind(
        "vanishing-by-depth", shrinking_backward, (200, 1e4), (150, 1e5), weight=1.2
    ),
    "decayed": Kind(
        "rises-with-schedule", decayed, (0.02, 0.1), (0.02, 0.1), weight=0.5
    ),
    "weighted": Kind("rises-with-schedule", weighted, (2.5, 8), (2.2, 12), weight=1.3),
    "locked": Kind(
        *("lock-out", raised_scale, (15, 60), (10, 100)),
        clippers=("skip",),
        first=False,
        weight=1.1,
    ),
    "early batch": Kind(
        *("warmup-spike", early_batch, (50, 500), (40, 1000)),
        clippers=("zclip",),
        weight=1.2,
    ),
    "restart": Kind(
        *("restarts", restart, (1, 1), (1, 1)),
        clippers=("fixed", "auto", "quantile", "zclip"),
        second=True,
    ),
    "mixed": Kind("restarts", mixed, (1, 1), (1, 1), first=False, weight=0.5),
}
# In the first two halves, the effect of these two was often too small to be demanded.
OF_SECOND = {
    "locked": Kind(
        *("lock-out", above_all, (1.5, 10), (1.2, 15)),
        clippers=("skip",),
        first=False,
        weight=1.4,
    ),
    "early batch": Kind(
        *("warmup-spike", early_scale, (50, 500), (40, 1000)),
        clippers=("zclip",),
        weight=1.4,
    ),
}
DEEP = ("large kernels", "growing backward", "shrinking backward")
OF_LIMIT = ("low limit", "high limit", "dominating", "starving", "frozen")


# In the second, fewer than 15 runs had some of these faults with an effect to be
# demanded. So there are more runs of what is rare, and fewer of what is frequent.
WEIGHTS_OF_THIRD = {
    "bad shard": 2.5,
    "wrong sign": 3.7,
    "higher rate": 1.8,
    "low limit": 0.7,
    "starving": 3.4,
    "growing backward": 1.4,
    "shrinking backward": 2.2,
    "decayed": 2.0,
    "weighted": 3.8,
    "locked": 1.9,
    "early batch": 1.9,
    "mixed": 0.3,
}


def kinds_for(half: str) -> dict[str, Kind]:
    """The ways to plant a fault in a half."""
    if half in ("design", "test"):
        return KINDS
    kinds = KINDS | OF_SECOND
    weights = WEIGHTS_OF_THIRD if half == "third" else {}
    return {n: k._replace(weight=weights.get(n, k.weight)) for n, k in kinds.items()}


class Draw(NamedTuple):
    """A run that is to be trained.

    Attributes:
        cell: with which model, optimizer and clipper.
        faults: that are planted.
        faulty: how it is trained.
        twin: the same without the faults.
        first: of a run with a restart, how it was trained before.
    """

    cell: Cell
    faults: tuple[Fault, ...]
    faulty: Settings
    twin: Settings
    first: Settings | None


def cosine(steps: int, peak: float, end: float) -> np.ndarray:
    """From the peak to a fraction of it."""
    wave = 0.5 + 0.5 * np.cos(np.pi * np.arange(steps) / (steps - 1))
    return peak * (end + (1 - end) * wave)


def plain(rng: Generator, cell: Cell, seed: int) -> Settings:
    """A healthy run: with any schedule, noisy or not; its threshold comes later."""
    task = task_named(cell.task)
    count, peak = task.steps, task.rates[cell.optimizer] * rng.uniform(0.5, 1.3)
    warmup = np.minimum(1, (1 + np.arange(count)) / 30)
    schedules: tuple[Any, ...] = (
        np.full(count, peak),
        np.full(count, peak) * warmup,
        cosine(count, peak, 0.1) * warmup,
        np.linspace(peak, 0.2 * peak, count),
    )
    one = np.ones(count)
    return Settings(
        seed=seed,
        later=seed,
        switch=count,
        rate=schedules[rng.integers(4)].copy(),
        decay=0.0,
        limit=1e30,
        loss_scale=one.copy(),
        input_scale=one.copy(),
        part=one * rng.choice([1.0, 1.0, 0.5, 0.2]),
        gains=np.ones(len(leaves_of(task))),
        gains_from=0,
        init_gain=1.0,
        invariant=0.0,
    )


def kinds_of_runs(half: str, each: int) -> list[tuple[Cell, tuple[str, ...]]]:
    """Which kinds of faults are planted in which cell."""
    drawn = []
    for name, kind in kinds_for(half).items():
        rng = np.random.default_rng([SEEDS[half], *name.encode()])
        for _ in range(round(each * kind.weight)):
            rule = kind.clippers[rng.integers(len(kind.clippers))]
            cells = [c for c in cells_of(half) if c.clipper == rule and _fits(name, c)]
            cell = cells[rng.integers(len(cells))]
            others = [x for x in KINDS if _may_follow(name, x, cell)]
            second = rng.random() < SECOND and others
            extra = (others[rng.integers(len(others))],) if second else ()
            drawn.append((cell, (name, *extra)))
    return drawn


def _fits(name: str, cell: Cell) -> bool:
    deep = name not in DEEP or task_named(cell.task).depth > 0
    return cell.clipper in KINDS[name].clippers and deep


def _may_follow(name: str, other: str, cell: Cell) -> bool:
    first, second = KINDS[name], KINDS[other]
    apart = name in OF_LIMIT and other in OF_LIMIT
    apart |= first.late and second.late
    if apart or first.code == second.code or not first.first:
        return False
    return second.second and _fits(other, cell)


def draw(
    rng: Generator,
    half: str,
    cell: Cell,
    names: tuple[str, ...],
    s: Settings,
    clean: Columns,
) -> Draw:
    """One run with its faults, and its twin; `clean` is the run without a threshold."""
    s.limit = float(np.quantile(_settled(clean), rng.uniform(0.75, 0.97)))
    if half == "third" and cell.clipper == "skip":
        # In the second half, some rules skipped from the first step on without a fault.
        s.limit = max(s.limit, 0.3 * float(clean["clip/norm"].max()))
    twin, faults = _copied(s), []
    for name, window in zip(names, _windows(rng, names), strict=True):
        kind = kinds_for(half)[name]
        low, high = kind.design if half == "design" else kind.test
        size = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        step = int(len(s.rate) * rng.uniform(*window))
        layers = task_named(cell.task).depth - 1 if name in DEEP else 1
        steps = kind.plant(rng, s, step, size ** (1 / layers), clean)
        faults.append(Fault(name, kind.code, size, steps))
    first = None
    if s.switch < len(s.rate):
        first = _copied(s)  # what was run before the restart
        first.switch = len(s.rate)
        twin.switch, twin.later = s.switch, s.later
    return Draw(cell, tuple(faults), s, twin, first)


def _windows(rng: Generator, names: tuple[str, ...]) -> list[tuple[float, float]]:
    """The parts of the run in which the faults are; what ends all comes last."""
    if len(names) == 1:
        return [(0.2, 0.78)]
    windows = [(0.2, 0.42), (0.55, 0.78)]
    if KINDS[names[0]].late or (not KINDS[names[1]].late and rng.random() < 0.5):
        windows.reverse()
    return windows


def _settled(clean: Columns) -> np.ndarray:
    """The norms after the first steps."""
    norms = clean["clip/norm"]
    return norms[len(norms) // 20 :]


def _copied(s: Settings) -> Settings:
    values = {f.name: getattr(s, f.name) for f in dataclasses.fields(s)}
    return Settings(
        **{n: x.copy() if isinstance(x, np.ndarray) else x for n, x in values.items()}
    )
