"""Progress bars that stay readable in a file: there, each is one line, when it ends."""

import sys
from typing import Any

from tqdm import tqdm


def bar_of(*arguments: Any, **options: Any) -> tqdm:
    """A bar of tqdm: live in a terminal, and one line elsewhere."""
    bar = tqdm(*arguments, delay=1e-9, **options)  # the delay: nothing is drawn yet
    if not sys.stderr.isatty():
        bar.refresh = lambda *_, **__: None
    return bar
