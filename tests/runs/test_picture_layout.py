"""Nothing lies over anything else in pictures, and words and colours mean one thing."""

import itertools
import json
import re

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import plotting
from optax_clipx.runs import drawing

COUNT = 300


def run_with_everything():
    """A run with clipped, skipped and non-finite steps and a threshold that moves."""
    norms = np.random.default_rng(0).lognormal(size=COUNT)
    skipped = norms > 4
    norms[7] = np.nan
    limits = np.linspace(2, 1, COUNT)
    return {
        "clip/norm": norms,
        "clip/threshold": limits,
        "clip/clipped": ((norms > limits) & ~skipped).astype(float),
        "skip/skipped": skipped.astype(float),
        "track_norms/encoder/layers/0/attention/query/kernel": norms,
        "track/update_norm": norms / 100,
        "track/dominant_share": np.linspace(0.2, 0.9, COUNT),
        "track/starved": np.linspace(1, 0, COUNT),
        "track/spike_score": np.full(COUNT, 0.01),
    }


def infinite():
    norms = np.random.default_rng(0).lognormal(size=COUNT)
    return {"clip/norm": norms, "clip/threshold": np.full(COUNT, np.inf)}


def swept(**options):
    def train(limit, learning_rate):
        return np.nan if limit * learning_rate > 5 else limit + learning_rate

    rates = [0.01, 0.03, 0.1, 0.3, 1.0]
    return clipx.find_threshold(
        train, 0.1, 100, num=6, learning_rates=rates, progress=False, **options
    )


def seven_runs():
    return {f"a run with a long name {i}": {"loss": [2.0, i + 1.0]} for i in range(7)}


PICTURES = {
    "norms": lambda: plotting.norms(run_with_everything()),
    "norms, infinite threshold": lambda: plotting.norms(infinite()),
    "clip_rate": lambda: plotting.clip_rate(run_with_everything()),
    "histogram": lambda: plotting.histogram(run_with_everything()),
    "heatmap": lambda: plotting.heatmap(
        {"track_norms/" + "long/" * n: [1.0, 2.0, 0.0, np.nan] for n in (1, 9)}
    ),
    "compare": lambda: plotting.compare(seven_runs()),
    "sweep": lambda: plotting.sweep(swept()),
    "overview": lambda: plotting.overview(run_with_everything()),
}


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("name", PICTURES)
def test_no_legend_lies_over_a_title_or_the_lines(name):
    figure = PICTURES[name]()
    figure.draw_without_rendering()
    for ax in figure.axes:
        legend = ax.get_legend()
        if legend is not None:
            box = legend.get_window_extent()
            assert not box.overlaps(ax._left_title.get_window_extent())
            assert box.y0 >= ax.bbox.y1 - 1
            assert box.x1 <= figure.bbox.x1 + 1


def labels_of(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize(
    ("low", "factor"),
    [
        (1e-6, 1.6),
        pytest.param(2.9, 1.6, marks=pytest.mark.slow),
        (300.0, 1.6),
        pytest.param(0.2, 9, marks=pytest.mark.slow),
        (0.2, 35),
        pytest.param(0.03, 500, marks=pytest.mark.slow),
        (1, 1e5),
    ],
)
def test_numbers_below_a_histogram_are_apart(low, factor):
    run = {"clip/norm": low * np.geomspace(1, factor, COUNT)}
    figure = plotting.overview(run)
    figure.draw_without_rendering()
    axes = next(ax for ax in figure.axes if ax.get_xlabel() == "norm")
    left, right = axes.get_xlim()
    ticks = axes.xaxis.get_major_ticks() + axes.xaxis.get_minor_ticks()
    shown = [t for t in ticks if left <= t.get_loc() <= right and t.label1.get_text()]
    assert len(shown) >= 2
    boxes = sorted((t.label1.get_window_extent() for t in shown), key=lambda x: x.x0)
    pairs = itertools.pairwise(boxes)
    assert all(one.x1 < other.x0 for one, other in pairs)


@pytest.mark.parametrize("limit", [1e-3, 0.05, 30.0, 1000.0])
def test_a_threshold_far_from_the_norms_leaves_numbers_beside_them(limit):
    run = {"clip/norm": np.geomspace(1, 2, COUNT), "clip/threshold": [limit] * COUNT}
    figure = plotting.norms(run)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    shown = [y for y in axes.get_yticks() if low <= y <= high]
    assert min(shown) < 10 * low
    assert max(shown) > high / 10


def test_an_infinite_threshold_is_said():
    assert "threshold: infinite" in labels_of(plotting.norms(infinite()))
    title = plotting.histogram(infinite()).axes[0].get_title(loc="left")
    assert title == "Norms; the threshold is infinite"


def test_the_clipped_and_skipped_steps_are_apart():
    lines = plotting.norms(run_with_everything()).axes[0].get_lines()
    style = {x.get_label().split(":")[0]: x for x in lines}
    assert style["clipped"].get_marker() == "."
    assert style["skipped"].get_marker() == "v"
    assert style["clipped"].get_color() != style["skipped"].get_color()


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 steps"), (1, "1 step"), (12345, "12,345 steps")]
)
def test_one_step_is_no_plural(number, words):
    from optax_clipx.runs.naming import counted

    assert counted(number, "step") == words


