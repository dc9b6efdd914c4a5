"""Trains runs with planted faults, diagnoses them, and counts what is found.

    pip install -e ".[examples]" && python benchmarks/diagnosis

Runs of other tasks and sizes each are trained with known faults and without: a design
half, and three test halves. Detectors were changed by what is seen in the first three.
What was found in each test half at the first look is in docs/results:
diagnosis_first.md, diagnosis_second.md and diagnosis_third.md. What is trained is kept
in FOLDER: an interrupted command goes on there.
"""

import argparse
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diagnosis.generating import generate
from diagnosis.judging import judged
from diagnosis.report import write_picture, write_tables

ROOT = Path(__file__).resolve().parent.parent.parent
EACH = {
    "design": 10,
    "test": 16,
    "second": 16,
    "third": 12,
}  # runs for each kind of fault


def main() -> None:
    """Trains what is missing, and writes the tables and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--halves", nargs="+", choices=EACH, default=list(EACH))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "diagnosis")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "results" / "diagnosis.md"
    )
    parser.add_argument("--pictures", type=Path, help="folder for the picture")
    parser.add_argument("--wrong", action="store_true", help="list what is wrong")
    options = parser.parse_args()
    if jax.config.jax_compilation_cache_dir is None:
        cache = str(options.folder / "compiled")
        jax.config.update("jax_compilation_cache_dir", cache)
    found = {}
    for half in options.halves:
        generate(half, EACH[half], options.folder / half)
        found[half] = judged(options.folder / half)
        if options.wrong:
            for run in found[half]:
                for line in run.wrong():
                    print(line)
    write_tables(found, options.output)
    if options.pictures is not None:
        write_picture(found, options.pictures)


if __name__ == "__main__":
    main()
