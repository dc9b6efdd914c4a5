"""How long `import optax_clipx` takes beside `import optax` alone.

Subprocesses alternate; ratios are those of pairs, and their median is shown. Twice: as
Python is started, and with the garbage collector off. A collection goes over all that
JAX has made, and which import sets it off is chance.

    python benchmarks/import_time.py --pairs 30
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

PROGRAMS = ("import optax", "import optax_clipx", "import optax, jaxtyping")


def main() -> None:
    """Times the programs and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    names = ("jax", "optax", "jaxtyping")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"Python {platform.python_version()}, {versions}, {pairs} pairs\n")
    print("| garbage collector | program | seconds | ratio to optax |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for collector, first in (("on", ""), ("off", "import gc; gc.disable(); ")):
            programs = [first + program for program in PROGRAMS]
            rounds = [[seconds(p, cache) for p in programs] for _ in range(pairs + 1)]
            columns = list(zip(*rounds[1:], strict=True))  # the first compiles
            for program, column in zip(PROGRAMS, columns, strict=True):
                ratios = [t / base for t, base in zip(column, columns[0], strict=True)]
                middle, ratio = statistics.median(column), statistics.median(ratios)
                print(f"| {collector} | `{program}` | {middle:.3f} | {ratio:.3f} |")


def seconds(program: str, cache: str) -> float:
    """How long a program takes, its modules being compiled already."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
