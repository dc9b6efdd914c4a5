"""Which models, optimizers and clippers are trained together."""

from typing import NamedTuple

from diagnosis.tasks import tasks_of

OPTIMIZERS = ("sgd", "adam", "muon")
HALVES = ("design", "test", "second", "third")


class Cell(NamedTuple):
    """What one compiled program trains."""

    task: str
    optimizer: str
    clipper: str


def cells_of(half: str) -> list[Cell]:
    """The cells of a half.

    Each task has two of the three optimizers with a fixed threshold, and in each half
    other two of a kind of model. Rules that adapt, and the skipping of steps, take
    turns on the tasks that compile fast.
    """
    tasks = [task.name for task in tasks_of(half)]
    cells = []
    for i, task in enumerate(tasks):
        left_out = OPTIMIZERS[(i + HALVES.index(half)) % 3]
        cells += [Cell(task, o, "fixed") for o in OPTIMIZERS if o != left_out]
    mlp, rnn, lstm, cnn, _, policy = tasks
    if half == "third":
        return [
            *cells,
            *(Cell(mlp, "muon", "skip"), Cell(lstm, "sgd", "skip")),
            *(Cell(rnn, "adam", "zclip"), Cell(cnn, "sgd", "zclip")),
            *(Cell(mlp, "adam", "quantile"), Cell(policy, "muon", "auto")),
        ]
    if half == "second":
        return [
            *cells,
            *(Cell(rnn, "adam", "skip"), Cell(policy, "sgd", "skip")),
            *(Cell(mlp, "adam", "zclip"), Cell(rnn, "muon", "zclip")),
            *(Cell(policy, "adam", "quantile"), Cell(mlp, "muon", "auto")),
        ]
    return [
        *cells,
        *(Cell(mlp, "adam", "skip"), Cell(cnn, "sgd", "skip")),
        *(Cell(policy, "adam", "zclip"), Cell(mlp, "sgd", "zclip")),
        *(Cell(cnn, "adam", "quantile"), Cell(rnn, "adam", "auto")),
    ]
