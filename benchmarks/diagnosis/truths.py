"""What is true of a run, by criteria that know the faults and the twin without them.

A fault is *present* if its effect is plainly measurable, and has to be found. It is
*arguable* if there is some effect: finding it is neither right nor wrong. Whatever is
neither is absent, and a finding of it is wrong. The criteria compare the run with its
twin at the steps of the fault, which no reader of a log can do, and share no code with
the detectors. Detectors may be changed by what is seen in design halves; these
criteria, the runs and the bounds of `report.whole` stay as they are from before a test
half is trained. A fault that is smaller than the noise of its run is not demanded.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diagnosis.planting import KINDS
from diagnosis.training import Columns


class Truth(NamedTuple):
    """Whether a fault is present or but arguable, and how large its effect is."""

    present: bool
    effect: float


Truths = dict[str, Truth]
SUDDEN = {
    *("bad batches", "bad shard", "loss scale", "batch size", "higher rate"),
    *("rate burst", "not finite", "frozen", "locked", "early batch", "restart"),
}


class Case(NamedTuple):
    """A run that is judged: up to its first non-finite number, and its twin."""

    run: Columns
    twin: Columns
    faults: Sequence[dict[str, Any]]
    end: int
    policy: bool

    def steps(self, *codes: str) -> list[int]:
        """The steps of the faults with one of these codes, or of all."""
        return [
            step
            for fault in self.faults
            if not codes or fault["code"] in codes
            for step in fault["steps"]
            if step < self.end
        ]

    def planted(self, code: str) -> bool:
        """Whether a fault of this code was planted."""
        return any(fault["code"] == code for fault in self.faults)


def norms(columns: Columns) -> np.ndarray:
    """What came in, also where a step was skipped."""
    return columns.get("skip/norm", columns["clip/norm"])


def truths(facts: dict[str, Any], run: Columns, twin: Columns) -> Truths:
    """What is true of a run, by code."""
    kinds = [fault["kind"] for fault in facts["faults"]]
    if "mixed" in kinds:
        return {"restarts": Truth(True, 1.0)}
    found = {}
    if facts["lost"]:  # the rows that were run again have no say
        found["restarts"] = Truth(True, float(facts["lost"]))
        (at,) = next(f["steps"] for f in facts["faults"] if f["kind"] == "restart")
        rows = np.r_[:at, at + facts["lost"] : len(run["step"])]
        whole, run = run, {n: x[rows] for n, x in run.items()}
        again = whole["loss"][at : at + facts["lost"]], whole["clip/norm"][at:]
        if not all(np.isfinite(x[: facts["lost"]]).all() for x in again):
            found["nonfinite"] = Truth(False, 1.0)
    sound = np.isfinite(run["loss"]) & np.isfinite(norms(run))
    sound &= np.isfinite(run["update_norm"])
    end = len(sound) if sound.all() else int(sound.argmin())
    if end < len(sound):
        found["nonfinite"] = Truth(True, 1.0)
    policy = facts["cell"][0].startswith("policy")
    case = Case(run, twin, facts["faults"], end, policy)
    if end >= 40:
        with np.errstate(all="ignore"):
            for judge in CRITERIA:
                found |= judge(case)
    return found


def level(values: np.ndarray, start: int, stop: int) -> np.float64:
    """The median of a stretch; NumPy's number, as some norms are zero."""
    part = values[max(0, start) : max(1, stop)]
    return np.float64(np.median(part) if len(part) else np.nan)


def ending(values: np.ndarray) -> float:
    """The median of the last 20 steps."""
    return float(np.median(values[-20:]))


def noise(values: np.ndarray) -> float:
    """The deviation of one step from the next, as of independent noise."""
    return float(np.median(np.abs(np.diff(values)))) / 0.954


