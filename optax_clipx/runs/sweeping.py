"""`find_threshold`: a short sweep over thresholds."""

import itertools
import json
import operator
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .jsonl import ReadError
from .missing import missing
from .overwriting import may_write

_FLAT = 0.01
_KEYS = ("limit", "learning_rate", "seed")


class Sweep(NamedTuple):
    """The result of a sweep over thresholds.

    Attributes:
        best: the threshold with the best score. Each pair of a threshold and a learning
            rate has a score: the median over the seeds. The score of a threshold is the
            best score of its pairs.
        best_learning_rate: the learning rate of the pair with the best score. It is
            ``None`` if you passed no learning rates.
        limits: the thresholds that were tried, in rising order.
        learning_rates: the learning rates that were tried, or ``(None,)``.
        scores: an array of shape ``(thresholds, learning_rates, seeds)``. An entry is
            NaN if training failed.
        higher_is_better: whether a higher score is better, as for an accuracy.
        warning: why the result may be wrong. Without a warning, it is an empty string.
    """

    best: float
    best_learning_rate: float | None
    limits: tuple[float, ...]
    learning_rates: tuple[float | None, ...]
    scores: np.ndarray
    higher_is_better: bool
    warning: str

    def __str__(self) -> str:
        middle = _middle(self.scores, self.higher_is_better)
        each = middle.max(axis=1) if self.higher_is_better else middle.min(axis=1)
        rate = self.best_learning_rate
        with_rate = "" if rate is None else f" with the learning rate {rate:g}"
        lines = [f"best threshold: {self.best:.4g}{with_rate}"]
        for limit, score in zip(self.limits, each, strict=True):
            said = f"score {score:.4g}" if np.isfinite(score) else "training failed"
            lines.append(f"  threshold {limit:.4g}: {said}")
        return "\n".join([*lines, *([f"warning: {self.warning}"] * bool(self.warning))])

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        theme: str = "light",
        force: bool = False,
    ) -> Any:
        """Draws the scores of all thresholds and learning rates.

        An existing picture is overwritten only with ``force=True``.
        """
        from . import plotting

        if path is not None:
            may_write(Path(path), force)
        draw = plotting.sweep if len(self.learning_rates) == 1 else plotting.sweep_map
        figure = draw(self, theme=theme)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        return figure


def find_threshold(
    train_fn: Callable[..., Any],
    low: float | int,
    high: float | int,
    *,
    num: int = 8,
    seeds: Collection[Any] | None = None,
    learning_rates: Collection[Any] | None = None,
    higher_is_better: bool = False,
    path: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: bool = True,
) -> Sweep:
    r"""Trains with several thresholds and finds the threshold with the best score.

    The thresholds are :math:`t_i = a (b / a)^{i / (m - 1)}` for :math:`i` from 0 to
    :math:`m - 1`. Each threshold is the threshold before it, times a constant factor.

    Args:
        train_fn: a function that trains and returns a score: ``train_fn(threshold)``.
            By default a lower score is better. If you pass ``seeds``, the function is
            also called with ``seed=``. If you pass ``learning_rates``, it is also
            called with ``learning_rate=``. The score is a number or an array with one
            entry. If training failed, ``train_fn`` must return NaN.
        low: :math:`a`, the smallest threshold. A good choice is 0.2 times the
            threshold that :func:`suggest_threshold` suggests.
        high: :math:`b`, the largest threshold. A good choice is 5 times the threshold
            that :func:`suggest_threshold` suggests.
        num: :math:`m`, the number of thresholds to try.
        seeds: whole numbers. Each threshold is tried with each seed. Thresholds are
            compared by their median score over the seeds.
        learning_rates: each threshold is tried with each of these learning rates.
        higher_is_better: whether a higher score is better, as for an accuracy.
        path: a JSONL file to which each score is added. If the file exists, the sweep
            continues. It does not train again with a threshold, learning rate and seed
            whose score is in the file. If you have changed ``train_fn``, delete the
            file first.
        picture: where to save a picture of the result.
        force: overwrite an existing picture. The file with the scores is never
            overwritten.
        progress: show a progress bar, if tqdm is installed.

    Returns:
        A :class:`Sweep`.

    Raises:
        ValueError: unless ``0 < low < high``, if a seed is not a whole number, if the
            file at ``path`` was not written by this function, if a score is not a
            single number, or if training failed with every threshold.
        FileExistsError: if the picture exists and ``force`` is false. This error is
            raised before training starts.
        ImportError: if you pass ``picture`` and matplotlib is not installed.

    Example:
        >>> import optax_clipx as clipx
        >>> found = clipx.find_threshold(
        ...     lambda t: (t - 1.0) ** 2, 0.1, 10.0, num=5, progress=False
        ... )
        >>> found.best
        1.0

    References:
        Pascanu et al., 2013, arXiv 1211.5063, find that training is not very sensitive
        to the threshold. So it is enough to try a few thresholds.
    """
    _check(low, high, num, seeds=seeds, learning_rates=learning_rates)
    limits = tuple(float(f"{x:.6g}") for x in np.geomspace(low, high, num))
    rates = (None,) if learning_rates is None else tuple(map(float, learning_rates))
    kept_seeds = (None,) if seeds is None else tuple(map(_whole, seeds))
    if picture is not None:
        may_write(Path(picture), force)
    settings = list(itertools.product(limits, rates, kept_seeds))
    known = {} if path is None else _known(Path(path))
    bar = _bar(len(settings), progress)
    again = sum(setting in known for setting in settings)
    if again:  # of a training that may have changed since
        said = f"{again} of {len(settings)} scores taken from {path}"
        print(f"{said}; delete it to train again", file=sys.stderr)
    for setting in settings:
        if setting not in known:
            extra = dict(zip(_KEYS[1:], setting[1:], strict=True))
            given_extra = {k: v for k, v in extra.items() if v is not None}
            known[setting] = _score(train_fn(setting[0], **given_extra))
            if path is not None:
                _add(Path(path), setting, known[setting])
        if bar is not None:
            bar.set_postfix_str(f"threshold {setting[0]:g}: {known[setting]:.4g}")
            bar.update()
    if bar is not None:
        bar.close()
    shape = (len(limits), len(rates), len(kept_seeds))
    scores = np.array([known[setting] for setting in settings]).reshape(shape)
    found = _chosen(limits, rates, scores, higher_is_better)
    if picture is not None:
        found.plot(picture, force=force)
    return found


