"""The tables of what was found, and recall against the size of the fault."""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diagnosis.judging import Judged
from diagnosis.truths import CODES
from optax_clipx.runs.drawing import Theme, theme_of

Found = dict[str, list[Judged]]
TITLES = {
    "design": "design half",
    "test": "first test half, now design",
    "second": "second test half, now design",
    "third": "third test half",
}
LAST = "third"  # the half of which every mistake is listed
WITH_SIZE = {
    "spikes": "norm / level before",
    "periodic-spikes": "norm / level before",
    "level-shift": "change of the level",
    "growing-norms": "growth of the norm",
    "update-before-loss": "update / update without it",
    "loss-diverged": "loss given back / gained",
    "rises-with-schedule": "rise of the norm",
    "warmup-spike": "norm / later norms",
    "always-clipped": "norm / threshold",
    "never-clipped": "threshold / largest norm",
    "dominant-leaf": "norm / that of the others",
    "starved-leaves": "steps smaller by",
    "vanishing-by-depth": "last / first layer",
    "exploding-by-depth": "first / last layer",
}


def share(flags: Iterable[bool]) -> str:
    """As a percentage, with the number of cases."""
    flags = list(flags)
    return f"{np.mean(flags):.1%} of {len(flags)}" if flags else "none"


def of_code(runs: list[Judged], code: str) -> list[Judged]:
    """The runs in which a fault is present."""
    return [r for r in runs if code in r.truths and r.truths[code].present]


def precision(runs: list[Judged], codes: Sequence[str] = CODES) -> list[bool]:
    """For each finding that is not arguable: is the fault present?"""
    return [
        code in run.truths
        for run in runs
        for code in run.found
        if code in codes and (code not in run.truths or run.truths[code].present)
    ]


def arguable(runs: list[Judged]) -> int:
    """How many findings count neither way."""
    return sum(
        code in run.truths and not run.truths[code].present
        for run in runs
        for code in run.found
    )


def whole(runs: list[Judged]) -> list[tuple[str, str, str]]:
    """The figures of all codes together, each with its bound."""
    healthy = [run for run in runs if run.healthy]
    recalled = [c in r.found for c in CODES for r in of_code(runs, c)]
    errors = [any(s == "error" for s, _ in r.found.values()) for r in healthy]
    warned = [any(s != "info" for s, _ in r.found.values()) for r in healthy]
    lowest = min(
        (np.mean([c in r.found for r in of_code(runs, c)]), c)
        for c in CODES
        if of_code(runs, c)
    )
    return [
        ("recall, all codes together", "90%", share(recalled)),
        ("lowest recall of a code", "85%", f"{lowest[0]:.1%} ({lowest[1]})"),
        ("precision, all codes together", "90%", share(precision(runs))),
        ("healthy runs with an error", "at most 2%", share(errors)),
        ("healthy runs with a warning or an error", "", share(warned)),
        (
            "step of the fault within 5",
            "90%",
            share(x for r in runs for x in r.located()),
        ),
        ("findings that count neither way", "", str(arguable(runs))),
    ]