def blocks(values: np.ndarray, size: int = 20) -> np.ndarray:
    """The medians of blocks of steps."""
    count = max(1, len(values) // size)
    return np.array([np.median(x) for x in np.array_split(values, count)])


def heights(values: np.ndarray) -> np.ndarray:
    """Each value over the median of the 20 before, but for the first 30 steps."""
    return np.array(
        [values[s] / level(values, s - 20, s) for s in range(30, len(values))]
    )


def _among(code: str, effect: float, some: float, plain: float) -> Truths:
    if not effect >= some:  # also if it is NaN
        return {}
    present = effect >= plain and plain < np.inf
    return {code: Truth(bool(present), float(effect))}


def spikes(case: Case) -> Truths:
    """Single steps far above the 20 before, and above twice the largest of ten.

    Present from a factor of 5 at a planted step from which the norm comes back, if it
    is also 1.5 times the largest factor of the twin; arguable from 2.5 at one, and
    wherever a norm is twice the largest of ten steps before and of ten after.
    """
    n = norms(case.run)[: case.end]
    effect, seen, usual = 0.0, False, 1.5 * heights(norms(case.twin)).max()
    for s in case.steps("spikes", "warmup-spike"):
        height = n[s] / level(n, s - 20, s)
        returns = level(n, s + 5, s + 25) < n[s] / 3
        alone = n[s] >= 2 * n[max(0, s - 10) : s].max(initial=0)
        inside = 5 <= s < len(n) - 25
        seen |= bool(height >= max(5, usual) and returns and alone and inside)
        effect = max(effect, float(height))
    if seen:
        return {"spikes": Truth(True, effect)}
    for s in range(10, len(n) - 5):
        near = max(n[s - 10 : s].max(), n[s + 3 : s + 13].max())
        if n[s] >= 2 * near:
            effect = max(effect, 2.5)
    shard = case.steps("periodic-spikes")
    if any(n[s] / level(n, s - 20, s) >= 2.5 for s in shard if s > 5):
        effect = max(effect, 2.5)
    return _among("spikes", effect, 2.5, np.inf)


def periodic(case: Case) -> Truths:
    """Planted spikes at equal distances, by the height that three in four have.

    Present from four of a factor of 5, and of the largest of 98% of the twin's steps;
    arguable from 1.5, and where four planted spikes are so high, whatever the rest is.
    """
    n, planted = norms(case.run)[: case.end], case.steps("periodic-spikes")
    if len(planted) < 4:
        return {}
    high = np.sort([n[s] / level(n, s - 20, s) for s in planted])
    effect = float(np.quantile(high, 0.25))
    least = max(5.0, float(np.quantile(heights(norms(case.twin)), 0.98)))
    if effect < 1.5 and high[-4] >= least:
        return _among("periodic-spikes", float(high[-4]), 1.5, np.inf)
    return _among("periodic-spikes", effect, 1.5, least)


def shift(case: Case) -> Truths:
    """The level of 40 steps after a fault over that of 40 before, over the twin's.

    Present from a factor of 1.8 that is still 1.5 after 60 steps and larger than all
    such changes after the first 60 steps: of the twin, and of the run itself 100 steps
    away from its faults. Arguable from 1.25, and where the medians of 30 steps before
    and after any step differ by 2.5.
    """
    n, m = norms(case.run)[: case.end], norms(case.twin)
    effect, present = 1.0, False
    places = list(range(100, len(m) - 40, 5))
    others = [level(m, k, k + 40) / level(m, k - 40, k) for k in places]
    away = [
        k
        for k in places
        if k < len(n) - 40 and all(abs(k - s) >= 100 for s in case.steps())
    ]
    others += [level(n, k, k + 40) / level(n, k - 40, k) for k in away]
    usual = float(np.exp(np.abs(np.log(others)).max()))
    for k in case.steps():
        if k < 45 or k + 45 > len(n):
            continue
        change = level(n, k, k + 40) / level(n, k - 40, k)
        change /= level(m, k, k + 40) / level(m, k - 40, k)
        later = level(n, k + 60, k + 100) / level(n, k - 40, k)
        later /= level(m, k + 60, k + 100) / level(m, k - 40, k)
        size = float(np.exp(abs(np.log(change))))
        stays = np.log(later) * np.sign(np.log(change)) >= np.log(1.5)
        mine = any(k in f["steps"] for f in case.faults if f["code"] == "level-shift")
        mine |= any(k in f["steps"] for f in case.faults if f["kind"] == "locked")
        present |= bool(mine and size >= max(1.8, usual) and stays)
        effect = max(effect, size)
    if present:
        return {"level-shift": Truth(True, effect)}
    for k in range(30, len(n) - 34, 5):
        change = level(n, k + 4, k + 34) / level(n, k - 30, k)
        effect = max(effect, float(np.exp(abs(np.log(change)))) / 2)
    return _among("level-shift", effect, 1.25, np.inf)


def growth(case: Case) -> Truths:
    """The level at the end over that where norms were made to grow.

    Present from a factor of 10 with a loss that is not below its level there, and from
    3 before a divergence; arguable from 2 in any run that diverges or in which growth
    was planted, from the lowest level on, and where the upper quarter of the norms grew
    by 10 where it was planted: many batches may have no gradient at all by then.
    """
    n, loss = norms(case.run)[: case.end], case.run["loss"][: case.end]
    whole = len(case.run["loss"])
    broke = case.end < whole or "loss-diverged" in divergence(case)
    levels = blocks(n)
    any_growth = float(levels[-1] / levels.min())
    if not case.planted("growing-norms"):
        return _among("growing-norms", any_growth / (1 if broke else 5), 2.0, np.inf)
    start = next(iter(case.steps("growing-norms")), 0)
    effect = ending(n) / level(n, start - 20, start + 20)
    rough = noise(loss[: max(40, start)])
    falls = ending(loss) < level(loss, start - 20, start + 20) - rough
    least = 3.0 if broke else 10.0
    present = effect >= least and len(n) - start >= 0.1 * whole and (broke or not falls)
    if present:
        return {"growing-norms": Truth(True, effect)}
    parts = np.array_split(n, max(1, len(n) // 40))
    upper = np.array([np.quantile(part, 0.75) for part in parts])
    if upper.max() >= 10 * upper[0]:
        return _among("growing-norms", float(upper.max() / upper[0]), 2.0, np.inf)
    return _among("growing-norms", max(effect, any_growth), 2.0, np.inf)


def divergence(case: Case) -> Truths:
    """What a loss gives back of what it had gained, up to its end.

    Present from 0.5, if it is also 0.4 of the best level, six times the noise of a
    step, and above the end of the twin; arguable from 0.25 and two. Where a loss is a
    policy's surrogate, it has to give back five times its gain.
    """
    loss, other = case.run["loss"][: case.end], case.twin["loss"]
    levels = blocks(loss)
    first, best, last = float(np.mean(loss[:5])), levels.min(), ending(loss)
    lost, gained = last - best, max(first - best, 1e-12)
    rough = noise(loss[: max(20, 20 * int(levels.argmin()))])
    effect = lost / gained
    needed = 5.0 if case.policy else 0.5
    above = last - ending(other) >= 3 * rough
    plain = lost >= 6 * rough and above and (case.policy or lost >= 0.4 * abs(best))
    if lost < 2 * rough:
        return {}
    least = needed if plain else np.inf
    return _among("loss-diverged", effect, 0.25, least)


def update_first(case: Case) -> Truths:
    """Updates that are too large at a step, and then the loss, but not the gradient.

    The step is where the learning rate was raised, or where updates are first 1.7 times
    the twin's. Present from updates of 3 times those before, with a loss in the next 20
    steps of 1.5 times that before and 8 times its noise above it, and a gradient norm
    that is not above 1.5 times the largest of the 20 before; arguable from 1.7 and 3.
    """
    u, v = case.run["update_norm"][: case.end], case.twin["update_norm"][: case.end]
    steps = case.steps("loss-diverged", "update-before-loss")
    steps += np.flatnonzero(u >= 1.7 * v)[:1].tolist()
    n, loss = norms(case.run), case.run["loss"][: case.end]
    found: Truths = {}
    for a in steps:
        if a < 21 or a + 3 > len(loss) or n[a] >= 1.5 * n[a - 20 : a].max():
            continue
        before = float(np.median(loss[a - 20 : a + 1]))
        most = float(loss[a + 1 : a + 21].max())
        by = (most - before) / noise(loss[a - 20 : a + 1])
        effect = float(u[a : a + 5].max() / level(u, a - 20, a))
        plain = by >= 8 and effect >= 3 and (case.policy or most >= 1.5 * before)
        least = 0.0 if plain else np.inf
        if by >= 3 and not found.get("update-before-loss", Truth(False, 0)).present:
            found |= _among("update-before-loss", effect, 1.7, least)
    return found


def schedule(case: Case) -> Truths:
    """Norms at the end over those of the middle of the run, as the learning rate falls.

    Present from 1.6 where it was planted, if it is three standard errors of the two
    levels and the level of the middle is between half and four times that of the first
    quarter; arguable from 1.25 over the lowest level, wherever the learning rate falls
    to 0.4 of its peak.
    """
    mine = case.planted("rises-with-schedule")
    rate = (case.run if mine else case.twin)["learning_rate"][: case.end]
    n, peak = norms(case.run)[: case.end], int(rate.argmax())
    if rate[-1] > 0.4 * rate[peak] or len(n) - peak < 100:
        return {}
    levels = blocks(n[peak:])
    quarter = len(levels) // 4
    half, effect = np.median(levels[quarter:-quarter]), levels[-1] / levels.min()
    rises = 0.5 <= half / np.median(levels[:quarter]) <= 4
    rough = noise(np.log(np.maximum(n[peak:], 1e-300)))
    error = 1.25 * rough * np.sqrt(1 / 20 + 2 / (len(n) - peak))
    if mine and rises and np.log(levels[-1] / half) >= max(np.log(1.6), 3 * error):
        return {"rises-with-schedule": Truth(True, float(levels[-1] / half))}
    return _among("rises-with-schedule", effect, 1.25, np.inf)


def blinded(case: Case) -> Truths:
    """For how many steps after an early bad batch the threshold is useless.

    It is above 4.5 times the median of the 200 norms after it. Present from 80 steps,
    arguable from 25 steps at three times.
    """
    n, limit = norms(case.run)[: case.end], case.run["clip/threshold"][: case.end]
    early = case.steps("warmup-spike")
    if not early:
        return {}
    s = early[0]
    usual = level(n, s + 1, s + 201)

    def blind(times: float) -> int:
        above = limit[s + 1 :] > times * usual
        return int(above.argmin()) if not above.all() else len(above)

    if n[s] < 6 * usual or blind(4.5) < 80:
        return _among("warmup-spike", float(blind(3.0)), 25, np.inf)
    return {"warmup-spike": Truth(True, float(n[s] / usual))}


def clipped(case: Case) -> Truths:
    """The share of clipped steps: of the last 60% of the run, and of the whole run.

    always-clipped: present from 97%, arguable from 90%, unless the rule is to clip 90%.
    never-clipped: present if no step is.
    """
    n, limit = case.run["clip/norm"][: case.end], case.run["clip/threshold"][: case.end]
    above = n > limit
    if "skip/skipped" in case.run:
        above &= case.run["skip/skipped"][: case.end] == 0
    found: Truths = {}
    rate = float(above[int(0.4 * len(above)) :].mean())
    if "clip/target" not in case.run:
        times = level(n, int(0.4 * len(n)), len(n)) / level(limit, 0, len(n))
        if rate >= 0.9:
            found["always-clipped"] = Truth(rate >= 0.97, times)
    if not above.any() and len(above) >= 200:
        times = level(limit, 0, len(n)) / float(n.max())
        found["never-clipped"] = Truth("skip/skipped" not in case.run, times)
    elif above.sum() < 3:
        found["never-clipped"] = Truth(False, 1.0)
    return found


def locked(case: Case) -> Truths:
    """The longest row of skipped steps: present from 100, arguable from 40."""
    if "skip/skipped" not in case.run:
        return {}
    longest = now = 0
    for skipped in case.run["skip/skipped"]:
        now = now + 1 if skipped else 0
        longest = max(longest, now)
    effect = max((f["size"] for f in case.faults if f["kind"] == "locked"), default=1.0)
    if longest < 40:
        return {}
    return {"lock-out": Truth(longest >= 100, effect)}


def leaves(case: Case) -> dict[str, np.ndarray]:
    """The norms of leaves."""
    return {
        name.removeprefix("track_norms/"): x[: case.end]
        for name, x in case.run.items()
        if name.startswith("track_norms/")
    }


def dominant(case: Case) -> Truths:
    """The share that one leaf has of the squared norm, step by step.

    Present from 92% in three steps of four, arguable from 80% in two of five.
    """
    table = np.square(list(leaves(case).values()))
    shares = table / np.maximum(table.sum(axis=0), 1e-300)
    at = int(shares.mean(axis=1).argmax())
    share = shares[at]
    if np.mean(share >= 0.8) < 0.4:
        return {}
    effect = float(np.median(np.sqrt(share / np.maximum(1 - share, 1e-12))))
    return {"dominant-leaf": Truth(bool(np.mean(share >= 0.92) >= 0.75), effect)}


def starved(case: Case) -> Truths:
    """By how much smaller the steps of the other leaves are, for the largest leaf.

    Present from a factor of 6 in three steps of five, arguable from 3.5 in a third.
    """
    table = np.square(list(leaves(case).values()))
    limit = case.run["clip/threshold"][: case.end]
    whole = np.sqrt(table.sum(axis=0))
    rest = np.sqrt(np.maximum(table.sum(axis=0) - table.max(axis=0), 1e-300))
    scale = np.minimum(1, limit / np.maximum(whole, 1e-300))
    factor = np.minimum(1, limit / rest) / np.maximum(scale, 1e-300)
    if np.mean(factor >= 3.5) < 1 / 3:
        return {}
    present = bool(np.mean(factor >= 6) >= 0.6)
    return {"starved-leaves": Truth(present, float(np.median(factor)))}


def dead(case: Case) -> Truths:
    """Leaves that are 1e-8 of their largest norm up to the end.

    Present if one is for 60 steps, arguable for 20 steps or at 1e-4.
    """
    found: Truths = {}
    for x in leaves(case).values():
        for least, count, present in (
            (1e-8, 60, True),
            (1e-8, 20, False),
            (1e-4, 20, 0),
        ):
            tail = x[-count:]
            if len(x) >= count and (tail <= least * x.max()).all():
                before = found.get("dead-leaf", Truth(False, 1.0))
                found["dead-leaf"] = Truth(bool(present) or before.present, 1.0)
    return found


def depth(case: Case) -> Truths:
    """The norm of the first layer of a stack over that of the last, step by step.

    Present if beyond a factor of 150 in three steps of five and in order in three
    quarters of the neighbours, arguable beyond 30 in a third of the steps.
    """
    stacks: dict[str, list[np.ndarray]] = {}
    for name, x in leaves(case).items():  # they come in order
        parts = name.split("/")
        if parts[0] in ("layers", "blocks"):
            stacks.setdefault(parts[-1], []).append(np.maximum(x, 1e-300))
    found: Truths = {}
    for rows in stacks.values():
        if len(rows) < 4:
            continue
        logs = np.log(rows[0] / rows[-1])
        ordered = np.diff(np.log(np.median(rows, axis=1)))
        for code, sign in (("exploding-by-depth", 1), ("vanishing-by-depth", -1)):
            if np.mean(sign * logs >= np.log(30)) < 1 / 3:
                continue
            present = np.mean(sign * logs >= np.log(150)) >= 0.6
            present &= np.mean(-sign * ordered > 0) >= 0.75
            effect = float(np.exp(sign * np.median(logs)))
            before = found.get(code, Truth(False, 0.0))
            present = bool(present) or before.present
            found[code] = Truth(present, max(effect, before.effect))
    return found


CRITERIA: tuple[Callable[[Case], Truths], ...] = (
    *(spikes, periodic, shift, growth, divergence, update_first, schedule, blinded),
    *(clipped, locked, dominant, starved, dead, depth),
)
CODES = (*dict.fromkeys(kind.code for kind in KINDS.values()),)
