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
    todo: list[tuple[str, str, str]] = []
    rates = {}
    for cell in cells:
        own = [r for r in records if (r["task"], r["optimizer"]) == cell]
        if tuned := [r["rate"] for r in own if r["kind"] == "rate"]:
            rates[cell] = tuned[0]
        done = {r["method"] for r in own if r["kind"] == "method"}
        todo += [(*cell, m) for m in methods if m not in done]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=one_core) as pool,
        tqdm(total=len(todo), unit="method") as progress,
    ):
        waiting = {}
        for cell in dict.fromkeys((t, o) for t, o, _ in todo):
            if cell in rates:
                for task, optimizer, method in todo:
                    if (task, optimizer) == cell:
                        future = pool.submit(train, *cell, method, rates[cell])
                        waiting[future] = cell
            else:
                waiting[pool.submit(tune, *cell)] = cell
        while waiting:
            future = next(as_completed(waiting))
            cell, record = waiting.pop(future), future.result()
            yield record
            if record["kind"] == "method":
                progress.update()
                continue
            for task, optimizer, method in todo:
                if (task, optimizer) == cell:
                    future = pool.submit(train, *cell, method, record["rate"])
                    waiting[future] = cell


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
