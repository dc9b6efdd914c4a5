"""How much of who survives a generator against a Wasserstein critic is chance?

    pip install -e ".[bench]" && python benchmarks/autodesign/chance.py

Every baseline, fixed threshold and rule of `auto_clip` trains on this task in eleven
runs with six new seeds each: those of the fourth round and ten more. An interrupted
run goes on where it was.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from clipbench.report import RELATIVE_LIMITS, chosen_elsewhere, ratio
from clipbench.rows import add, kept
from tqdm import tqdm

from autodesign.deciding import infinite
from autodesign.designs import third_list
from autodesign.later_tasks import LATER_MAKERS
from autodesign.report import LUCK, by_cell, fixed_ratio, line
from autodesign.training import SCALES, SEEDS, compared, fixed, tuned

TASK = "Wasserstein critic"
RUNS = 11
ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUT = ROOT / "docs" / "results" / "autodesign_chance.jsonl"
Record = dict[str, Any]


def main() -> None:
    """Runs what is not there yet, and writes the table."""
    records = kept(OUTPUT)
    what = LATER_MAKERS[TASK]()
    rates = {r["optimizer"]: r for r in records if "rate" in r}
    if not rates:
        found = tuned(what)
        rates = {o: {"task": TASK, "optimizer": o, **found[o]} for o in SCALES}
        add(OUTPUT, records, rates.values())
    designs = fixed(rates["sgd"]["typical"]) | third_list()
    done = {r["run"] for r in records if "run" in r}
    for run in tqdm(sorted({*range(1, RUNS + 1)} - done), unit=" runs"):
        found = compared(what, rates, designs, SEEDS * run)
        add(OUTPUT, records, [{**r, "run": run} for r in found])
    text = "\n".join(survivals(records)) + "\n"
    print(text)
    OUTPUT.with_suffix(".md").write_text(text)


def survivals(records: list[Record]) -> list[str]:
    """A table of the number of runs in which each rule survives, by optimizer.

    A rule survives a run if none of its six seeds diverges at the best of its rates.
    """
    runs = sorted({r["run"] for r in records if "run" in r})
    cells = [by_cell([r for r in records if r.get("run") == run]) for run in runs]
    names = [n for n in third_list() if all(n in x for c in cells for x in c.values())]
    rules: dict[str, Callable[[Any], float]] = {LUCK: chosen_elsewhere}
    for number, c in enumerate(RELATIVE_LIMITS):
        rules[f"fixed, {c:g} of the first gradients"] = functools.partial(
            fixed_ratio, number=number
        )
    rules |= {n: functools.partial(ratio, method=n) for n in names}
    lines = [line(f"survived, of {len(runs)} runs", *SCALES, "all")]
    lines.append("|---|" + "---:|" * (len(SCALES) + 1))
    for name, function in rules.items():
        found = [
            int(np.isfinite(infinite(function(c[TASK, o]) for c in cells)).sum())
            for o in SCALES
        ]
        lines.append(line(name, *map(str, found), str(sum(found))))
    return lines


if __name__ == "__main__":
    main()
