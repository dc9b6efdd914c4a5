"""Trains the runs of a half, cell by cell, and keeps their columns in files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diagnosis.cells import Cell, cells_of
from diagnosis.planting import SEEDS, Draw, draw, kinds_of_runs, plain
from diagnosis.training import Columns, train


def generate(half: str, each: int, folder: Path) -> None:
    """Trains what is not there yet, with a progress bar."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(enumerate(kinds_of_runs(half, each)))
    for cell in tqdm(cells_of(half), desc=f"{half} half", unit="cell"):
        path = folder / f"{'_'.join(cell).replace(', ', '-')}.npz"
        numbers = [i for i, (where, _) in wanted if where == cell]
        if path.exists() or not numbers:
            continue
        runs = _train(half, cell, [(i, wanted[i][1][1]) for i in numbers])
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez_compressed(
                file, runs=json.dumps([r[0] for r in runs]), **_flat(runs)
            )
        part.replace(path)  # a file is there whole or not at all


def _train(
    half: str, cell: Cell, wanted: list[tuple[int, tuple[str, ...]]]
) -> list[tuple[dict[str, Any], Columns, Columns]]:
    """The facts, the columns and the twin's columns of each run of a cell."""
    generators = [np.random.default_rng([SEEDS[half], i]) for i, _ in wanted]
    settings = [
        plain(rng, cell, SEEDS[half] + i)
        for rng, (i, _) in zip(generators, wanted, strict=True)
    ]
    clean = train(*cell, settings)
    draws = [
        draw(rng, half, cell, names, s, columns)
        for rng, (_, names), s, columns in zip(
            generators, wanted, settings, clean, strict=True
        )
    ]
    faulty = train(*cell, [d.faulty for d in draws])
    twins = train(*cell, [d.twin for d in draws])
    before = [d.first for d in draws if d.first is not None]
    first = iter(train(*cell, before) if before else [])
    found = []
    for rng, (number, _), d, run, twin in zip(
        generators, wanted, draws, faulty, twins, strict=True
    ):
        earlier = next(first) if d.first is not None else None
        facts, run = _recorded(rng, number, d, run, twin, earlier)
        found.append((facts, run, twin))
    return found


def _recorded(
    rng: np.random.Generator,
    number: int,
    d: Draw,
    run: Columns,
    twin: Columns,
    earlier: Columns | None,
) -> tuple[dict[str, Any], Columns]:
    """What is in the file of the run: also what was run before a restart."""
    lost = 0
    if earlier is not None:
        at = d.faulty.switch
        lost = int(rng.integers(20, 120))
        head = {n: x[: at + lost] for n, x in earlier.items()}
        run = {n: np.concatenate([head[n], x[at:]]) for n, x in run.items()}
    if d.faults[0].kind == "mixed":
        behind = int(rng.integers(3, 60)) if rng.random() < 0.7 else 0
        run = {
            n: np.stack([twin[n][behind:], x[: len(x) - behind]], axis=1).ravel()
            for n, x in run.items()
        }
    faults = [fault._asdict() for fault in d.faults]
    return {"number": number, "cell": list(d.cell), "faults": faults, "lost": lost}, run


def _flat(runs: list[tuple[dict[str, Any], Columns, Columns]]) -> dict[str, np.ndarray]:
    return {
        f"{i}/{kind}/{name}": values.astype(np.float32)
        for i, (_, run, twin) in enumerate(runs)
        for kind, columns in (("run", run), ("twin", twin))
        for name, values in columns.items()
    }


def load(path: Path) -> list[tuple[dict[str, Any], Columns, Columns]]:
    """The runs of a cell as they were written."""
    with np.load(path) as file:
        facts = json.loads(str(file["runs"]))
        found: list[dict[str, Columns]] = [{"run": {}, "twin": {}} for _ in facts]
        for key in file.files:
            if key != "runs":
                number, kind, name = key.split("/", 2)
                found[int(number)][kind][name] = file[key].astype(np.float64)
    for columns in found:
        for run in columns.values():
            run["step"] = run["step"].astype(np.int64)
    return [(f, c["run"], c["twin"]) for f, c in zip(facts, found, strict=True)]
