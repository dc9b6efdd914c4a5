"""The cells of the table in several processes, each on a core of its own."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

Record = dict[str, Any]


def run(
    cells: list[tuple[str, str]],
    methods: list[str],
    records: list[Record],
    workers: int,
) -> Iterator[Record]:
    """The records that are missing, as they come."""
    todo, rates = {}, {}
    for cell in cells:
        own = [r for r in records if (r["task"], r["optimizer"]) == cell]
        if tuned := [r["rate"] for r in own if r["kind"] == "rate"]:
            rates[cell] = tuned[0]
        done = {r["method"] for r in own if r["kind"] == "method"}
        if missing := [m for m in methods if m not in done]:
            todo[cell] = missing
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=one_core) as pool,
        tqdm(total=sum(map(len, todo.values())), unit="method") as progress,
    ):
        waiting = set()

        def start(cell: tuple[str, str], rate: float) -> None:
            waiting.update(pool.submit(train, *cell, m, rate) for m in todo[cell])

        for cell in todo:
            if cell in rates:
                start(cell, rates[cell])
            else:
                waiting.add(pool.submit(tune, *cell))
        while waiting:
            future = next(as_completed(waiting))
            waiting.remove(future)
            record = future.result()
            yield record
            if record["kind"] == "method":
                progress.update()
            else:
                start((record["task"], record["optimizer"]), record["rate"])


def one_core() -> None:
    """A process that leaves the other cores to the others."""
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )


def tune(task: str, optimizer: str) -> Record:
    """The learning rate of a task with an optimizer."""
    from clipbench import training

    return training.tuned(task, optimizer)


def train(task: str, optimizer: str, method: str, rate: float) -> Record:
    """The results of one method."""
    from clipbench import training

    return training.compared(task, optimizer, method, rate)
