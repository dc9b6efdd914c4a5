"""Trials of rules for `auto_clip` on twelve small tasks with four optimizers.

    pip install -e ".[bench]" && python benchmarks/autodesign

The learning rate of a task and an optimizer is tuned together with a fixed threshold,
as in clipbench; every rule then has the best of this rate, a third of it and three
times it. Results are added to OUTPUT.jsonl as they come: an interrupted run goes on
where it was.

    python benchmarks/autodesign --list second

runs the second list of designs, and says which of them the rule of decision chooses.
With --tasks, they run on tasks of clipbench too.

    python benchmarks/autodesign --list third

measures the chosen rule on twelve further tasks, and adds up all twenty-four from the
results of the second list.

    python benchmarks/autodesign --list fourth

runs the last list on all twenty-four tasks with other seeds. It reads the learning
rates and which cells are stable from the results of the second and the third list.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipbench import tasks as clipbench
from clipbench.rows import add, kept

from autodesign.deciding import decision, last_decision
from autodesign.designs import all_designs, fourth_list, second_list, third_list
from autodesign.later_tasks import LATER_MAKERS
from autodesign.report import by_cell, write_fourth, write_report, write_third
from autodesign.tasks import MAKERS
from autodesign.training import SCALES, SEEDS, Design, compared, fixed, tuned

LISTS = {
    "first": all_designs,
    "second": second_list,
    "third": third_list,
    "fourth": fourth_list,
}
NAMES = {
    "first": "autodesign",
    "second": "autodesign_second",
    "third": "autodesign_third",
    "fourth": "autodesign_fourth",
}
TASKS = {
    "first": MAKERS,
    "second": MAKERS,
    "third": LATER_MAKERS,
    "fourth": MAKERS | LATER_MAKERS,
}
ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs" / "results"
ALL_MAKERS = MAKERS | LATER_MAKERS | clipbench.MAKERS
Record = dict[str, Any]


def main() -> None:
    """Runs what is not there yet, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=ALL_MAKERS, help="of the list")
    parser.add_argument("--list", choices=LISTS, default="first")
    parser.add_argument("--designs", nargs="+", help="of the list; all by default")
    parser.add_argument("--output", type=Path, help="without its suffix")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    designs = LISTS[options.list]()
    if options.designs:
        designs = {name: designs[name] for name in options.designs}
    tasks = options.tasks or TASKS[options.list]
    output = options.output or RESULTS / NAMES[options.list]
    path = output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    records = kept(path)
    before = results("second") + results("third")
    if options.list == "fourth" and not records:
        add(path, records, (r for r in before if "rate" in r))
    if not options.report:
        first = SEEDS if options.list == "fourth" else 0
        for name in tasks:
            add(path, records, missing(name, designs, records, first))
    own = [r for r in records if r["task"] in tasks]
    table = output.with_suffix(".md")
    if options.list == "third":
        write_third(own, results("second"), table, designs)
    elif options.list == "fourth":
        write_fourth(own, table, designs)
        now, earlier = by_cell(own), by_cell(before)
        if now.keys() <= earlier.keys():
            chosen = last_decision(*([x[cell] for cell in now] for x in (now, earlier)))
            print(f"The rule of decision chooses: {chosen}")
    else:
        write_report(own, table, designs)
    if options.list == "second":
        print(f"The rule of decision chooses: {decision(list(by_cell(own).values()))}")


def results(list_: str) -> list[Record]:
    """What is kept of a list."""
    return kept((RESULTS / NAMES[list_]).with_suffix(".jsonl"))


def missing(
    name: str, designs: dict[str, Design], records: list[Record], first: int = 0
) -> Iterator[Record]:
    """The rates of a task and its results from a seed on, less those there are."""
    own = [r for r in records if r["task"] == name]
    rates = {r["optimizer"]: r for r in own if "rate" in r}
    what = ALL_MAKERS[name]()
    if not rates:
        found = tuned(what)
        rates = {o: {"task": name, "optimizer": o, **found[o]} for o in SCALES}
        yield from rates.values()
    done = {r["design"] for r in own if "design" in r}
    wanted = fixed(rates["sgd"]["typical"]) | designs
    wanted = {k: d for k, d in wanted.items() if k not in done}
    if wanted:
        yield from compared(what, rates, wanted, first)


if __name__ == "__main__":
    main()
