"""The command line: ``python -m optax_clipx plot|suggest|... RUN...``."""

import argparse
import contextlib
import json
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .runs import naming, plotting
from .runs.diagnosing import diagnose
from .runs.escaping import printable, printable_lines
from .runs.history import History
from .runs.jsonl import ReadError
from .runs.overwriting import FORCE, may_write
from .runs.suggesting import Recorded, suggest_threshold
from .runs.suggestion import Suggestion
from .runs.table import STEP, present

_RUNS = """
RUN is a file with the metrics of a run, or a folder with one such file. The file can
be JSONL or CSV that History wrote, metrics.csv of Lightning, a CSV log of Keras,
trainer_state.json of Hugging Face, a CSV export of W&B, JSONL of MaxText or Levanter,
or a TensorBoard event file. To read event files, run: pip install tensorboard

Exit code 2 means that the input was wrong.
"""
_OVERWRITES = "Files are overwritten only with --force.\n"
_NORM = "gradient norm"  # as it is called in the picture of several runs
_EXAMPLES = {
    "plot": """
examples:
  python -m optax_clipx plot run.jsonl                      write run.png
  python -m optax_clipx plot run.jsonl -o norms.svg --theme dark
  python -m optax_clipx plot runs/a runs/b --html page.html one interactive page
  python -m optax_clipx plot log.csv --step iter --norm gnorm --threshold 1.0
""",
    "suggest": """
examples:
  python -m optax_clipx suggest run.jsonl                   clip 10% of the steps
  python -m optax_clipx suggest run.jsonl --clip-rate 0.01
  python -m optax_clipx suggest logs/run1 --json
""",
    "compare": """
examples:
  python -m optax_clipx compare without=a.jsonl with=b.jsonl -o loss.png
  python -m optax_clipx compare off=a1.jsonl off=a2.jsonl on=b1.jsonl on=b2.jsonl
  python -m optax_clipx compare a.jsonl b.jsonl -o both.png  the losses and the norms
  python -m optax_clipx compare a.csv b.csv --column val_loss
""",
    "watch": """
examples:
  python -m optax_clipx watch run.jsonl                     end it with Ctrl-C
  python -m optax_clipx watch runs/*.jsonl --once           show the runs once

If the output is not a terminal, for example a pipe, the run is shown once.
""",
    "diagnose": """
examples:
  python -m optax_clipx diagnose run.jsonl                  print the faults
  python -m optax_clipx diagnose runs/a --html page.html    write a page with pictures
  python -m optax_clipx diagnose log.csv --norm gnorm --threshold 1.0 --json

With diagnose, exit code 0 means that there are no warnings and no errors. Exit code 1
means that there are warnings or errors.
""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        arguments: of the command line; ``None`` takes the program's own.

    Returns:
        0, or 2 if something was wrong with the input; 1 if `diagnose` found something.
    """
    given = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _note
        status: int | None = None
        try:
            status = given.run(given)
            sys.stdout.flush()
        except BrokenPipeError:  # who reads the output has seen enough, as head has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError, ImportError) as error:
            said = str(error).replace(FORCE, "--force")
            print(f"error: {printable_lines(said)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 0
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optax_clipx",
        description="Shows what clipping does in a run, and suggests a threshold.",
        epilog=_RUNS
        + _OVERWRITES
        + "".join(_EXAMPLES.values()).replace("\nexamples:", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"optax_clipx {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, what: str) -> argparse.ArgumentParser:
        more = "" if name in ("suggest", "watch") else _OVERWRITES
        sub = commands.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:] + ".\n" + _RUNS + more,
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument(
            "runs", nargs="+", metavar="RUN", help="the file or folder of a run"
        )
        sub.add_argument("--step", metavar="NAME", help="the column with the step")
        return sub

    plot = command("plot", _plot, "draw the norms, the clip rate and a histogram")
    _norm_options(plot)
    plot.add_argument(
        "--threshold",
        "--limit",
        dest="limit",
        type=_number,
        help="the threshold to draw",
    )
    plot.add_argument(
        "--html", type=Path, metavar="PAGE", help="write an interactive page"
    )
    _picture_options(plot)

    suggest = command("suggest", _suggest, "suggest a threshold from recorded norms")
    _norm_options(suggest)
    suggest.add_argument(
        "--clip-rate",
        type=_number,
        default=0.1,
        help="the fraction of steps to clip (default: 0.1)",
    )
    suggest.add_argument("--json", action="store_true", help="print JSON")

    compare = command(
        "compare", _compare, "draw several runs in one picture, and compare their loss"
    )
    compare.add_argument(
        "--column",
        metavar="NAME",
        help="the column to draw and to compare (default: the loss, and the gradient"
        " norm if all runs have it)",
    )
    _picture_options(compare)

    watch = command("watch", _watch, "show a run live in the terminal")
    _norm_options(watch)
    watch.add_argument(
        "--every",
        type=_number,
        default=1.0,
        metavar="SECONDS",
        help="seconds between updates of the display",
    )
    watch.add_argument(
        "--once", action="store_true", help="show the run once, then end"
    )

    diagnose = command("diagnose", _diagnose, "find faults in a run and say what to do")
    _norm_options(diagnose)
    diagnose.add_argument("--loss", metavar="NAME", help="the column with the loss")
    diagnose.add_argument(
        "--threshold",
        metavar="NAME",
        help="the column with the threshold, or the threshold as a number",
    )
    diagnose.add_argument(
        "--update-norm", metavar="NAME", help="the column with the norm of the updates"
    )
    diagnose.add_argument(
        "--schedule", metavar="NAME", help="the column with the learning rate"
    )
    diagnose.add_argument(
        "--target",
        type=_number,
        help="the fraction of steps that the clipping method is meant to clip",
    )
    diagnose.add_argument("--json", action="store_true", help="print JSON")
    diagnose.add_argument(
        "--html", type=Path, metavar="PAGE", help="write a page with pictures"
    )
    diagnose.add_argument("--force", action="store_true", help="overwrite files")
    return parser


def _norm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--norm", metavar="NAME", help="the column with the gradient norm"
    )


def _picture_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, help="the file of the picture")
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("--force", action="store_true", help="overwrite files")


