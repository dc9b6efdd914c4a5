"""Tables of what the methods reached."""

import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmbench.methods import FIXED, METHODS, SETTINGS

Record = dict[str, Any]
Table = dict[str, dict[str, "Row"]]  # setting, then label of the method
LOW, TUNED, HIGH = range(3)  # places of the three learning rates
FACTORS = ("1/3", "1", "3")


class Row(NamedTuple):
    """A method with a number, in a setting: arrays of rates by seeds."""

    method: str
    number: float
    default: bool
    losses: np.ndarray  # infinite where a run diverged
    clipped: np.ndarray
    spikes: np.ndarray
    norms: np.ndarray
    rate: float
    unigram: float

    @property
    def best(self) -> int:
        """The place of the best rate."""
        return int(self.losses.mean(axis=1).argmin())


def losses(record: Record) -> np.ndarray:
    """The held-out losses, rates by seeds; infinite where a run diverged.

    A run has diverged if its loss is not finite, or above that of the unigram model.
    """
    found = np.array(record["final"], float)
    return np.where(found <= record["unigram"], found, math.inf)


def best_of_rates(record: Record) -> float:
    """The mean over seeds at the best rate."""
    return float(losses(record).mean(axis=1).min())


def label(method: str, number: float, default: bool) -> str:
    """What a row is called."""
    if method == FIXED:
        return f"fixed {number:g}"
    return method if default else f"{method} ({number:g})"


def table_of(records: list[Record]) -> Table:
    """The results by setting and label."""
    found: Table = defaultdict(dict)
    methods = [r for r in records if r["kind"] == "method"]
    for r in sorted(methods, key=place_of):
        number = math.inf if r["number"] is None else r["number"]
        default = number == METHODS[r["method"]].numbers[0]
        found[r["setting"]][label(r["method"], number, default)] = Row(
            r["method"],
            number,
            default or r["method"] == FIXED,
            losses(r),
            *(np.array(r[key], float) for key in ("clipped", "spikes", "norm")),
            rate=r["rate"],
            unigram=r["unigram"],
        )
    return {s: rows for s, rows in found.items() if "none" in rows and fixed(rows)}


def place_of(record: Record) -> tuple[int, int, int]:
    """The place in the tables: fixed thresholds from the least, defaults first."""
    method, number = record["method"], record["number"]
    numbers = METHODS[method].numbers
    if method == FIXED:
        numbers = tuple(sorted(numbers))
    return (
        list(SETTINGS).index(record["setting"]),
        list(METHODS).index(method),
        numbers.index(math.inf if number is None else number),
    )


def fixed(rows: dict[str, Row]) -> list[Row]:
    """Those of fixed thresholds, from the least."""
    own = [row for row in rows.values() if row.method == FIXED]
    return sorted(own, key=lambda row: row.number)


def best_fixed(rows: dict[str, Row]) -> np.ndarray:
    """The losses of each seed at the best fixed threshold and rate, in hindsight."""
    found = np.array([row.losses for row in fixed(rows)])
    place = np.unravel_index(found.mean(axis=2).argmin(), found.shape[:2])
    return found[place]


