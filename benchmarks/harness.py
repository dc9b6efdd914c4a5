"""What every benchmark needs: contenders in turn, the environment, and the report.

A contender is a function without arguments that returns when its work is done. In each
round every contender runs once, so that a slow minute of a shared machine hits all of
them, and in another order, so that none always finds what the same one left behind.
What is reported are medians, and medians of what two contenders took in the same round,
as difference or ratio.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

Contender = Callable[[], Any]
Times = dict[str, np.ndarray]  # milliseconds of each contender, round by round


def alternate(
    contenders: dict[str, Contender],
    rounds: int,
    title: str = "",
    before: Contender = lambda: None,
) -> Times:
    """Milliseconds of each contender in each round, after two rounds of warm-up.

    What is done `before` each of them is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
        run()
    shuffle = np.random.default_rng(0)
    for _ in tqdm(range(rounds), desc=title, unit="round", leave=False):
        for name in shuffle.permutation(list(contenders)):
            before()
            start = time.perf_counter()
            contenders[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(t) for name, t in times.items()}


def compiled(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> Any:
    """The function compiled for these arguments."""
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


def normal_tree(seed: int, shapes: list[tuple[int, ...]], dtype: Any = None) -> Any:
    """A list of leaves with normal entries."""
    key = jax.random.key(seed)
    dtype = dtype or np.float32

    # Compiled once a shape: models have few, and many leaves.
    @jax.jit(static_argnums=1)
    def leaf(i: Any, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, i), shape, np.float32)

    return [leaf(i, shape).astype(dtype) for i, shape in enumerate(shapes)]


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


def table(head: list[str], rows: list[list[str]], text: int = 1) -> list[str]:
    """Lines of a table in Markdown; the first columns hold text, the others numbers."""
    rule = ["---"] * text + ["---:"] * (len(head) - text)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def footer(report: dict[str, Any]) -> list[str]:
    """The environment, as the last line."""
    env = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    return ["", f"Environment: {env}.", ""]


def write(output: Path | None, report: dict[str, Any], text: str) -> None:
    """Prints the text; with an output writes OUTPUT.json and OUTPUT.md too."""
    print(text)
    save(output, report, text)


def save(output: Path | None, report: dict[str, Any], text: str) -> None:
    """Writes OUTPUT.json and OUTPUT.md, if there is an output."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text(text)
