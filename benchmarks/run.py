"""Runs every benchmark that this machine can run, and writes docs/results.

    pip install -e ".[bench,pod,examples]" && python benchmarks/run.py
    python benchmarks/run.py --only steps compiling --quick

Each runs in a process of its own, so that none finds the memory full. One that needs a
package that is not installed is skipped, and said so.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
IMAGES = HERE.parent / "docs" / "images"
BENCHMARKS: dict[str, tuple[list[str], list[str], list[str]]] = {
    # name: further arguments, those of --quick, packages without which it cannot run
    "steps": ([], ["--rounds", "5", "--optimizers", "adam"], []),
    "alone": (
        ["--picture", str(IMAGES)],
        ["--rounds", "5", "--megabytes", "200", "--largest", "256"],
        ["matplotlib"],
    ),
    "adaptive": ([], ["--rounds", "5"], []),
    "compiling": ([], ["--rounds", "1", "--leaves", "10", "100"], []),
    "training": ([], ["--rounds", "5"], ["sklearn", "flax"]),
    "per_example": ([], ["--rounds", "5"], ["jax_privacy"]),
    "robustness": ([], [], []),
    "qk_clip": (
        ["--picture", str(IMAGES)],
        ["--steps", "30", "--only", "Adam 0.003"],
        ["flax", "matplotlib"],
    ),
    # Where there is no GPU it compiles for one.
    "gpu": ([], ["--rounds", "5", "--leaves", "100"], ["jax_cuda12_plugin"]),
    "pod": ([], ["--topologies", "v5p:8x8x16", "--leaves", "10"], ["libtpu", "flax"]),
}


def main() -> int:
    """Runs them one after the other; the exit code counts those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, help="some of them")
    parser.add_argument("--quick", action="store_true", help="few rounds and sizes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    said = []
    for name in tqdm(options.only or BENCHMARKS, unit="benchmark"):
        usual, quick, needs = BENCHMARKS[name]
        lacking = [x for x in needs if importlib.util.find_spec(x) is None]
        if lacking:
            said.append(f"{name}: SKIPPED, needs {', '.join(lacking)}")
            continue
        start = time.perf_counter()
        command = [sys.executable, str(HERE / f"{name}.py")]
        command += ["--output", str(options.output / name)]
        code = subprocess.run(command + (quick if options.quick else usual)).returncode
        outcome = "written" if code == 0 else f"FAILED with exit code {code}"
        said.append(f"{name}: {outcome}, {time.perf_counter() - start:.0f} s")
    print("\n".join(said))
    return sum("FAILED" in line for line in said)


if __name__ == "__main__":
    sys.exit(main())