def chosen_elsewhere(rows: dict[str, Row]) -> np.ndarray:
    """The loss of each seed at the threshold and rate that the other seeds chose."""
    found = np.array([row.losses for row in fixed(rows)])
    reached = []
    for seed in range(found.shape[2]):
        others = np.delete(found, seed, axis=2).mean(axis=2)
        place = np.unravel_index(others.argmin(), others.shape)
        reached.append(found[(*place, seed)])
    return np.array(reached)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% of the means of all ways to draw as many seeds with replacement."""
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))]
    low, high = np.quantile(means, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def noise(rows: dict[str, Row], place: int = TUNED) -> float:
    """The standard deviation of a loss that is of neither its method nor its seed."""
    found = np.array([row.losses[place] for row in rows.values()])
    found = found[np.isfinite(found).all(axis=1)]
    if len(found) < 2:
        return math.nan
    rest = found - found.mean(axis=1, keepdims=True) - found.mean(axis=0) + found.mean()
    freedom = (found.shape[0] - 1) * (found.shape[1] - 1)
    return float(np.sqrt(np.sum(rest**2) / freedom))


def least(rows: dict[str, Row], place: int = TUNED) -> float:
    """The difference that two equal methods exceed by chance in 5% of cases."""
    seeds = next(iter(rows.values())).losses.shape[1]
    return float(1.96 * noise(rows, place) * np.sqrt(2 / seeds))


def luck(deviation: float, seeds: int, methods: int) -> float:
    """By how much the best of so many equal methods is below their mean."""
    normal = np.random.default_rng(0).standard_normal((20_000, methods))
    return float(-normal.min(axis=1).mean() * deviation / np.sqrt(seeds))


def write_report(records: list[Record], path: Path, pictures: Path | None) -> None:
    """Writes and prints the tables; draws the pictures if there is a folder."""
    found = table_of(records)
    hours = sum(r["seconds"] for r in records) / 3600
    runs = sum(row.losses.size for rows in found.values() for row in rows.values())
    took = f"{len(records)} rows, {runs} runs of methods, {hours:.2g} core hours."
    parts = [settings_table(records, found), summary_table(found)]
    parts += [setting_table(name, rows) for name, rows in found.items()]
    parts += [sensitivity_table(found), whole_table(found), [took]]
    text = "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"
    print(text)
    path.write_text(text)
    if pictures:
        from lmbench.pictures import draw

        draw(found, pictures)


def head(*names: str, texts: int = 1) -> list[str]:
    """The first two lines of a table whose first columns are texts."""
    aligned = "|---" * texts + "|---:" * (len(names) - texts)
    return [f"| {' | '.join(names)} |", f"{aligned}|"]


def line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def settings_table(records: list[Record], found: Table) -> list[str]:
    """The learning rates that were tuned, and how large noise is."""
    tried = {
        (r["model"], r["optimizer"]): r["tried"] for r in records if r["kind"] == "rate"
    }
    names = ["setting", "model", "optimizer", "learning rate", "loss in tuning"]
    names += ["loss without clipping", "unigram loss", "noise"]
    names += ["noise at 3x", "luck"]
    lines = head(*names, texts=3)
    for name, rows in found.items():
        model, optimizer, _ = SETTINGS[name]
        none, deviation = rows["none"], noise(rows)
        losses = tried.get((model, optimizer), {})
        shown = ", ".join(f"{rate}: {number(x)}" for rate, x in losses.items())
        seeds = none.losses.shape[1]
        cells = [f"{none.rate:g}", shown, number(none.losses[TUNED].mean())]
        cells += [f"{none.unigram:.3f}", f"{least(rows):.3f}"]
        cells += [f"{least(rows, HIGH):.3f}"]
        luckiest = luck(deviation, seeds, len(fixed(rows)))
        lines.append(line(name, model, optimizer, *cells, f"{luckiest:.3f}"))
    return lines


def summary_table(found: Table) -> list[str]:
    """Each method with its default number over all settings."""
    names = ["method", "settings", "within noise of best fixed", "median gap"]
    names += ["largest gap", "gap at 3x", "diverged at 3x", "worse than none"]
    lines = head(*names)
    labels = {k: None for rows in found.values() for k, row in rows.items()}
    for key in labels:
        there = [rows for rows in found.values() if key in rows]
        if not there[0][key].default:
            continue
        gaps = np.array([gap(rows, key) for rows in there])
        noises = np.nan_to_num([least(rows) for rows in there])
        high = [
            number(gap(rows, key, HIGH)) if key in rows else "-"
            for rows in found.values()
        ]
        runs = np.array([rows[key].losses[HIGH] for rows in there])
        nones = np.array([gap(rows, "none") for rows in there])
        cells = [
            f"{len(there)}",
            f"{np.sum(gaps <= noises)}",
            number(float(np.median(gaps))),
            number(float(gaps.max())),
            ", ".join(high),
            f"{np.isinf(runs).sum()} of {runs.size}",
            f"{np.sum(gaps > nones + noises)}",
        ]
        lines.append(line(key, *cells))
    return lines


def gap(rows: dict[str, Row], key: str, place: int | None = None) -> float:
    """The mean loss above that of the best fixed threshold; both at their best rate.

    With a place, both are at this rate.
    """
    row = rows[key]
    if place is None:
        own, reference = row.losses[row.best].mean(), best_fixed(rows).mean()
    else:
        own = row.losses[place].mean()
        reference = min(other.losses[place].mean() for other in fixed(rows))
    return float(own - reference) if math.isfinite(own) else math.inf


def number(loss: float | None) -> str:
    """A loss or a gap."""
    if loss == -math.inf:
        return "fixed diverged"
    good = loss is not None and math.isfinite(loss)
    return f"{loss:.3f}" if good else "diverged"


def with_interval(losses: np.ndarray, signed: bool = False) -> str:
    """A mean over seeds and its interval."""
    if not np.isfinite(losses).all():
        return "diverged"
    low, high = interval(losses)
    form = "+.3f" if signed else ".3f"
    return f"{losses.mean():{form}} ({low:{form}} to {high:{form}})"


def setting_table(name: str, rows: dict[str, Row]) -> list[str]:
    """Each method with its default number, in one setting."""
    names = [f"{name}", "best of three rates", "minus best fixed threshold"]
    names += ["at the tuned rate", "at three times the rate", "diverged"]
    names += ["largest rate that trains", "clipped steps", "spike score at 3x"]
    reference, elsewhere = best_fixed(rows), chosen_elsewhere(rows)
    lines = head(*names)
    trains = np.isfinite(elsewhere).all()
    gap = with_interval(elsewhere - reference, signed=True) if trains else ""
    luckless = "best fixed threshold, chosen by other seeds"
    lines.append(line(luckless, with_interval(elsewhere), gap, *[""] * 6))
    for key, row in rows.items():
        if not row.default:
            continue
        best = row.losses[row.best]
        whole = bool(np.isfinite([best, reference]).all())
        cells = [
            with_interval(best),
            with_interval(best - reference, signed=True) if whole else "",
            with_interval(row.losses[TUNED]),
            with_interval(row.losses[HIGH]),
            f"{np.isinf(row.losses).sum()} of {row.losses.size}",
            largest_rate(row),
            f"{row.clipped[TUNED].mean():.0%}",
            f"{row.spikes[HIGH].mean():.2%}",
        ]
        lines.append(line(key, *cells))
    return lines


def largest_rate(row: Row) -> str:
    """The largest of the rates at which no seed diverged, in units of the tuned one."""
    trains = np.isfinite(row.losses).all(axis=1)
    found = [FACTORS[i] for i in range(3) if trains[i]]
    return found[-1] if found else "none"


def sensitivity_table(found: Table) -> list[str]:
    """The methods that were run with three numbers."""
    lines = head(
        "setting",
        "method",
        "number",
        "at the tuned rate",
        "at three times the rate",
        "clipped steps",
        texts=2,
    )
    count = len(lines)
    for name, rows in found.items():
        others = {row.method for row in rows.values() if not row.default}
        own = [row for row in rows.values() if row.method in others]
        for row in sorted(own, key=lambda row: (row.method, row.number)):
            cells = [with_interval(row.losses[i]) for i in (TUNED, HIGH)]
            share = f"{row.clipped[TUNED].mean():.0%}"
            mark = " (default)" if row.default else ""
            lines.append(line(name, row.method, f"{row.number:g}{mark}", *cells, share))
    return lines if len(lines) > count else []


def whole_table(found: Table) -> list[str]:
    """Every row: the loss of each seed at each rate."""
    names = ["a third of the tuned rate", "the tuned rate", "three times the rate"]
    lines = head("setting", "method", *names, "median norm", texts=2)
    for name, rows in found.items():
        for key, row in rows.items():
            cells = [", ".join(number(x) for x in at) for at in row.losses]
            median = f"{np.median(row.norms[TUNED]):.3g}"
            lines.append(line(name, key, *cells, median))
    return lines