def _plot(given: argparse.Namespace) -> None:
    outputs = _outputs(given) if given.html is None or given.output else []
    for path in [*outputs, *([given.html] if given.html else [])]:
        may_write(path, given.force)
    options = {"limit": given.limit}
    loaded = [_load(run, given) for run in given.runs]
    for (columns, norm), path in zip(loaded, outputs, strict=False):
        figure = plotting.overview(columns, norm=norm, theme=given.theme, **options)
        _save(figure, path)
    if given.html is not None:
        from .runs.page import page

        named = dict(zip(_labels(given.runs), loaded, strict=True))
        given.html.parent.mkdir(parents=True, exist_ok=True)
        given.html.write_text(page(named, **options), encoding="utf-8")
        print(f"Wrote {printable(str(given.html))}")


def _suggest(given: argparse.Namespace) -> None:
    found = {}
    for label, run in zip(_labels(given.runs), given.runs, strict=True):
        columns, norm = _load(run, given)
        try:
            found[label] = suggest_threshold(Recorded(columns, norm), given.clip_rate)
        except ValueError as error:
            raise ReadError(f"{run}: {error}") from None
    if given.json:
        print(json.dumps({label: _plain(x) for label, x in found.items()}))
        return
    indents: Any = {"initial_indent": "  ", "subsequent_indent": "    "}
    for label, suggestion in found.items():
        print(printable(label))
        for line in str(suggestion).splitlines():
            print(textwrap.fill(line, 80, **indents))


def _plain(suggestion: Suggestion) -> dict[str, Any]:
    """The fields for JSON, which has no NaN."""
    fields = suggestion._asdict()
    return {name: None if x != x else x for name, x in fields.items()}


def _compare(given: argparse.Namespace) -> None:
    path = given.output or Path("compare.png")
    may_write(path, given.force)
    groups: dict[str, list[Any]] = {}
    for run in given.runs:
        label, equals, source = run.partition("=")
        if not equals or Path(run).exists():
            label, source = _labels([run])[0], run
        columns = naming.with_whole_norm(History.load(source, step=given.step).columns)
        groups.setdefault(label, []).append(_to_compare(columns, given.column, source))
    column = given.column or "loss"
    every = [set(columns) for seeds in groups.values() for columns in seeds]
    shown = [column, *([_NORM] if all(_NORM in names for names in every) else [])]
    figure = plotting.compare(groups, column=shown, theme=given.theme)
    for label, seeds in groups.items():
        ends = [_end(columns[column]) for columns in seeds]
        middle, low, high = np.median(ends), np.min(ends), np.max(ends)
        seen = f"{low:.4g} to {high:.4g} in {len(ends)} runs"
        print(
            f"{printable(label)}: {printable(column)} {middle:.4g}"
            f" ({'1 run' if len(ends) == 1 else seen}), median of the last tenth of the"
            " steps"
        )
    _save(figure, path)


def _to_compare(
    columns: dict[str, np.ndarray], column: str | None, source: str
) -> dict[str, np.ndarray]:
    """The columns of a run that are drawn beside those of other runs."""
    name = column or "loss"
    found = columns[
        name if name in columns else naming.pick(columns, name, None, source)
    ]
    kept = {name: found, STEP: columns[STEP]}
    with contextlib.suppress(ReadError):  # without a norm, only the loss is drawn
        norm = naming.pick(columns, "norm")
        # What is called "value" may be the loss as well.
        if column is None and not norm.endswith("value") and _any_finite(columns[norm]):
            kept[_NORM] = columns[norm]
    return kept


