"""A diagnosis as HTML, with a small picture of the evidence for each finding."""

from collections.abc import Iterable, Mapping

import numpy as np

from .drawing import Envelope
from .findings import Finding, escaped, places, shown
from .page import head

_WIDTH, _HEIGHT, _MARKS = 600, 90, 200
_COLOURS = {"error": "#C4320A", "warning": "#B27700", "info": "#2F8FD8"}


def page(parts: Mapping[str, str]) -> str:
    """A whole page from labels of runs to what is shown of each."""
    title = "Diagnosis: " + ", ".join(map(escaped, parts))
    shown = [f"<h2>{escaped(label)}</h2>\n{part}" for label, part in parts.items()]
    return head(title) + "\n".join(shown) + "\n</main></body></html>\n"


def fragment(
    summary: str,
    findings: Iterable[Finding],
    pictures: Mapping[str, Envelope],
    unjudged: Iterable[str],
) -> str:
    """What is shown of one run, as a part of a page or in a notebook."""
    parts = [f"<p>{escaped(summary)}</p>"]
    parts += [_finding(x, pictures.get(x.evidence["column"])) for x in findings]
    parts += [f"<p><small>{escaped(line)}</small></p>" for line in unjudged]
    return "\n".join(parts)


def _finding(finding: Finding, picture: Envelope | None) -> str:
    numbers = "".join(
        f"<tr><td>{escaped(name)}</td><td>{escaped(shown(value))}</td></tr>"
        for name, value in finding.evidence.items()
    )
    colour = _COLOURS[finding.severity]
    return (
        f'<h3><span style="color: {colour}">{finding.severity}</span>:'
        f" {escaped(finding.code)} at {escaped(places(finding))}</h3>\n"
        f"<p>{escaped(finding.sentence)}</p>\n"
        + (sketch(picture, finding.steps, colour) if picture else "")
        + f"<table>{numbers}</table>\n<p><code>{escaped(finding.advice)}</code></p>"
    )


def sketch(line: Envelope, steps: tuple[int, ...], colour: str) -> str:
    """A line over the steps as SVG, with some steps marked."""
    values = np.stack([line.low, line.middle, line.high])
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    if finite.min() > 0:  # norms vary by factors
        values, finite = np.log(values), np.log(finite)
    low, high = float(finite.min()), float(finite.max())
    first, last = float(line.steps[0]), float(line.steps[-1])
    x = _scaled(np.asarray(line.steps, np.float64), first, last, _WIDTH)
    tops = _HEIGHT - _scaled(values, low, high, _HEIGHT)
    marked = _scaled(np.array(steps[:_MARKS], float), first, last, _WIDTH)
    marks = "".join(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT}"/>' for at in marked
    )
    drawn = "".join(f'<path d="{_path(x, y)}"/>' for y in tops)
    return (
        f'<svg viewBox="-2 -2 {_WIDTH + 4} {_HEIGHT + 4}" width="{_WIDTH}"'
        f' height="{_HEIGHT}" role="img" aria-label="the evidence">'
        f'<g stroke="{colour}" stroke-opacity="0.6">{marks}</g>'
        f'<g fill="none" stroke="#2F8FD8">{drawn}</g></svg>\n'
    )


def _scaled(values: np.ndarray, low: float, high: float, size: int) -> np.ndarray:
    # Halves, since the difference of two huge numbers may overflow.
    half = high / 2 - low / 2
    return (values / 2 - low / 2) / (half or 1.0) * size


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Lines between neighbours that are finite."""
    known = np.isfinite(y)
    before = np.append(False, known[:-1])
    return "".join(
        f"{'L' if joined else 'M'}{a:.1f} {b:.1f}"
        for a, b, joined in zip(x[known], y[known], before[known], strict=True)
    )
