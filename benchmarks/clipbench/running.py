"""The cells of the table in several processes, each on a core of its own."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

Record = dict[str, Any]
Job = tuple[Any, ...]  # a function and its arguments


def run(
    plan: Callable[[list[Record]], Iterable[Job]],
    records: list[Record],
    workers: int,
    total: int,
) -> Iterator[Record]:
    """The records that are missing, as they come.

    Args:
        plan: from the records so far to the jobs that are missing and can start now,
            the most important first.
        records: those that are there.
        workers: how many processes.
        total: how many records of methods are missing.
    """
    known = list(records)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=one_core) as pool,
        tqdm(total=total, unit="method") as progress,
    ):
        running: dict[Any, Job] = {}
        while True:
            free = [job for job in plan(known) if job not in running.values()]
            for job in free[: workers - len(running)]:
                running[pool.submit(*job)] = job
            if not running:
                return
            future = next(as_completed(running))
            del running[future]
            record = future.result()
            known.append(record)
            yield record
            progress.update(record["kind"] == "method")


def one_core() -> None:
    """A process that leaves the other cores to the others."""
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )


def plan(
    cells: list[tuple[str, str]], methods: list[str], records: list[Record]
) -> Iterator[Job]:
    """A method can start once the learning rate of its cell is tuned."""
    for cell in cells:
        own = [r for r in records if (r["task"], r["optimizer"]) == cell]
        rates = [r["rate"] for r in own if r["kind"] == "rate"]
        missing = missing_methods(cell, methods, records)
        if missing and not rates:
            yield tune, *cell
        else:
            yield from ((train, *cell, method, rates[0]) for method in missing)


def missing_methods(
    cell: tuple[str, str], methods: list[str], records: list[Record]
) -> list[str]:
    """The methods without a record in a cell."""
    done = {
        r["method"]
        for r in records
        if r["kind"] == "method" and (r["task"], r["optimizer"]) == cell
    }
    return [m for m in methods if m not in done]


def tune(task: str, optimizer: str) -> Record:
    """The learning rate of a task with an optimizer."""
    from clipbench import training

    return training.tuned(task, optimizer)


def train(task: str, optimizer: str, method: str, rate: float) -> Record:
    """The results of one method."""
    from clipbench import training

    return training.compared(task, optimizer, method, rate)
