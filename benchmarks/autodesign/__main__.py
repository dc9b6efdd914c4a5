"""Trials of rules for `auto_clip` on twelve small tasks with four optimizers.

    pip install -e ".[bench]" && python benchmarks/autodesign

The learning rate of a task and an optimizer is tuned together with a fixed threshold,
as in clipbench; every rule then has the best of this rate, a third of it and three
times it. Results are added to OUTPUT.jsonl as they come: an interrupted run goes on
where it was.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipbench.rows import add, kept

from autodesign.designs import all_designs
from autodesign.report import write_report
from autodesign.tasks import MAKERS
from autodesign.training import SCALES, compared, fixed, tuned

ROOT = Path(__file__).resolve().parent.parent.parent
Record = dict[str, Any]


def main() -> None:
    """Runs what is not there yet, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "results" / "autodesign"
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    path = options.output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    records = kept(path)
    if not options.report:
        for name in options.tasks:
            add(path, records, missing(name, records))
    write_report(records, options.output.with_suffix(".md"))


def missing(name: str, records: list[Record]) -> Iterator[Record]:
    """The rates of a task and its results, less those that are there."""
    own = [r for r in records if r["task"] == name]
    rates = {r["optimizer"]: r for r in own if "rate" in r}
    what = MAKERS[name]()
    if not rates:
        found = tuned(what)
        rates = {o: {"task": name, "optimizer": o, **found[o]} for o in SCALES}
        yield from rates.values()
    done = {r["design"] for r in own if "design" in r}
    wanted = fixed(rates["sgd"]["typical"]) | all_designs()
    wanted = {k: d for k, d in wanted.items() if k not in done}
    if wanted:
        yield from compared(what, rates, wanted)


if __name__ == "__main__":
    main()