def _any_finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(np.asarray(values, np.float64)).any())


def _watch(given: argparse.Namespace) -> None:
    from .runs.live import follow

    if not given.every > 0:
        raise ValueError(f"Expected --every > 0, got {given.every}.")
    runs = dict(zip(_labels(given.runs), given.runs, strict=True))
    follow(runs, given.norm, given.step, given.every, given.once)


def _diagnose(given: argparse.Namespace) -> int:
    if given.html is not None:
        may_write(given.html, given.force)
    names = ("loss", "norm", "update_norm", "schedule", "target", "step")
    options = {name: getattr(given, name) for name in names}
    found, files = {}, {}
    for label, run in zip(_labels(given.runs), given.runs, strict=True):
        # With its ending, so that a name such as "diverged" is not read as a verdict.
        files[label] = Path(run).name if label == Path(run).stem else label
        threshold = _name_or_number(given.threshold)
        found[label] = diagnose(run, threshold=threshold, **options)
    if given.html is not None:
        from .runs.diagnosis_page import page

        given.html.parent.mkdir(parents=True, exist_ok=True)
        shown = page({label: x._repr_html_() for label, x in found.items()})
        given.html.write_text(shown, encoding="utf-8")
    if given.json:
        print(json.dumps({label: x._asdict() for label, x in found.items()}))
    else:
        for label, diagnosis in found.items():
            print(f"{printable(files[label])}: {diagnosis}")
        if given.html is not None:
            print(f"Wrote {printable(str(given.html))}")
    return int(any(found.values()))


def _name_or_number(text: str | None) -> str | float | None:
    """A threshold as it was typed; a column may have any name but a number."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _load(run: str, given: argparse.Namespace) -> tuple[dict[str, np.ndarray], str]:
    """The columns of a run and the name of its norm."""
    columns = naming.with_whole_norm(History.load(run, step=given.step).columns)
    norm = naming.pick(columns, "norm", given.norm, run)
    if not np.isfinite(columns[norm]).any():
        raise ReadError(
            f"{run}: there is no finite number in {norm!r}. Name another column with"
            " --norm NAME, or record a run that does not explode at once."
        )
    return columns, norm


def _outputs(given: argparse.Namespace) -> list[Path]:
    """Where the picture of each run goes."""
    beside = []
    for run in map(Path, given.runs):
        name = run.name if run.is_dir() or "tfevents" in run.name else run.stem
        beside.append(run.parent / f"{name}.png")
    if given.output is None:
        found = beside
    elif len(beside) == 1 and not given.output.is_dir():
        found = [given.output]
    elif given.output.is_dir():
        found = [given.output / path.name for path in beside]
    else:
        raise ValueError(
            f"Expected -o to be a folder for {len(beside)} pictures, one for each run,"
            f" got {given.output}. Make a folder of this name, or leave -o out. For one"
            " picture of all runs, type: python -m optax_clipx compare"
            f" {shlex.join(given.runs)} -o {shlex.quote(str(given.output))}"
        )
    if len(set(found)) < len(found):
        raise ValueError("Several runs would be drawn to one file. Draw them apart.")
    return found


def _labels(runs: Sequence[str]) -> list[str]:
    """A short name for each run: its file's, or as much of its path as it takes."""
    paths = [Path(run) for run in runs]
    plain = [path.stem if path.suffix in (".jsonl", ".csv") else path.name
             for path in paths]  # fmt: skip
    if len(set(plain)) == len(plain):
        return plain
    if len(set(runs)) < len(runs):
        raise ValueError("A run is named twice.")
    for parts in range(2, max(len(path.parts) for path in paths)):
        ends = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(ends)) == len(ends):
            return ends
    return list(runs)


def _save(figure: Any, path: Path) -> None:
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise ValueError(
            f"{path}: expected a name that ends in .png, .svg or .pdf, got"
            f" {path.suffix or 'no ending'!r}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"Wrote {printable(str(path))}")


def _end(values: np.ndarray) -> float:
    """The median of the last tenth of what was recorded; NaN if that diverged."""
    recorded = values[present(values)]
    last = recorded[-max(1, len(recorded) // 10) :]
    if not np.isfinite(last[-1:]).all():
        return float("nan")
    return float(np.median(last[np.isfinite(last)]))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise argparse.ArgumentTypeError(
            f"expected a finite number such as 1.0, got {text!r}"
        )
    return value


def _note(message: Any, *_: Any, **__: Any) -> None:
    print(f"note: {printable_lines(str(message))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
