"""Compares methods of clipping on small tasks where clipping matters.

    pip install -e ".[bench,examples]" && python benchmarks/clipbench

Every task trains with every optimizer and every method, several seeds side by side. The
learning rate of a task and an optimizer is tuned together with a fixed threshold; each
method then has the best of this rate, a third of it and three times it. Results are
added to OUTPUT.jsonl as they come: an interrupted run goes on where it was.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipbench.methods import METHODS, OPTIMIZERS
from clipbench.report import write_report
from clipbench.rows import add, kept
from clipbench.running import missing_methods, plan, run
from clipbench.tasks import MAKERS

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    """Runs what is not there yet, and writes tables and pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS)
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--again", nargs="+", choices=METHODS, default=[], help="forget these results"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "results" / "clipbench"
    )
    parser.add_argument("--pictures", type=Path, help="folder for pictures")
    options = parser.parse_args()
    path = options.output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    records = kept(path, lambda r: r.get("method") in options.again)
    cells = [(t, o) for t in options.tasks for o in options.optimizers]
    total = sum(len(missing_methods(c, options.methods, records)) for c in cells)
    jobs = functools.partial(plan, cells, options.methods)
    add(path, records, run(jobs, records, options.workers, total))
    write_report(records, options.output.with_suffix(".md"), options.pictures)


if __name__ == "__main__":
    main()
