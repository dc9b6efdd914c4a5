"""Compares methods of clipping on a small language model.

    pip install -e ".[bench,examples]" && python benchmarks/lmbench

A byte-level transformer trains on the docstrings of scikit-learn. The learning rate is
tuned once for each model and optimizer; every method then has this rate, a third of it
and three times it, with three seeds. Results are added to OUTPUT.jsonl as they come,
the most important first: an interrupted run goes on where it was.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipbench.rows import add, kept
from clipbench.running import run

from lmbench.corpus import corpus
from lmbench.methods import METHODS, SETTINGS
from lmbench.models import SIZES
from lmbench.planning import missing, plan
from lmbench.report import write_report

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    """Runs what is not there yet, and writes tables and pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = {"settings": list(SETTINGS), "methods": list(METHODS)}
    for name, known in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "results" / "lmbench"
    )
    parser.add_argument("--pictures", type=Path, help="folder for pictures")
    parser.add_argument(
        "--report", action="store_true", help="only write what the results say so far"
    )
    options = parser.parse_args()
    path = options.output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Results of another size stay in the file and are not looked at.
    records = kept(path)
    jobs = functools.partial(plan, options.settings, options.methods, options.size)
    if not options.report:
        check_text(records, corpus().source, path)
        total = missing(options.settings, options.methods, options.size, records)
        add(path, records, run(jobs, records, options.workers, total))
    own = [r for r in records if r["size"] == options.size]
    write_report(own, options.output.with_suffix(".md"), options.pictures)


def check_text(records: list[dict[str, Any]], source: str, path: Path) -> None:
    """Results of different texts cannot be compared."""
    if others := {r["text"] for r in records if "text" in r} - {source}:
        raise SystemExit(
            f"Expected results of {source} in {path}, got those of"
            f" {', '.join(sorted(others))}. Install this version, or start anew with"
            " another --output."
        )


if __name__ == "__main__":
    main()
