"""A diagnosis as HTML, with a small picture of the evidence for each finding."""

from collections.abc import Iterable, Mapping

import numpy as np

from .drawing import Envelope
from .findings import Finding, Texts, escaped, places, shown, told_once
from .naming import WHOLE
from .page import head

_WIDTH, _HEIGHT, _MARKS = 340, 90, 200  # text is readable on a phone
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
    parts += [
        _finding(finding, texts, pictures.get(finding.evidence["column"]))
        for finding, texts in told_once(findings)
    ]
    parts += [f"<p><small>{escaped(line)}</small></p>" for line in unjudged]
    return "\n".join(parts)


def _finding(finding: Finding, texts: Texts, picture: Envelope | None) -> str:
    numbers = "".join(
        f"<tr>{_cell(_words(name))}{_cell(_value(value))}</tr>"
        for name, value in finding.evidence.items()
        if value not in ([], "")
    )
    colour, column = _COLOURS[finding.severity], finding.evidence["column"]
    return (
        f'<h3><span style="color: {colour}">{finding.severity}</span>:'
        f" {escaped(finding.code)} at {escaped(places(finding))}:"
        f" {escaped(finding.likely_cause)}</h3>\n"
        f"<p>{escaped(texts.sentence)}</p>\n"
        + (sketch(column, picture, finding.steps, colour) if picture else "")
        + f'<table tabindex="0">{numbers}</table>\n<p>{escaped(texts.remedy)}</p>'
        + (f"\n<p><code>{escaped(texts.code)}</code></p>" if texts.code else "")
    )


# What evidence is called on a page; the rest by its name, with spaces.
_WORDS = {
    "best": "best level of the loss",
    "best_steps": "first and last step of the best level",
    "blind_steps": "steps with a threshold that is too high",
    "closest": "largest norm divided by the threshold of its step",
    "column": "column in the picture",
    "count": "number of such steps",
    "diverged": "step of the divergence",
    "end": "loss at the end",
    "end_steps": "first and last step of the loss at the end",
    "factor": "factor above the level",
    "factors": "factors",
    "first_in": "first in column",
    "follows": "probably follows from",
    "follows_step": "first step of what it follows from",
    "high_norm": "99% of the norms are below",
    "highest": "highest loss",
    "highest_step": "step with the highest loss",
    "in_a_row": "skipped in a row",
    "in_loss": "loss not finite at this step",
    "lead": "steps from the updates to the loss",
    "not_recovered": "spikes without recovery of the loss",
    "rate_after": "learning rate after the jump",
    "rate_before": "learning rate before the jump",
    "rate_factor": "factor of the jump",
    "rate_jump": "step of the jump of the learning rate",
    "share": "share of the squared norm",
    "usual_norm": "median norm before the divergence",
    "warned": "step at which the norm had doubled",
}


def _cell(text: str) -> str:
    return f'<td style="white-space: normal">{escaped(text)}</td>'


def _words(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == WHOLE:
        return "norm of the whole gradient, computed from the norms of its leaves"
    return shown(value)


def sketch(name: str, line: Envelope, steps: tuple[int, ...], colour: str) -> str:
    """A line over the steps as SVG, with some steps marked."""
    values = np.stack([line.low, line.middle, line.high])
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    logarithmic = bool(finite.min() > 0)
    if logarithmic:  # norms vary by factors
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
    ends = np.exp([low, high]) if logarithmic else (low, high)
    texts = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
        for x, y, anchor, text in (
            (-6, 10, "end", f"{ends[1]:.3g}"),
            (-6, _HEIGHT, "end", f"{ends[0]:.3g}"),
            (0, _HEIGHT + 15, "start", f"step {first:,.0f}"),
            (_WIDTH, _HEIGHT + 15, "end", f"step {last:,.0f}"),
        )
    )
    return (
        f'<svg viewBox="-70 -2 {_WIDTH + 72} {_HEIGHT + 22}" width="{_WIDTH + 72}"'
        f' height="{_HEIGHT + 22}" style="max-width: 100%; height: auto"'
        f' role="img" aria-label="{escaped(_value(name))} over the steps">'
        f'<g stroke="{colour}" stroke-opacity="0.6">{marks}</g>'
        f'<g fill="none" stroke="#2F8FD8">{drawn}</g>'
        f'<g fill="currentColor" font-size="12">{texts}</g></svg>\n'
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
