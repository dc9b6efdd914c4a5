"""Clipped and skipped steps are two things, wherever a run is shown."""

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line, plotting
from optax_clipx.runs.drawing import norms_of


def run():
    """Of ten steps six are clipped to 2 and one is skipped.

    In the skipped step the clipper's figures are those of the step before.
    """
    norms = np.array([3.0, 1, 4, 4, 1, 5, 9, 2, 6, 5])
    skipped = np.arange(10) == 3
    measured = np.where(skipped, 1000.0, norms)
    return {
        "step": np.arange(10),
        "clip/norm": norms,
        "clip/threshold": np.full(10, 2.0),
        "clip/clipped": (norms > 2).astype(float),
        "skip/norm": measured,
        "skip/threshold": np.full(10, 100.0),
        "skip/skipped": skipped.astype(float),
        "skip/reason": 2.0 * skipped,
    }


def recorded():
    columns = run()
    history = clipx.History()
    history.append(columns.pop("step"), columns)
    return history


def test_the_norm_of_a_skipped_step_is_what_the_skipper_measured():
    seen = norms_of(run(), None, None)
    assert seen.norms.tolist() == [3, 1, 4, 1000, 1, 5, 9, 2, 6, 5]
    assert seen.clipped.tolist() == [True, False, True, False, False, *[True] * 2,
                                     False, *[True] * 2]  # fmt: skip
    assert (seen.rate, seen.skip_rate) == (0.6, 0.1)


def test_norms_mark_both():
    lines = {x.get_label(): x for x in plotting.norms(run()).axes[0].get_lines()}
    clipped = lines["clipped: 60.0% of steps"].get_ydata()
    skipped = lines["skipped: 10.0% of steps"].get_ydata()
    assert clipped[np.isfinite(clipped)].tolist() == [3, 4, 5, 9, 6, 5]
    assert skipped[np.isfinite(skipped)].tolist() == [1000]
    dots, triangles = (lines[x].get_marker() for x in lines if "ped:" in x)
    assert (dots, triangles) == (".", "v")


def test_the_legend_does_not_cover_the_title():
    figure = plotting.norms(run())
    figure.draw_without_rendering()
    axes = figure.axes[0]
    title, legend = axes._left_title, axes.get_legend()
    assert not title.get_window_extent().overlaps(legend.get_window_extent())


def test_the_rate_tells_both():
    axes = plotting.clip_rate(run()).axes[0]
    assert axes.get_title(loc="left") == "Clipped: 60.0%; skipped: 10.0%"
    assert axes.get_ylabel() == "clipped and skipped steps"


def test_the_histogram_has_bars_for_both():
    axes = plotting.histogram(run()).axes[0]
    heights = {
        bar.get_label(): np.sum(bar.get_data().values - bar.get_data().baseline)
        for bar in axes.patches
        if hasattr(bar, "get_data")
    }
    assert heights == pytest.approx({"unchanged": 0.3, "clipped": 0.6, "skipped": 0.1})


def test_a_skipper_alone_is_drawn_as_skipping():
    columns = {n: x for n, x in run().items() if not n.startswith("clip/")}
    seen = norms_of(columns, None, None)
    assert seen.clipped is None
    assert seen.skip_rate == 0.1
    assert len(plotting.overview(columns).axes) == 3
    title = plotting.clip_rate(columns).axes[0].get_title(loc="left")
    assert title == "Skipped: 10.0% of all steps"


def test_the_page_has_a_column_for_each():
    pytest.importorskip("plotly")
    from optax_clipx.runs.page import page

    text = page({"a": (run(), "clip/norm")})
    assert "<th>clipped steps</th><th>skipped steps</th>" in text
    assert "<td>60.0%</td><td>10.0%</td>" in text
    assert '"name":"skipped: a"' in text
    assert '"name":"clipped: a"' in text


def test_watch_has_a_line_for_each(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    recorded().save("run.jsonl")
    assert command_line.main(["watch", "run.jsonl", "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (clipped,) = [line for line in lines if " clipped " in line]
    (skipped,) = [line for line in lines if " skipped " in line]
    assert "60.0% of all steps" in clipped
    assert "10.0% of all steps" in skipped


def test_suggest_takes_the_norms_of_all_steps():
    want = clipx.suggest_threshold([3.0, 1, 4, 1000, 1, 5, 9, 2, 6, 5], limit=2.0)
    assert clipx.suggest_threshold(recorded()) == want
