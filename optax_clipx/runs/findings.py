"""A finding: a fault with its steps, its evidence, and what to do about it."""

import html
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .advice import ADVICE, CHAINED, JUMP, REMOVES, REPLACES, REPLACING, put
from .causes import likely_cause, remedy
from .escaping import printable
from .naming import counted

SEVERITIES = ("error", "warning", "info")
_SHOWN = 5  # steps in a line
_STRETCHES = {  # codes whose two steps are the first and the last of a stretch
    "growing-norms",
    "lock-out",
    "rises-with-schedule",
    "always-clipped",
    "never-clipped",
    "dominant-leaf",
    "starved-leaves",
    "vanishing-by-depth",
    "exploding-by-depth",
}


class Finding(NamedTuple):
    """One fault that :func:`diagnose` found in a run.

    Attributes:
        code: the kind of the fault, such as ``"spikes"``.
        severity: ``"error"``, ``"warning"`` or ``"info"``.
        steps: the steps of the fault. If the fault lasts from one step to another,
            these are the first and the last step.
        evidence: the numbers and names on which the finding is based, as a dict, such
            as ``{"count": 2, "factor": 51.1, ...}``.
        advice: a line of code to type, and the title of an entry of Troubleshooting.

    ``likely_cause`` says in words why the run probably has this fault, and ``remedy``
    says what to do first.

    Example:
        >>> import optax_clipx as clipx
        >>> norms = [1.0 + 0.01 * (i % 7) for i in range(100)]
        >>> norms[60] = 40.0
        >>> clipx.diagnose({"norm": norms}).findings[0].steps
        (60,)
    """

    code: str
    severity: str
    steps: tuple[int, ...]
    evidence: Mapping[str, Any]
    advice: str

    @property
    def sentence(self) -> str:
        """What was found, and its cause; it may have names from a file in it."""
        return " ".join(filter(None, [self.symptom, self.cause]))

    @property
    def symptom(self) -> str:
        """What was found, in one sentence."""
        said = ADVICE[self.code].sentence
        return self._told(said(self.evidence) if callable(said) else said)

    @property
    def cause(self) -> str:
        """The jump of the learning rate that explains it; empty if there is none."""
        return self._told(JUMP) if "rate_jump" in self.evidence else ""

    @property
    def likely_cause(self) -> str:
        """Why the run probably has this fault, in a few words."""
        return self._told(likely_cause(self.code, self.evidence))

    @property
    def remedy(self) -> str:
        """What to do first, in words. ``advice`` has the line of code for it."""
        said = self._told(remedy(self.code, self.evidence))
        if "follows" in self.evidence:
            return said
        notes = (REPLACES, REMOVES, self.evidence.get("max_norm_from"), put(self.code))
        told = [f"{x[:1].upper()}{x[1:]}." for x in notes if x and x in self.advice]
        return " ".join([said, *told])

    def _told(self, said: str) -> str:
        steps = self.steps or (0,)
        given = {"step": steps[0], "last_step": steps[-1], **self.evidence}
        return said.format(**{name: _Shown(value) for name, value in given.items()})

    def __str__(self) -> str:
        return "\n  ".join(map(printable, [headline(self), *texts(self).lines()]))


def finding(code: str, severity: str, steps: Iterable[Any], **evidence: Any) -> Finding:
    """A finding with its advice; steps and numbers become Python's own."""
    plain = {
        name: value.item() if hasattr(value, "item") else value
        for name, value in evidence.items()
    }
    places = tuple(int(step) for step in steps)
    return Finding(code, severity, places, plain, advice(code))


def advice(
    code: str,
    max_norm: str | None = None,
    run: str = "history",
    line: str | None = None,
    steps: str = "steps",
    max_norm_from: str = "",
    replaces: bool = False,
) -> str:
    """The line to type for a fault, and the entry of Troubleshooting.

    ``replaces`` says that the run has a clipper, which the line takes the place of.
    """
    _, usual, entry = ADVICE[code]
    notes = [REPLACES if replaces else REMOVES] if line is None else []
    notes = notes if code in REPLACING else []
    line = line or usual
    if "{max_norm}" in line:
        notes.append(max_norm_from if max_norm else put(code))
    for note in notes:
        line += f"{';' if '#' in line else '  #'} {note}"
    chain, end = ("", "") if replaces else CHAINED
    names = {"run": run, "steps": steps, "chain": chain, "end": end}
    typed = line.format(max_norm=max_norm or "1.0", **names)
    return f'{typed}  (Troubleshooting: "{entry}")'


class _Shown:
    """A value that shows as a short text wherever a sentence has it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __format__(self, form: str) -> str:
        if form.startswith("#"):  # a number of things
            return _number_of(self.value, form[1:].strip())
        if form and isinstance(self.value, list):
            return shown([format(x, form) for x in self.value])
        return format(self.value, form) if form else shown(self.value)


def _number_of(value: Any, noun: str) -> str:
    """1 step, 2 steps, 1.5 steps."""
    if value == int(value):
        return counted(int(value), noun)
    return f"{value:.3g} {noun}s"


def shown(value: Any) -> str:
    """A number or a name as a short text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        more = ", ..." if len(value) > _SHOWN else ""
        return ", ".join(map(shown, value[:_SHOWN])) + more
    return str(value)


def headline(finding: Finding) -> str:
    """The severity, the code, the steps and the likely cause of a finding."""
    return (
        f"{finding.severity}: {finding.code} at {places(finding)}:"
        f" {finding.likely_cause}"
    )


class Texts(NamedTuple):
    """What is printed of a finding below its first line."""

    sentence: str
    remedy: str
    code: str

    def lines(self) -> list[str]:
        """All that there is, with no empty line."""
        return [line for line in self if line]


def texts(finding: Finding, told: Mapping[str, str] = MappingProxyType({})) -> Texts:
    """What was found, and what to do; of a cause that was told only where it was."""
    line, _, entry = finding.advice.rpartition("  (")
    sentence = finding.symptom if finding.cause in told else finding.sentence
    before = finding.evidence.get("follows") or told.get(finding.cause)
    code = "" if before else line.partition("#")[0].strip()
    if code:
        return Texts(sentence, finding.remedy, f"{code}  ({entry}")
    remedy = f"First follow the advice for {before}." if before else finding.remedy
    return Texts(sentence, f"{remedy}  ({entry}", "")


def told_once(findings: Iterable[Finding]) -> list[tuple[Finding, Texts]]:
    """Each finding with its texts; a common cause is told once."""
    told: dict[str, str] = {}
    found = []
    for finding in findings:
        found.append((finding, texts(finding, told)))
        if finding.cause:
            told.setdefault(finding.cause, finding.code)
    return found


def places(finding: Finding) -> str:
    """The first of the steps of a finding, or its stretch, in words."""
    steps = tuple(dict.fromkeys(finding.steps))
    if not steps:
        return "no step of its own"
    if finding.code in _STRETCHES and steps[0] < steps[-1]:
        return f"steps {steps[0]:,} to {steps[-1]:,}"
    more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
    plural = "s" if len(steps) > 1 else ""
    return f"step{plural} {', '.join(f'{x:,}' for x in steps[:_SHOWN])}{more}"


def escaped(text: str) -> str:
    """For the text and the attributes of a page."""
    return html.escape(printable(text))
