"""The text: the docstrings of scikit-learn, as bytes."""

import ast
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn

HELD_OUT = 10  # every tenth file
LEAST = 200  # characters of a docstring
LINE = 30  # characters of a line that may not occur again
WINDOWS = 256  # of the held-out text, on which all losses are measured


class Corpus(NamedTuple):
    """Training and held-out text as numbers below `words`, and where it comes from."""

    train: np.ndarray
    held_out: np.ndarray
    words: int
    source: str


def texts() -> tuple[str, str]:
    """Training and held-out docstrings of the installed scikit-learn, 2 MB with 1.9.

    Whole files are held out. A long line counts where it comes first alone, as many
    classes describe a parameter in the same words: so none is in both parts.
    """
    root = Path(sklearn.__file__).parent
    files = [p for p in sorted(root.rglob("*.py")) if "tests" not in p.parts]
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for number, path in enumerate(files):
        for text in docstrings(path):
            parts[number % HELD_OUT == 0].append(new_lines(text, seen))
    train, held_out = ("\n\n".join(filter(None, part)) for part in parts)
    return train, held_out


@functools.cache
def corpus() -> Corpus:
    """Both texts as numbers."""
    train, held_out = (text.encode() for text in texts())
    digest = hashlib.sha256(train + held_out).hexdigest()[:12]
    known, numbers = np.unique(
        np.frombuffer(train + held_out, np.uint8), return_inverse=True
    )
    numbers = numbers.astype(np.int32)
    cut = len(train)
    source = f"scikit-learn {sklearn.__version__}, sha256 {digest}"
    return Corpus(numbers[:cut], numbers[cut:], len(known), source)


def docstrings(path: Path) -> list[str]:
    """The long docstrings of a file."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
    return [text for text in texts if text and len(text) >= LEAST]


def new_lines(text: str, seen: set[str]) -> str:
    """The text without the long lines that were seen before."""
    kept = []
    for line in text.splitlines():
        words = line.strip()
        if len(words) < LINE or words not in seen:
            kept.append(line)
        if len(words) >= LINE:
            seen.add(words)
    return "\n".join(kept) if any(len(line.strip()) >= LINE for line in kept) else ""


def batches(seed: int, steps: int, batch: int, length: int) -> np.ndarray:
    """The batches of a run: steps x batch x length, the same for every method."""
    train = corpus().train
    starts = np.random.default_rng(seed).integers(
        0, len(train) - length, (steps, batch, 1)
    )
    return train[starts + np.arange(length)]


def corrupted(given: np.ndarray, seed: int, every: int) -> np.ndarray:
    """The same, but one batch of each `every` is of random bytes."""
    random = np.random.default_rng(seed + 10**6)
    noise = random.integers(0, corpus().words, given.shape, dtype=given.dtype)
    bad = np.arange(len(given)) % every == every // 2
    return np.where(bad[:, None, None], noise, given)


def windows(length: int) -> np.ndarray:
    """Windows at equal distances in the held-out text."""
    held_out = corpus().held_out
    starts = np.linspace(0, len(held_out) - length, WINDOWS).astype(int)
    return held_out[starts[:, None] + np.arange(length)]


def unigram_loss(length: int) -> float:
    """The held-out loss of the model that knows how frequent each byte is."""
    train, _, words, _ = corpus()
    counts = np.bincount(train, minlength=words) + 1.0
    logs = np.log(counts / counts.sum())
    return float(-logs[windows(length)[:, 1:]].mean())
