"""Runs every transformation in every context, and writes the tables of the docs.

python docs/make_contract.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from contract_frameworks import FRAMEWORKS  # noqa: E402
from contract_jax import JAX  # noqa: E402
from contract_optax import LEFT_OUT, OPTAX, every_optimizer  # noqa: E402
from methods import EVERY  # noqa: E402

PARTS = {"Frameworks": FRAMEWORKS, "optax": OPTAX, "JAX": JAX}


def run_cells() -> dict[tuple[str, str], str]:
    """What each cell's test found: a mark, or the word for what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = ROOT / "tests" / "test_contract_matrix.py"
        command = [sys.executable, "-m", "pytest", str(tests), "-m", ""]
        subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env={**os.environ, "OPTAX_CLIPX_WHOLE": "1"},
            check=False,
        )
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {name_of(case): outcome(case) for case in cases}


def name_of(case: ElementTree.Element) -> tuple[str, str]:
    """Row and column, from the name of the test."""
    row, column = case.attrib["name"].split("[", 1)[1].removesuffix("]").split("|")
    return row, column


def outcome(case: ElementTree.Element) -> str:
    """What stands in a cell."""
    for word in ("failure", "error", "skipped"):
        if case.find(word) is not None:
            return f"**{word}**"
    found = [p.attrib["value"] for p in case.iter("property")]
    return "✓" if found == ["holds"] else found[0]


def table(columns: list[str], found: dict[tuple[str, str], str]) -> str:
    """A table in Markdown; a cell that no test filled says so."""
    lines = [f"| transformation | {' | '.join(columns)} |"]
    lines.append("|---|" + ":-:|" * len(columns))
    for row in EVERY:
        cells = [found.get((row, column), "**empty**") for column in columns]
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs, writes, and fails if a cell does not hold."""
    found = run_cells()
    parts = [f"## {name}\n\n{table(list(p), found)}" for name, p in PARTS.items()]
    number = len(EVERY) * sum(map(len, PARTS.values()))
    held = sum(cell == "✓" for cell in found.values())
    optimizers = [f"`{name}`" for name in every_optimizer() if name not in LEFT_OUT]
    left_out = "; ".join(f"`{name}`: {why}" for name, why in LEFT_OUT.items())
    text = "\n\n".join(
        [
            f"{held} of {number} cells hold.",
            *parts,
            f"*before each optimizer*: {', '.join(optimizers)}. Not among them:"
            f" {left_out}.",
        ]
    )
    path = ROOT / "docs" / "results" / "contract.md"
    path.write_text(text + "\n")
    print(f"{held} of {number} cells hold. Wrote {path}")
    raise SystemExit(held != number)


if __name__ == "__main__":
    main()
