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
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipbench import tasks as clipbench
from clipbench.rows import add, kept

from autodesign.deciding import decision
from autodesign.designs import all_designs, second_list, third_list
from autodesign.later_tasks import LATER_MAKERS
from autodesign.report import by_cell, write_report, write_third
from autodesign.tasks import MAKERS
from autodesign.training import SCALES, Design, compared, fixed, tuned

LISTS = {"first": all_designs, "second": second_list, "third": third_list}
NAMES = {
    "first": "autodesign",
    "second": "autodesign_second",
    "third": "autodesign_third",
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
    tasks = options.tasks or (LATER_MAKERS if options.list == "third" else MAKERS)
    output = options.output or RESULTS / NAMES[options.list]
    path = output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    records = kept(path)
    if not options.report:
        for name in tasks:
            add(path, records, missing(name, designs, records))
    own = [r for r in records if r["task"] in tasks]
    if options.list == "third":
        first = kept((RESULTS / NAMES["second"]).with_suffix(".jsonl"))
        write_third(own, first, output.with_suffix(".md"), designs)
        return
    write_report(own, output.with_suffix(".md"), designs)
    if options.list == "second":
        print(f"The rule of decision chooses: {decision(list(by_cell(own).values()))}")


def missing(
    name: str, designs: dict[str, Design], records: list[Record]
) -> Iterator[Record]:
    """The rates of a task and its results, less those that are there."""
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
        yield from compared(what, rates, wanted)


if __name__ == "__main__":
    main()