def write_tables(found: Found, path: Path) -> None:
    """Figures together, by code, on fewer columns, and every mistake of the test."""
    lines = []
    for half, runs in found.items():
        faulty = sum(not run.twin for run in runs)
        lines += [f"{TITLES[half]}: {faulty} runs with faults and {faulty} without", ""]
        lines += table(("all codes", "bound", "measured"), whole(runs))
    head = ("code", "runs", "recall", "precision", "loss and norm: recall")
    for half, runs in found.items():
        lines += table((f"{head[0]} ({TITLES[half]})", *head[1:]), by_code(runs))
    for half, runs in found.items():
        if half == LAST:
            title = f"mistake in the {TITLES[half]}"
            lines += table(("fault", title, "times"), mistakes(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def by_code(runs: list[Judged]) -> list[tuple[str, ...]]:
    """A row for each code, and one for all."""
    rows = []
    for codes in [*[(code,) for code in CODES], CODES]:
        mine = [(c, r) for c in codes for r in of_code(runs, c)]
        right = precision(runs, codes)
        rows.append(
            (
                codes[0] if len(codes) == 1 else "all",
                str(len(mine)),
                _percent(c in r.found for c, r in mine),
                _percent(right),
                _percent(c in r.reduced for c, r in mine),
            )
        )
    return rows


def _percent(flags: Iterable[bool]) -> str:
    flags = list(flags)
    return f"{np.mean(flags):.0%}" if flags else ""


def mistakes(runs: list[Judged]) -> list[tuple[str, str, str]]:
    """What was planted, what went wrong, and how often."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for run in runs:
        kinds = " and ".join(f["kind"] for f in run.facts["faults"]) or "healthy"
        counts.update((kinds, f"{code} missed") for code in run.missed())
        counts.update(
            (kinds, f"{code} found ({run.found[code][0]})") for code in run.false()
        )
        far = run.located().count(False)
        counts[kinds, "found at another step"] += far
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(kind, what, str(times)) for (kind, what), times in ordered if times]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """In Markdown; numbers to the right."""
    rule = "|---|" + "|".join(["---:"] * (len(head) - 1)) + "|"
    return [
        f"| {' | '.join(head)} |",
        rule,
        *(f"| {' | '.join(r)} |" for r in rows),
        "",
    ]


def write_picture(found: Found, folder: Path) -> None:
    """A small panel for each code: found or not, by the size of the effect."""
    from matplotlib.figure import Figure

    runs = found.get(LAST, next(iter(found.values())))
    for name in ("light", "dark"):
        theme = theme_of(name)
        figure = Figure(figsize=(11, 8.4), layout="constrained", facecolor=theme.page)
        axes = figure.subplots(4, 4)
        for ax, code in zip(axes.flat, WITH_SIZE, strict=False):
            _panel(ax, code, runs, theme)
        for ax in axes.flat[len(WITH_SIZE) :]:
            ax.set_axis_off()
        _legend(axes.flat[len(WITH_SIZE)], theme)
        figure.savefig(folder / f"diagnosis_recall_{name}.png", dpi=110)


def _planted(run: Judged) -> set[str]:
    """The codes of its faults."""
    return {fault["code"] for fault in run.facts["faults"]}


def _panel(ax: Any, code: str, runs: list[Judged], theme: Theme) -> None:
    _frame(ax, code, theme)
    seen = [
        (
            np.clip(run.truths[code].effect, 1e-2, 1e6),
            code in run.found,
            _plain(run, code),
        )
        for run in runs
        if code in run.truths and (_plain(run, code) or code in _planted(run))
    ]
    if not seen:
        return
    sizes, hits, plain = map(np.array, zip(*sorted(seen), strict=True))
    jitter = 0.04 * np.sin(37.0 * np.arange(len(sizes)))
    for flag, colour, alpha in ((False, theme.text, 0.25), (True, theme.norm, 0.8)):
        at = plain == flag
        style = {"color": colour, "alpha": alpha, "markeredgewidth": 0}
        ax.plot(sizes[at], hits[at] + jitter[at], "o", markersize=3.5, **style)
    sizes, hits = sizes[plain], hits[plain]
    parts = np.array_split(np.arange(len(sizes)), max(1, min(5, len(sizes) // 6)))
    middles = [np.exp(np.mean(np.log(sizes[p]))) for p in parts]
    rates = [hits[p].mean() for p in parts]
    ax.plot(middles, rates, "-o", color=theme.clipped, lw=1.8, markersize=3)


def _plain(run: Judged, code: str) -> bool:
    """Whether a fault is present, and has to be found."""
    return code in run.truths and run.truths[code].present


def _frame(ax: Any, code: str, theme: Theme) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_title(code, fontsize=10, loc="left", color=theme.text, fontweight="bold")
    ax.set_facecolor(theme.page)
    ax.set_xlabel(WITH_SIZE[code], fontsize=8, color=theme.text)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=5))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(labelsize=8, colors=theme.text, which="both")
    ax.set_ylim(-0.12, 1.12)
    ax.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    ax.grid(color=theme.grid, linewidth=0.6)
    for side in ax.spines.values():
        side.set_visible(False)


def _legend(ax: Any, theme: Theme) -> None:
    lines = (
        (theme.norm, 0.8, "present: has to be found"),
        (theme.text, 0.25, "small effect: counts neither way"),
        (theme.clipped, 1.0, "fraction of those present that is found"),
    )
    for i, (colour, alpha, text) in enumerate(lines):
        y, place = 0.8 - 0.25 * i, ax.transAxes
        ax.plot([0.03], [y], "o", color=colour, alpha=alpha, transform=place)
        label = ax.text(0.09, y, text, color=theme.text, va="center", transform=place)
        label.set(fontsize=9, in_layout=False)
