"""Which rows are missing, the most important first."""

import math
from collections.abc import Iterator
from typing import Any

from lmbench.methods import FIXED, METHODS, SETTINGS
from lmbench.report import best_of_rates

Record = dict[str, Any]
Job = tuple[Any, ...]  # a function and its arguments
Row = tuple[str, str, float]  # setting, method, number
BEST = 3  # methods with three numbers
FIRST = 3  # settings whose defaults come before everything else


def tune(*cell: str) -> Record:
    """The learning rate of a model with an optimizer."""
    from lmbench import training

    return training.tuned(*cell)


def train(*row: Any) -> Record:
    """The results of a method with a number."""
    from lmbench import training

    return training.compared(*row)


def plan(
    settings: list[str], methods: list[str], size: str, records: list[Record]
) -> Iterator[Job]:
    """The jobs that can start now."""
    records = [r for r in records if r["size"] == size]
    done = {row_of(r) for r in records if r["kind"] == "method"}
    rates = {
        (r["model"], r["optimizer"]): r["rate"] for r in records if r["kind"] == "rate"
    }
    asked = set()
    for setting, method, number in dict.fromkeys(wanted(settings, methods, records)):
        model, optimizer, _ = SETTINGS[setting]
        if (setting, method, number) in done:
            continue
        if (model, optimizer) in rates:
            yield train, setting, method, number, rates[model, optimizer], size
        elif (model, optimizer) not in asked:
            asked.add((model, optimizer))
            yield tune, model, optimizer, size


def row_of(record: Record) -> Row:
    """What a record is of."""
    number = record["number"]
    return (
        record["setting"],
        record["method"],
        math.inf if number is None else number,
    )


def missing(
    settings: list[str], methods: list[str], size: str, records: list[Record]
) -> int:
    """How many rows are to come, with those of methods that are still to be chosen."""
    own = [r for r in records if r["kind"] == "method" and r["size"] == size]
    asked = set(wanted(settings, methods, own))
    unknown = [s for s in settings if not best(s, methods, own)]
    chosen = sum(2 * min(BEST, len(with_number(s, methods))) for s in unknown)
    return len(asked - {row_of(r) for r in own}) + chosen


def wanted(
    settings: list[str], methods: list[str], records: list[Record]
) -> Iterator[Row]:
    """The defaults of a few settings, all of the first one, then all others."""
    for setting in settings[:FIRST]:
        yield from defaults(setting, methods)
    yield from others(settings[0], methods, records)
    for setting in settings[FIRST:]:
        yield from defaults(setting, methods)
    for setting in settings:
        yield from others(setting, methods, records)


def defaults(setting: str, methods: list[str]) -> Iterator[Row]:
    """The default of each quick method, then all fixed thresholds."""
    quick = [m for m in possible(setting, methods) if not METHODS[m].slow]
    yield from ((setting, m, METHODS[m].numbers[0]) for m in quick)
    if FIXED in quick:
        yield from ((setting, FIXED, n) for n in METHODS[FIXED].numbers[1:])


def others(setting: str, methods: list[str], records: list[Record]) -> Iterator[Row]:
    """Other numbers of the best methods, and slow methods."""
    for method in best(setting, methods, records):
        yield from ((setting, method, n) for n in METHODS[method].numbers[1:])
    for method in possible(setting, methods):
        if METHODS[method].slow:
            yield setting, method, METHODS[method].numbers[0]


def possible(setting: str, methods: list[str]) -> list[str]:
    """The methods that work with the optimizer of a setting."""
    return [m for m in methods if SETTINGS[setting].optimizer in METHODS[m].optimizers]


def with_number(setting: str, methods: list[str]) -> list[str]:
    """The quick methods that ask for a number."""
    return [
        m
        for m in possible(setting, methods)
        if METHODS[m].asks_for and m != FIXED and not METHODS[m].slow
    ]


def best(setting: str, methods: list[str], records: list[Record]) -> list[str]:
    """The best methods that have a number, by their defaults, once all have run."""
    asked = with_number(setting, methods)
    reached = {
        r["method"]: best_of_rates(r)
        for r in records
        if r["kind"] == "method"
        and r["setting"] == setting
        and r["number"] == METHODS[r["method"]].numbers[0]
    }
    if not set(asked) <= set(reached):
        return []
    return sorted(asked, key=lambda m: reached[m])[:BEST]
