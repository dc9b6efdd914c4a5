"""Is the suggested threshold a good one? Against a grid of ten, on the main example.

Records the norms of one seed of ``examples/exploding_gradients.py``, as the example
trains it with ``clip_by_global_norm`` or without clipping, asks `suggest_threshold` for
a threshold, trains with that on five seeds, and compares the test score (accuracy, or
explained variance) with the best of ten thresholds from a hundredth to ten times the
example's, or thirty for the regression.

    python benchmarks/choosing.py
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import optax_clipx as clipx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import exploding_gradients as example  # noqa: E402
import image_sequences  # noqa: E402
import tasks  # noqa: E402

GRIDS = {"regression": (0.1, 1000.0), "rows": (0.03, 30.0), "pixels": (0.03, 30.0)}
RATES = (0.1, 0.5, 0.9)


def score_with(task: Any, method: Any, seeds: int) -> float:
    """The median test score over seeds; a seed that is not finite is the worst."""
    name = "under test"
    example.CLIPPERS[name] = lambda limit: method
    score = example.train(task, name, seeds).score
    return float(np.median(np.where(np.isfinite(score), score, -np.inf)))


def rows_of(task: Any, seeds: int) -> list[dict[str, Any]]:
    """The grid, and what is suggested from each recorded run."""
    low, high = GRIDS[task.name]
    limits = [float(f"{x:.3g}") for x in np.geomspace(low, high, 10)]

    def fixed(limit: float) -> float:
        return score_with(task, clipx.clip_by_global_norm(limit), seeds)

    grid = {limit: fixed(limit) for limit in limits}
    best = max(grid.values())
    base = {"task": f"{task.name}, {task.model}"}
    found = [
        {**base, "recorded": "", "how": "best of the grid", "limit": limit, "score": s}
        for limit, s in grid.items()
        if s == best
    ][:1]
    for recorded in ("global", "none"):
        run = example.train(task, recorded, 1)
        norms = run.history["norm"][0]
        shown = f"threshold {run.limit:g}" if recorded == "global" else "no clipping"
        for rate in RATES:
            suggestion = clipx.suggest_threshold(norms, rate, limit=run.limit)
            row = {**base, "recorded": shown, "how": f"clip_rate={rate:g}"}
            if np.isnan(suggestion.value):  # it exploded too early
                found.append({**row, "limit": None, "score": np.nan})
                continue
            score = fixed(suggestion.value)
            found.append({**row, "limit": suggestion.value, "score": score})
            if suggestion.rule:
                rule = suggestion.rule.removeprefix("optax_clipx.")
                method = eval(suggestion.rule, {"optax_clipx": clipx})
                score = score_with(task, method, seeds)
                row["how"] += f", {rule}"
                found.append({**row, "limit": None, "score": score})
    return [{**row, "of best": row["score"] / best} for row in found]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| task | recorded with | suggestion | threshold | score | of the best |"]
    lines.append("|---|---|---|---:|---:|---:|")
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:.3g}"
        score = f"{row['score']:.3f} | {row['of best']:.1%}"
        if np.isnan(row["score"]):
            limit, score = "none", "|"
        cells = (row["task"], row["recorded"], row["how"], limit, score)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains, prints, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--only", help='one task, such as "rows, rnn"')
    arguments = parser.parse_args()
    data = image_sequences.load("digits", None)
    chosen = [tasks.regression(1000, 50)]
    for order in ("rows", "pixels"):
        for cell in ("rnn", "lstm"):
            chosen.append(tasks.images(order, cell, data, batch_size=64, steps=1000))
    rows = []
    for task in chosen:
        if arguments.only not in (None, f"{task.name}, {task.model}"):
            continue
        rows += rows_of(task, arguments.seeds)
    text = table(rows)
    print(text)
    environment = {"jax": jax.__version__, "machine": platform.machine()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "choosing.md").write_text(text)
    (arguments.output / "choosing.json").write_text(
        json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