def _check(low: Any, high: Any, num: int, **lists: Collection[Any] | None) -> None:
    if not (0 < low < high < np.inf):
        raise ValueError(f"Expected 0 < low < high, got low={low}, high={high}.")
    if num < 2:
        raise ValueError(f"Expected num >= 2, got num={num}.")
    for name, given in lists.items():
        if given is not None and not len(given):
            raise ValueError(f"Expected {name} to be None or not empty, got {given!r}.")


def _whole(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise ValueError(
            f"Expected seeds to be whole numbers such as range(3), got {seed!r}."
        ) from None


def _score(given: Any) -> float:
    """The score, which may come as an array with one entry."""
    values = np.asarray(given, np.float64)
    if values.size != 1:
        raise ValueError(
            f"Expected train_fn to return one number, got shape {values.shape}. Return"
            " its mean, or the last of the losses."
        )
    return float(values.reshape(()))


def _middle(scores: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """The median over the seeds; one that failed is worse than any that did not."""
    worst = -np.inf if higher_is_better else np.inf
    return np.median(np.where(np.isfinite(scores), scores, worst), axis=2)


def _chosen(
    limits: tuple[float, ...],
    rates: tuple[float | None, ...],
    scores: np.ndarray,
    higher_is_better: bool,
) -> Sweep:
    middle = _middle(scores, higher_is_better)
    if not np.isfinite(middle).any():
        raise ValueError(
            f"Training failed with every threshold from {limits[0]:g} to"
            f" {limits[-1]:g}. Try smaller ones, or a lower learning rate."
        )
    flat = np.argmax(middle) if higher_is_better else np.argmin(middle)
    at, rate = np.unravel_index(int(flat), middle.shape)
    edge = {0: ("smallest", "low"), len(limits) - 1: ("largest", "high")}.get(int(at))
    warnings = []
    of_seeds, of_limits = np.ptp(scores[at, rate]), np.ptp(middle[:, rate])
    if _is_flat(middle):
        warnings.append(
            "The scores of all thresholds differ by less than 1%. You can use any of"
            " these thresholds."
        )
    elif edge is not None:
        other = "lower" if edge[1] == "low" else "higher"
        warnings.append(
            f"The best threshold, {limits[at]:g}, is the {edge[0]} that was tried. A"
            f" {other} threshold may be better: pass a {other} value as {edge[1]}=."
        )
    if of_seeds > of_limits:  # false if anything failed: that tells thresholds apart
        warnings.append(
            "At the best threshold, the scores of different seeds differ by"
            f" {of_seeds:.2g}."
            f" The scores of different thresholds differ by only {of_limits:.2g}. To"
            " find a difference, try more seeds or thresholds that are further apart."
        )
    return Sweep(
        limits[at],
        rates[rate],
        limits,
        rates,
        scores,
        higher_is_better,
        " ".join(warnings),
    )


def _is_flat(scores: np.ndarray) -> bool:
    """Whether all scores are equal to 1%."""
    return bool(np.ptp(scores) < _FLAT * np.abs(scores).min())  # false for infinity


def _known(path: Path) -> dict[tuple[Any, ...], float]:
    """The scores in a file; a last line that was cut off is taken off."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        path.write_bytes(data)
    found = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            record = json.loads(line)
            setting = tuple(record[key] for key in _KEYS)
            score = record["score"]
            found[setting] = float("nan" if score is None else score)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise ReadError(
                f"{path}:{number}: expected a line that find_threshold wrote, got"
                f" {line[:60].decode(errors='replace')!r}. Pass another path."
            ) from None
    return found


def _add(path: Path, setting: tuple[Any, ...], score: float) -> None:
    record = dict(zip(_KEYS, setting, strict=True))
    record["score"] = score if np.isfinite(score) else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _bar(total: int, progress: bool) -> Any:
    if not progress:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"no progress bar: {missing('tqdm')}", file=sys.stderr)
        return None

    bar = tqdm(total=total, desc="thresholds", unit="run", delay=1e-9)
    if not sys.stderr.isatty():
        bar.refresh = lambda *_, **__: None  # in a file: one line, when it is closed
    return bar
