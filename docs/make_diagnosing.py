"""Takes the runs of docs/diagnosing.md from benchmarks/diagnosis, and draws them.

python benchmarks/diagnosis --halves design && python docs/make_diagnosing.py
"""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

import optax_clipx as clipx
from optax_clipx.runs.drawing import THEMES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from diagnosis.generating import load  # noqa: E402

RUNS = {  # the file, the cell and the number of the run, and its title
    "periodic": (
        "LSTM-characters_sgd_fixed",
        19,
        "an LSTM whose data have a bad shard",
    ),
    "burst": ("CNN-digits_adam_fixed", 87, "a CNN with a burst of the learning rate"),
    "decay": ("MLP-teacher_adam_fixed", 42, "an MLP with the wrong sign of its decay"),
    "leaf": ("RNN-adding_muon_fixed", 130, "an RNN with one leaf that is too large"),
    "rate": (
        "transformer-sorting_sgd_fixed",
        67,
        "a transformer with a wrong schedule",
    ),
}
MARKED = ("periodic-spikes", "update-before-loss", "loss-diverged", "level-shift")
WITHOUT = ("clip/clipped_norm", "clip/scale", "clip/nonfinite", "track/")


def main() -> None:
    """Writes the files and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "diagnosis")
    folder = parser.parse_args().folder
    for name, (cell, number, _) in RUNS.items():
        found = load(folder / "design" / f"{cell}.npz")
        (run,) = [run for facts, run, _ in found if facts["number"] == number]
        write(ROOT / "docs" / "runs" / f"{name}.csv", run)
    for theme in THEMES:
        draw(theme)


def write(path: Path, run: dict[str, np.ndarray]) -> None:
    """A file with five digits of each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {n: x for n, x in run.items() if not n.startswith(WITHOUT) and n != "step"}
    lines = [",".join(("step", *kept))]
    for i, step in enumerate(run["step"]):
        lines.append(",".join((f"{step}", *(f"{x[i]:.5g}" for x in kept.values()))))
    path.write_text("\n".join(lines) + "\n")


def draw(name: str) -> None:
    """Norm and loss of each run, with the steps that were found."""
    from matplotlib.figure import Figure

    theme = THEMES[name]
    figure = Figure(figsize=(8.8, 10.5), layout="constrained", facecolor=theme.page)
    for axes, (run, (_, _, title)) in zip(
        figure.subplots(5, 2), RUNS.items(), strict=True
    ):
        history = clipx.History.load(ROOT / "docs" / "runs" / f"{run}.csv")
        findings = clipx.diagnose(history).findings
        steps = {s for f in findings if f.code in MARKED for s in f.steps[:1]}
        for ax, column in zip(axes, ("clip/norm", "loss"), strict=True):
            panel(ax, history.steps, history[column], steps, theme)
        codes = textwrap.fill(", ".join(finding.code for finding in findings), 46)
        axes[0].plot(
            history.steps, history["clip/threshold"], "--", color=theme.limit, lw=1
        )
        axes[0].set_title(title, loc="left", fontsize=10, color=theme.text)
        axes[1].set_title(codes, loc="left", fontsize=9, color=theme.clipped)
        axes[0].set_ylabel("gradient norm", fontsize=9, color=theme.text)
        axes[1].set_ylabel("loss\n(lower is better)", fontsize=9, color=theme.text)
    for ax in figure.axes[-2:]:
        ax.set_xlabel("step", fontsize=9, color=theme.text)
    figure.savefig(ROOT / "docs" / "images" / f"diagnosing_runs_{name}.png", dpi=100)


def panel(ax: Any, steps: Any, values: Any, found: set[int], theme: Any) -> None:
    """One column of one run."""
    ax.semilogy(steps, values, color=theme.norm, lw=0.9)
    for step in found:
        ax.axvline(step, color=theme.clipped, lw=1, ls=":")
    ax.set_facecolor(theme.page)
    ax.tick_params(labelsize=8, colors=theme.text, which="both")
    ax.grid(color=theme.grid, linewidth=0.6)
    for side in ax.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    main()
