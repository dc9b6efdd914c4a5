"""The file of results: one record a line, added as they come."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def kept(path: Path, again: Callable[[Record], bool] = lambda r: False) -> list[Record]:
    """The results that are there, less those that are wanted again."""
    if not path.exists():
        return []
    text = path.read_text()
    *lines, _ = text.split("\n")  # after the last line end: cut off
    records = [json.loads(line) for line in lines]
    records = [r for r in records if not again(r)]
    usable = "".join(json.dumps(r) + "\n" for r in records)
    if usable != text:  # a file that is whole stays the one that a run may be adding to
        whole = path.with_suffix(".new")  # never is there but half a file
        whole.write_text(usable)
        whole.replace(path)
    return records


def add(path: Path, records: list[Record], new: Iterable[Record]) -> None:
    """Adds to the list and to the file, line by line."""
    with path.open("a") as file:
        for record in new:
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
