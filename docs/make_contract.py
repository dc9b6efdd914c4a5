"""Runs every transformation in every context, and writes the tables of the docs.

python docs/make_contract.py
python docs/make_contract.py --rows zclip adagc  # these alone; others as they were
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from all_methods import EVERY  # noqa: E402
from contract_frameworks import FRAMEWORKS  # noqa: E402
from contract_jax import JAX  # noqa: E402
from contract_optax import LEFT_OUT, OPTAX, every_optimizer  # noqa: E402

KNOWN = ROOT / "docs" / "results" / "contract.json"
TABLE = KNOWN.with_suffix(".md")
PARTS = {"Frameworks": FRAMEWORKS, "optax": OPTAX, "JAX": JAX}


def run_columns(known: dict[str, dict[str, str]]) -> None:
    """Fills in the cells that are not known, and writes each column as it comes."""
    for column in [x for part in PARTS.values() for x in part]:
        before = known.get(column, {})
        missing = [row for row in EVERY if row not in before]
        if not missing:
            continue
        found = before | {row: x for (row, _), x in run(missing, [column]).items()}
        known[column] = {row: found[row] for row in EVERY if row in found}
        KNOWN.write_text(json.dumps(known, indent=1) + "\n")


def run_rows(known: dict[str, dict[str, str]], rows: list[str]) -> None:
    """Runs all cells of some rows again, and writes the tables after each row."""
    columns = [x for part in PARTS.values() for x in part]
    for row in rows:
        for (_, column), cell in run([row], columns).items():
            known.setdefault(column, {})[row] = cell
        write(known)


def run(rows: list[str], columns: list[str]) -> dict[tuple[str, str], str]:
    """What stands in some cells, by row and column; pytest runs once."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = ROOT / "tests" / "project" / "test_contract_matrix.py"
        cells = [f"{tests}::test_cell[{x}|{y}]" for x in rows for y in columns]
        pytest = [sys.executable, "-m", "pytest", "-q", "-m", ""]
        # The only family of reports that keeps what a test records.
        command = [*pytest, "-o", "junit_family=xunit1", *cells]
        subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env={**os.environ, "OPTAX_CLIPX_WHOLE": "1"},
            check=False,
        )
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {place_of(case): outcome(case) for case in cases}


def of_table() -> dict[str, dict[str, str]]:
    """The cells of the tables in the docs, by column and row."""
    known: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in TABLE.read_text().splitlines():
        name, *cells = line.strip("| ").split(" | ")
        if name == "transformation":
            columns = cells
        elif name.startswith("`"):
            for column, cell in zip(columns, cells, strict=True):
                known.setdefault(column, {})[name.strip("`")] = cell
    return known


def place_of(case: ElementTree.Element) -> tuple[str, str]:
    """The transformation and the context, from the name of the test."""
    row, column = case.attrib["name"].removesuffix("]").split("[", 1)[1].split("|")
    return row, column


def outcome(case: ElementTree.Element) -> str:
    """What stands in a cell."""
    for word in ("failure", "error", "skipped"):
        if case.find(word) is not None:
            return f"**{word}**"
    found = [p.attrib["value"] for p in case.iter("property")]
    return "✓" if found == ["holds"] else found[0]


def table(columns: list[str], known: dict[str, dict[str, str]]) -> str:
    """A table in Markdown; a cell that no test filled says so."""
    lines = [f"| transformation | {' | '.join(columns)} |"]
    lines.append("|---|" + ":-:|" * len(columns))
    for row in EVERY:
        cells = [known.get(column, {}).get(row, "**empty**") for column in columns]
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(known: dict[str, dict[str, str]]) -> bool:
    """Writes the tables, and says whether every cell holds."""
    parts = [f"## {name}\n\n{table(list(p), known)}" for name, p in PARTS.items()]
    number = len(EVERY) * sum(map(len, PARTS.values()))
    held = sum(cell == "✓" for column in known.values() for cell in column.values())
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
    TABLE.write_text(text + "\n")
    print(f"{held} of {number} cells hold. Wrote {TABLE}", flush=True)
    return held == number


def main() -> None:
    """Runs, writes, and fails if a cell does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resume", action="store_true", help="keep known cells")
    parser.add_argument(
        "--rows", nargs="+", choices=EVERY, help="run these, and keep the others' cells"
    )
    options = parser.parse_args()
    if options.rows:
        known = of_table()
        run_rows(known, options.rows)
    else:
        resume = options.resume and KNOWN.exists()
        known = json.loads(KNOWN.read_text()) if resume else {}
        run_columns(known)
    raise SystemExit(not write(known))


if __name__ == "__main__":
    main()
