"""What a diagnosis finds in each run, beside what is true of it."""

from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import optax_clipx as clipx
from diagnosis.generating import load
from diagnosis.training import Columns
from diagnosis.truths import SUDDEN, Truth, norms, truths

NEAR = 5  # steps


class Judged(NamedTuple):
    """A run, what is true of it, and what was found.

    Attributes:
        facts: number, cell and faults; a twin has no faults.
        truths: by code.
        found: severity and steps by code, in all that was recorded.
        reduced: the same in the loss and one norm alone.
        twin: whether it is the run without the faults.
    """

    facts: dict[str, Any]
    truths: dict[str, Truth]
    found: dict[str, tuple[str, tuple[int, ...]]]
    reduced: dict[str, tuple[str, tuple[int, ...]]]
    twin: bool

    @property
    def healthy(self) -> bool:
        """Whether nothing was planted, and nothing but an idle threshold is there."""
        present = {code for code, truth in self.truths.items() if truth.present}
        return self.twin and not present - {"never-clipped"}

    def located(self) -> list[bool]:
        """For each sudden fault that is present and found: within five steps?"""
        near = []
        for fault in self.facts["faults"]:
            code = fault["code"]
            truth = self.truths.get(code)
            if fault["kind"] not in SUDDEN or not truth or not truth.present:
                continue
            if code in self.found:
                places = self.found[code][1]
                near.append(
                    any(abs(a - b) <= NEAR for a in places for b in fault["steps"])
                )
        return near

    def missed(self) -> list[str]:
        """Codes that are present and were not found."""
        return [c for c, t in self.truths.items() if t.present and c not in self.found]

    def false(self) -> list[str]:
        """Codes that were found and are absent."""
        return [code for code in self.found if code not in self.truths]

    def wrong(self) -> list[str]:
        """A line for each mistake."""
        kind = (
            "twin" if self.twin else ", ".join(f["kind"] for f in self.facts["faults"])
        )
        where = f"{self.facts['number']:4} {' / '.join(self.facts['cell'])}: {kind}"
        lines = [f"missed {c} ({self.truths[c].effect:.3g})" for c in self.missed()]
        lines += [f"false {c} {self.found[c]}" for c in self.false()]
        if not all(self.located()):
            steps = {
                f["code"]: (f["steps"], self.found.get(f["code"]))
                for f in self.facts["faults"]
            }
            lines.append(f"far {steps}")
        return [f"{where}: {line}" for line in lines]


def judged(folder: Path) -> list[Judged]:
    """All runs of a half, and their twins."""
    found = []
    for path in tqdm(sorted(folder.glob("*.npz")), desc="diagnoses", unit="cell"):
        for facts, run, twin in load(path):
            found.append(_judge(facts, run, twin, False))
            nothing = facts | {"faults": [], "lost": 0}
            found.append(_judge(nothing, twin, twin, True))
    return found


def _judge(facts: dict[str, Any], run: Columns, twin: Columns, alone: bool) -> Judged:
    reduced = {"step": run["step"], "loss": run["loss"], "grad_norm": norms(run)}
    return Judged(
        facts, truths(facts, run, twin), _findings(run), _findings(reduced), alone
    )


def _findings(run: Columns) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {x.code: (x.severity, x.steps) for x in clipx.diagnose(run).findings}
