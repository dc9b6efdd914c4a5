"""The package's rule on all tasks with new seeds: how much of a round is chance?

    pip install -e ".[bench]" && python benchmarks/autodesign/chance.py

All baselines, fixed thresholds and both rules of `auto_clip` train on the twenty-four
tasks in three runs with six new seeds each. On the generator against a Wasserstein
critic, where it is chance who survives, they train in eleven runs, of which the first
has the seeds of the fourth round. An interrupted run goes on where it was, and the
tables are written after each run of a task.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipbench.rows import add, kept
from tqdm import tqdm

from autodesign.designs import third_list
from autodesign.later_tasks import LATER_MAKERS
from autodesign.report import LUCK, Cell, Row, by_cell, halves, line, ratios_of_all
from autodesign.tasks import MAKERS
from autodesign.training import SCALES, SEEDS, compared, fixed, tuned

CRITIC = "Wasserstein critic"
ALL_MAKERS = MAKERS | LATER_MAKERS
RUNS = (2, 3, 4)  # of every task: no earlier round has their seeds
RUNS_OF_CRITIC = tuple(range(1, 12))
ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUT = ROOT / "docs" / "results" / "autodesign_chance.jsonl"
Record = dict[str, Any]


def main() -> None:
    """Runs what is not there yet, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    records = kept(OUTPUT)
    each = [(run, name) for run in RUNS for name in ALL_MAKERS]
    each += [(run, CRITIC) for run in RUNS_OF_CRITIC if run not in RUNS]
    done = {(r["run"], r["task"]) for r in records if "run" in r}
    todo = [] if options.report else [x for x in each if x not in done]
    for run, name in tqdm(todo, unit=" runs of a task"):
        add(OUTPUT, records, trained(run, name, records))
        write(records)
    write(records)
    print(OUTPUT.with_suffix(".md").read_text())


def trained(run: int, name: str, records: list[Record]) -> Iterator[Record]:
    """The results of a task with the seeds of a run; its rates, if they are missing."""
    what = ALL_MAKERS[name]()
    rates = {r["optimizer"]: r for r in records if r["task"] == name and "rate" in r}
    if not rates:
        found = tuned(what)
        rates = {o: {"task": name, "optimizer": o, **found[o]} for o in SCALES}
        yield from rates.values()
    designs = fixed(rates["sgd"]["typical"]) | third_list()
    for record in compared(what, rates, designs, SEEDS * run):
        yield {**record, "run": run}


def write(records: list[Record]) -> None:
    """Writes the tables of the runs that all tasks have, and of the critic's."""
    ran = [r for r in records if "run" in r]
    tasks = {run: {r["task"] for r in ran if r["run"] == run} for run in RUNS}
    whole = [run for run in RUNS if tasks[run] == set(ALL_MAKERS)]
    shared = [r for r in ran if r["run"] in whole]
    lines = halves(shared, third_list())
    if shared:
        lines += ["**Divergences**", "", *divergences(shared), ""]
    critic = [r for r in ran if r["task"] == CRITIC]
    if critic:
        lines += [f"**{CRITIC}**", "", *survivals(critic), ""]
    OUTPUT.with_suffix(".md").write_text("\n".join(lines))


def survived(cells: dict[Cell, Row]) -> dict[str, dict[Cell, bool]]:
    """By name of a rule, and by cell, whether it survives.

    A rule diverges if one of the six seeds does at the best of its rates.
    """
    return {
        name: {cell: math.isfinite(x) for cell, x in ratios.items()}
        for name, ratios in ratios_of_all(cells, third_list()).items()
    }


def divergences(records: list[Record]) -> list[str]:
    """A table of how often each rule diverges, and the chosen fixed threshold does not.

    A cell is stable if the fixed threshold that other seeds chose survives there in
    all runs. That threshold cannot diverge in one. So each run is also judged by the
    others alone: a cell of a run is in the last column if this threshold survives
    there in all other runs.
    """
    cells = by_cell(records)
    found = survived(cells)
    chosen = found[LUCK]
    unstable = {cell[:2] for cell in cells if not chosen[cell]}
    elsewhere = [
        cell
        for cell in cells
        if all(chosen[x] for x in cells if x[:2] == cell[:2] and x != cell)
    ]
    head = ["diverged", "alone", "survived alone", "in stable cells"]
    lines = [line("design", *head, "where it survives in the other runs")]
    lines.append("|---|" + "---:|" * 5)
    for name, does in found.items():
        lost = [cell for cell in cells if not does[cell]]
        alone = [cell for cell in lost if chosen[cell]]
        kept_alone = [cell for cell in cells if does[cell] and not chosen[cell]]
        stable = [cell for cell in lost if cell[:2] not in unstable]
        others = [cell for cell in elsewhere if not does[cell]]
        counts = map(len, (lost, alone, kept_alone, stable, others))
        lines.append(line(name, *map(str, counts)))
    count, runs = len({cell[:2] for cell in cells}), len({cell[2] for cell in cells})
    left = count - len(unstable)
    numbers = f"{count} cells in {runs} runs. {left} of them are stable."
    return [*lines, "", f"{numbers} The last column is of {len(elsewhere)} runs."]


def survivals(records: list[Record]) -> list[str]:
    """A table of the number of runs in which each rule survives, by optimizer."""
    found = survived(by_cell(records))
    runs = {r["run"] for r in records}
    lines = [line(f"survived, of {len(runs)} runs", *SCALES, "all")]
    lines.append("|---|" + "---:|" * (len(SCALES) + 1))
    for name, does in found.items():
        each = [sum(x for cell, x in does.items() if cell[1] == o) for o in SCALES]
        lines.append(line(name, *map(str, each), str(sum(each))))
    return lines


if __name__ == "__main__":
    main()