def test_a_value_between_missing_ones_is_drawn():
    lines = (
        plotting.norms({"norm": [np.nan, 3.0, np.nan, 1.0, 1.0]}).axes[0].get_lines()
    )
    dots = [x for x in lines if x.get_marker() == "." and len(x.get_xdata())]
    assert [list(x.get_ydata()) for x in dots] == [[3.0]]


@pytest.mark.parametrize("draw", [plotting.sweep, plotting.sweep_map])
@pytest.mark.parametrize("higher", [False, True])
def test_sweeps_say_which_scores_are_better(draw, higher):
    title = draw(swept(higher_is_better=higher)).axes[0].get_title(loc="left")
    assert ("higher is better" if higher else "lower is better") in title


def test_failed_runs_are_one_entry_of_the_legend():
    assert labels_of(plotting.sweep(swept())).count("failed") == 1


@pytest.mark.parametrize(
    ("draw", "label"),
    [
        (lambda: plotting.heatmap(run_with_everything()), "norm"),
        (lambda: plotting.sweep_map(swept()), "score"),
    ],
)
def test_colour_bars_have_a_label(draw, label):
    assert draw().axes[1].get_ylabel() == label


def traces_of_page(runs):
    pytest.importorskip("plotly")
    from optax_clipx.runs.page import page

    text = page(runs)
    start = text.index(
        "[", text.rindex("Plotly.newPlot(", 0, text.index("Clipped and skipped"))
    )
    return text, json.JSONDecoder().raw_decode(text[start:])[0]


@pytest.fixture
def two_runs():
    steps = {"step": np.arange(COUNT)}
    return {
        "a": (steps | run_with_everything(), "clip/norm"),
        "b": (steps | infinite(), "clip/norm"),
    }


@pytest.mark.parametrize("theme", [0, 1])
def test_a_run_has_one_colour_in_pictures_and_on_the_page(two_runs, theme):
    name = ("light", "dark")[theme]
    picture = plotting.compare(
        {label: columns for label, (columns, _) in two_runs.items()},
        column="clip/norm",
        theme=name,
    )
    drawn = {x.get_label(): x.get_color() for x in picture.axes[0].get_lines()}
    _, traces = traces_of_page(two_runs)
    shown = {x["name"]: x["meta"][theme][0] for x in traces}
    assert {label: shown[label] for label in "ab"} == {x: drawn[x] for x in "ab"}
    palette = drawing.THEMES[name]
    assert shown["clipped: a"] == palette.clipped not in palette.lines
    assert shown["skipped: a"] == palette.skipped not in palette.lines


def test_the_page_says_what_the_threshold_is(two_runs):
    text, _ = traces_of_page(two_runs)
    cells = re.findall(r"<tr><td>(.)</td>(.*?)</tr>", text)
    thresholds = {label: re.findall(r"<td>(.*?)</td>", row)[4] for label, row in cells}
    assert thresholds == {"a": "1.5", "b": "infinite"}


def test_the_page_marks_non_finite_norms(two_runs):
    _, traces = traces_of_page(two_runs)
    (lost,) = (x for x in traces if x["name"] == "non-finite: a")
    assert lost["marker"]["symbol"] == "x"
    assert "non-finite: b" not in {x["name"] for x in traces}
