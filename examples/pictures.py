"""How the pictures of the examples look: as those of optax_clipx.plotting."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # draws files, opens no windows

import matplotlib.pyplot as plt

from optax_clipx.runs.drawing import rc, theme_of


@contextmanager
def style(theme: str) -> Iterator[Any]:
    """The settings of Matplotlib for "light" or "dark"; gives the theme's colours."""
    with plt.rc_context(rc(theme)):
        yield theme_of(theme)


def save(figure: Any, path: Path, theme: str) -> None:
    """Saves a picture; the dark one as ``..._dark.png`` beside the light one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if theme == "dark":
        path = path.with_stem(f"{path.stem}_dark")
    figure.savefig(path, dpi=150)
    plt.close(figure)
