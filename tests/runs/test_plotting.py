"""Pictures: what they draw, in light and dark, and the command line around them."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line, plotting
from optax_clipx.runs import drawing

LAYERS = [f"layers/{i}/{name}" for i in range(3) for name in ("kernel", "bias")]


def run_of(count=300, limit=1.0, seed=0, layers=True):
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(sigma=0.5, size=count)
    columns = {
        "loss": np.geomspace(2, 0.1, count) * rng.lognormal(sigma=0.1, size=count),
        "clip/norm": norms,
        "clip/threshold": np.full(count, limit),
        "clip/clipped": (norms > limit).astype(float),
    }
    if layers:
        columns |= {f"track_norms/{n}": rng.lognormal(size=count) for n in LAYERS}
    return columns


def history_of(**options):
    columns = run_of(**options)
    history = clipx.History()
    history.append(range(len(columns["loss"])), columns)
    return history


def sweep(rates=None):
    def train(limit, seed, learning_rate=0.1):
        if limit * learning_rate > 0.5:
            return float("nan")
        return np.log(limit) ** 2 + seed + abs(np.log10(learning_rate)) + 0.1

    return clipx.find_threshold(
        train, 0.1, 10, num=5, seeds=[0, 1], learning_rates=rates, progress=False
    )


DRAWN = {
    "norms": lambda theme: plotting.norms(run_of(), theme=theme),
    "clip_rate": lambda theme: plotting.clip_rate(run_of(), theme=theme),
    "histogram": lambda theme: plotting.histogram(run_of(), theme=theme),
    "heatmap": lambda theme: plotting.heatmap(run_of(), theme=theme),
    "compare": lambda theme: plotting.compare(
        {"a": [run_of(), run_of(seed=1)], "b": run_of(seed=2)}, theme=theme
    ),
    "sweep": lambda theme: plotting.sweep(sweep(), theme=theme),
    "sweep_map": lambda theme: plotting.sweep_map(sweep([0.01, 0.1]), theme=theme),
    "overview": lambda theme: plotting.overview(run_of(), theme=theme),
    "History.plot": lambda theme: history_of().plot(theme=theme),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", DRAWN)
def test_every_picture_is_drawn_readably(name, theme, tmp_path):
    """Text stands out from the page, and is as large as a README needs it."""
    from matplotlib.colors import to_rgb
    from matplotlib.text import Text

    figure = DRAWN[name](theme)
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 8_000
    page = np.array(to_rgb(figure.get_facecolor()))
    assert (page.mean() > 0.5) == (theme == "light")
    for axes in figure.axes:
        texts = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
        for text in texts:
            if isinstance(text, Text) and text.get_text():
                colour = np.array(to_rgb(text.get_color()))
                assert abs(colour.mean() - page.mean()) > 0.5, text
                pixels = text.get_fontsize() / 72 * 830 / figure.get_figwidth()
                assert pixels > 11, text


def test_colours_differ_for_everyone():
    """Simulated red- and green-blindness (Viénot et al., 1999) leaves them apart."""
    from matplotlib.colors import to_rgb

    protan = [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]
    deutan = [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]
    for theme in drawing.THEMES.values():
        for pair in [(theme.norm, theme.clipped), theme.lines[:2]]:
            for seen in (np.eye(3), np.array(protan), np.array(deutan)):
                a, b = (seen @ np.array(to_rgb(c)) ** 2.2 for c in pair)
                assert np.abs(a - b).max() > 0.15


def lines_of(figure, axes=0):
    return {line.get_label(): line for line in figure.axes[axes].get_lines()}


def tracked_run():
    """What `track_norms(..., updates=True)` adds, in some of the steps."""
    shares = {
        "track/dominant_share": 0.9,
        "track/starved": 0.5,
        "track/spike_score": 0.01,
    }
    columns = {name: np.full(300, x) for name, x in shares.items()}
    columns["track/starved"][7] = np.nan
    return run_of() | columns | {"track/update_norm": np.geomspace(1, 1e-3, 300)}


@functools.cache
def tracked_overview():
    return plotting.overview(tracked_run())


def titled(figure, title):
    """The axes with a title."""
    found = (ax for ax in figure.axes if ax.get_title(loc="left") == title)
    return next(found, None)


@pytest.mark.parametrize("names", [("loss",), ("learning_rate",), ("train/loss", "lr")])
def test_the_overview_shows_the_loss_and_the_learning_rate(names):
    columns = {"norm": np.ones(50), **{x: np.geomspace(1, 0.1, 50) for x in names}}
    figure = plotting.overview(columns)
    drawn = [x for x in ("Loss", "Learning rate") if titled(figure, x) is not None]
    expected = {"loss": "Loss", "train/loss": "Loss"}
    assert drawn == [expected.get(name, "Learning rate") for name in names]


@pytest.mark.slow
def test_titles_that_are_beside_each_other_are_on_one_height():
    figure = tracked_overview()
    figure.draw_without_rendering()
    for left, right in (("Update norm", "Shares"), ("Loss", "Learning rate")):
        axes = [titled(figure, x) for x in (left, right)]
        if None not in axes:
            tops = [ax._left_title.get_window_extent().y0 for ax in axes]
            assert tops[0] == pytest.approx(tops[1], abs=1)


def test_the_histogram_says_what_is_in_its_last_bar():
    norms = np.append(np.random.default_rng(0).lognormal(size=400), 1.35e19)
    (ax,) = plotting.histogram({"norm": norms}).axes
    assert ax.get_xlabel() == "norm (last bar: up to 1.35e+19)"
    (ax,) = plotting.histogram({"norm": norms[:-1]}).axes
    assert ax.get_xlabel() == "norm"


def test_the_overview_shows_the_update_and_the_shares():
    figure = tracked_overview()
    update, shares = (titled(figure, x) for x in ("Update norm", "Shares"))
    assert update.get_yscale() == "log"
    np.testing.assert_allclose(update.get_lines()[0].get_ydata()[-1], 1e-3, rtol=0.1)
    drawn = {x.get_label(): x.get_ydata()[0] for x in shares.get_lines()}
    assert drawn == {
        "largest leaf's share": 0.9,
        "starved leaves": 0.5,
        "spike score": 0.01,
    }


def test_any_column_with_the_norm_of_the_update_is_drawn_alike():
    run = tracked_run()
    run["update_norm"] = run.pop("track/update_norm")
    one, other = (
        titled(x, "Update norm") for x in (plotting.overview(run), tracked_overview())
    )
    np.testing.assert_array_equal(*(x.get_lines()[0].get_ydata() for x in (one, other)))
    pytest.importorskip("plotly")
    from optax_clipx.runs import page

    drawn = page.page({"run": (drawing.columns_of(run), "clip/norm")})
    assert "<h2>Norm of the whole update</h2>" in drawn


def test_runs_with_the_same_curve_do_not_hide_each_other():
    same, other = {"loss": np.geomspace(3, 1, 50)}, {"loss": np.geomspace(3, 2, 50)}
    (ax,) = plotting.compare({"a": same, "b": other, "c": same}).axes
    lines = {line.get_label(): line.get_linestyle() for line in ax.get_lines()}
    assert lines == {"a": "-", "b": "-", "c (same curve as a)": "--"}


def test_the_overview_shows_the_shares_alone():
    columns = run_of() | {"track/dominant_share": np.full(300, 0.9)}
    figure = plotting.overview(columns)
    assert titled(figure, "Shares") is not None
    assert titled(figure, "Update norm") is None
    assert len(figure.axes) == len(plotting.overview(run_of()).axes) + 1


def test_the_page_shows_the_update_and_the_shares():
    pytest.importorskip("plotly")
    from optax_clipx.runs import page

    def titles(run):
        columns = drawing.columns_of(run)
        return re.findall("<h2>(.*?)</h2>", page.page({"run": (columns, "clip/norm")}))

    without = titles(run_of())
    added = [title for title in titles(tracked_run()) if title not in without]
    assert added == list(page._TRACKED.values())


def test_the_map_of_rms_t_says_what_it_is():
    run = {f"track_rms_t/{name}": np.ones(9) for name in LAYERS}
    axes = plotting.heatmap(run, prefix="track_rms_t/").axes[0]
    title = "Gradient to second moment (RMS) of each layer"
    assert axes.get_title(loc="left") == title


def dying():
    """Two layers: one without a gradient at the end, one with a NaN."""
    steps = np.arange(100)
    return {
        "track_norms/a": np.where(steps < 60, 1.0 + steps, 0.0),
        "track_norms/b": np.where(steps == 5, np.nan, 2.0 + steps),
    }


@pytest.mark.parametrize(
    ("left_out", "prefix", "expected"),
    [
        ([], "track_norms/", ["no gradient", "not finite or not recorded"]),
        (["b"], "track_norms/", ["no gradient"]),
        (["a"], "track_norms/", ["not finite or not recorded"]),
        (["b"], "track_ratios/", ["no update"]),
    ],
)
def test_cells_without_a_colour_are_explained(left_out, prefix, expected):
    run = {name: x for name, x in dying().items() if name[-1] not in left_out}
    run = {name.replace("track_norms/", prefix): x for name, x in run.items()}
    ax = plotting.heatmap(run, prefix=prefix).axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == expected


def test_cells_that_all_have_a_colour_need_no_legend():
    run = {"track_norms/a": np.arange(1.0, 10.0)}
    assert plotting.heatmap(run).axes[0].get_legend() is None


def test_cells_without_a_colour_are_drawn_apart():
    figure = plotting.heatmap(dying(), theme="light")
    figure.draw_without_rendering()
    ax = figure.axes[0]
    norms, lost = (image.get_array() for image in ax.get_images())
    np.testing.assert_array_equal(norms.mask[0], np.arange(100) >= 60)
    np.testing.assert_array_equal(
        ~np.isnan(lost.filled(np.nan))[1], np.arange(100) == 5
    )
    assert np.isnan(lost.filled(np.nan)[0]).all()
    assert ax.patch.get_hatch()


def test_the_page_names_cells_without_a_colour():
    pytest.importorskip("plotly")
    from optax_clipx.runs import page

    columns = drawing.columns_of(run_of() | {n: np.resize(x, len(run_of()["clip/norm"]))
                                              for n, x in dying().items()})  # fmt: skip
    text = page.page({"run": (columns, "clip/norm")})
    assert "each layer: run (empty cells: no gradient or not finite)</h2>" in text
    text = page.page({"run": (drawing.columns_of(run_of()), "clip/norm")})
    assert "empty cells" not in text


def test_norms_show_limit_and_clipped_steps():
    run = run_of()
    lines = lines_of(plotting.norms(run))
    np.testing.assert_array_equal(lines["norm"].get_ydata(), run["clip/norm"])
    assert set(lines["threshold"].get_ydata()) == {1.0}
    clipped = run["clip/norm"] > 1
    (label,) = [name for name in lines if name.startswith("clipped")]
    assert f"{clipped.mean():.1%}" in label
    assert np.isfinite(lines[label].get_ydata()).sum() == clipped.sum()
    # another limit than the recorded one
    lines = lines_of(plotting.norms(run, limit=2))
    assert f"clipped: {(run['clip/norm'] > 2).mean():.1%} of steps" in lines
    bare = lines_of(plotting.norms({"norm": [1.0, 2.0, np.nan, np.inf]}))
    assert list(bare) == ["norm", "non-finite: 2 steps"]


def test_long_runs_keep_their_extremes():
    values = np.ones(10**5)
    values[[4_321, 77_777]] = 1e6, 1e-6
    shown = drawing.envelope(np.arange(10**5), values)
    assert len(shown.steps) <= 1000
    assert shown.high.max() == 1e6
    assert shown.low.min() == 1e-6
    assert set(shown.middle) == {1.0}
    gap = np.where(np.arange(10**5) < 50_000, np.nan, 1.0)
    assert np.isnan(drawing.envelope(np.arange(10**5), gap).middle).sum() == 500


def test_seeds_become_median_and_range():
    seeds = [{"loss": np.full(50, value)} for value in (1.0, 2.0, 10.0)]
    figure = plotting.compare({"x": seeds})
    assert set(lines_of(figure)["x (3 seeds)"].get_ydata()) == {2.0}
    (band,) = figure.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1, 10)


def test_an_exploded_run_does_not_press_the_others_flat():
    exploded = {"loss": np.append(np.geomspace(1, 1e30, 20), [np.nan] * 30)}
    figure = plotting.compare({"with": run_of(count=50), "without": exploded})
    assert figure.axes[0].get_ylim()[1] < 1e5
    crosses = [x for x in figure.axes[0].get_lines() if x.get_marker() == "x"]
    assert [list(x.get_xdata()) for x in crosses] == [[20]]


def test_a_map_marks_the_best_and_crosses_out_what_failed():
    found = sweep([0.01, 0.1])
    figure = plotting.sweep_map(found)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("✕") == 1
    (frame,) = figure.axes[0].get_lines()
    at = found.limits.index(found.best)
    assert frame.get_xdata().min() == at - 0.5


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plotting.norms({"loss": [1.0]}), "no column 'norm'"),
        (lambda: plotting.norms(clipx.History()), "no records"),
        (lambda: plotting.norms(run_of(), theme="blue"), "'light' or 'dark'"),
        (lambda: plotting.clip_rate({"norm": [1.0]}), "Pass limit="),
        (lambda: plotting.histogram({"norm": [np.nan]}), "no positive finite norm"),
        (lambda: plotting.heatmap({"norm": [1.0]}), "optax_clipx.track_norms"),
        (lambda: plotting.compare({}), "no runs"),
        (lambda: plotting.compare({"a": {"x": [1.0]}}), "no column 'loss'"),
    ],
)
def test_what_cannot_be_drawn_says_why(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()
    with pytest.raises(TypeError, match="a History, the path"):
        plotting.norms(3)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history_of().save("run.jsonl")
    history_of(seed=1).save("other.csv")
    return tmp_path


def call(*arguments):
    return command_line.main([str(x) for x in arguments])


def test_plot(run, capsys):
    assert call("plot", "run.jsonl") == 0
    assert "Wrote run.png" in capsys.readouterr().out
    before = (run / "run.png").read_bytes()
    assert call("plot", "run.jsonl", "--theme", "dark") == 2
    error = capsys.readouterr().err
    assert "run.png is there already" in error
    assert "--force" in error
    assert (run / "run.png").read_bytes() == before
    assert call("plot", "run.jsonl", "--theme", "dark", "--force") == 0
    assert (run / "run.png").read_bytes() != before
    assert call("plot", "run.jsonl", "other.csv", "-o", "x.png") == 2
    assert "folder for 2 pictures, one for each run" in capsys.readouterr().err
    (run / "out").mkdir()
    small = clipx.History()  # whose pictures have few panels
    small.append(range(30), {"norm": np.arange(30.0) + 1})
    for name in ("small.jsonl", "as_small.csv"):
        small.save(name)
    assert call("plot", "small.jsonl", "as_small.csv", "-o", "out") == 0
    assert sorted(os.listdir("out")) == ["as_small.png", "small.png"]
    assert call("plot", "run.jsonl", "-o", "run.xyz") == 2
    assert not (run / "run.xyz").exists()


def test_suggest(run, capsys):
    assert call("suggest", "run.jsonl", "other.csv", "--clip-rate", 0.2) == 0
    want = clipx.suggest_threshold(run_of()["clip/norm"], 0.2)
    assert f"global_norm({want.value:.4g})" in capsys.readouterr().out
    assert call("suggest", "run.jsonl", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"]["clip_rate"] == pytest.approx(0.1, abs=0.01)
    assert call("suggest", "run.jsonl", "--clip-rate", 7) == 2
    assert "run.jsonl: Expected 0 < clip_rate < 1" in capsys.readouterr().err


def test_compare(run, capsys):
    assert (
        call("compare", "a=run.jsonl", "a=other.csv", "b=other.csv", "-o", "c.png") == 0
    )
    out = capsys.readouterr().out
    assert re.search(r"a: loss [\d.]+ \([\d.]+ to [\d.]+ in 2 runs\)", out)
    assert (run / "c.png").exists()
    assert call("compare", "run.jsonl", "--column", "accuracy") == 2
    assert "no column 'accuracy'" in capsys.readouterr().err


def drawn_by_compare(monkeypatch, *arguments):
    """The labels of the axes of what the command draws."""
    seen = []
    draw = command_line.plotting.compare

    def compare(*given, **options):
        seen.append(draw(*given, **options))
        return seen[-1]

    monkeypatch.setattr(command_line.plotting, "compare", compare)
    assert call("compare", *arguments, "-o", "both.png", "--force") == 0
    (figure,) = seen
    return [ax.get_ylabel() for ax in figure.axes]


def saved(path, **columns):
    history = clipx.History()
    history.append(range(len(next(iter(columns.values())))), columns)
    return history.save(path)


def test_compare_draws_losses_and_norms_of_several_runs(run, monkeypatch):
    both = ["loss", "gradient norm"]
    assert drawn_by_compare(monkeypatch, "run.jsonl", "other.csv") == both
    assert drawn_by_compare(monkeypatch, "run.jsonl", "--column", "loss") == ["loss"]
    column = ["clip/norm"]
    assert drawn_by_compare(monkeypatch, "run.jsonl", "--column", *column) == column


@pytest.mark.parametrize(
    "columns", [{}, {"norm": np.full(9, np.nan)}, {"value": np.ones(9)}]
)
def test_compare_draws_losses_alone_if_a_run_has_no_norm(run, monkeypatch, columns):
    saved("no_norm.jsonl", loss=np.linspace(2, 1, 9), **columns)
    assert drawn_by_compare(monkeypatch, "run.jsonl", "no_norm.jsonl") == ["loss"]


def test_one_file_for_several_runs_names_the_command_that_draws_it(run, capsys):
    assert call("plot", "run.jsonl", "other.csv", "-o", "both.png") == 2
    said = capsys.readouterr().err
    line = "optax_clipx compare run.jsonl other.csv -o both.png"
    assert f"For one picture of all runs, type: python -m {line}" in said
    assert call(*line.split()[1:]) == 0
    assert (run / "both.png").exists()


def test_columns_to_compare_have_a_panel_each():
    runs = {name: {"train/loss": [2.0, 1.0], "norm": [3.0, 4.0]} for name in "ab"}
    figure = plotting.compare(runs, column=["loss", "norm"])
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss", "norm"]
    for ax, values in zip(figure.axes, ([2.0, 1.0], [3.0, 4.0]), strict=True):
        lines = ax.get_lines()
        assert [line.get_label() for line in lines] == ["a", "b (same curve as a)"]
        assert all(line.get_ydata().tolist() == values for line in lines)
    (ax,) = plotting.compare(runs, column=["norm"]).axes
    with pytest.raises(ValueError, match="one column to draw on ax"):
        plotting.compare(runs, column=["loss", "norm"], ax=ax)


def test_watch(run, capsys):
    pytest.importorskip("rich")
    assert call("watch", "run.jsonl", "other.csv", "--once") == 0
    shown = capsys.readouterr().out
    assert "step" in shown
    assert "299" in shown
    assert "other" in shown
    assert call("watch", "none.jsonl", "--once") == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_watch_follows_a_file_that_grows(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    from optax_clipx.runs.live import Follower, sparkline

    path = tmp_path / "run.jsonl"
    history = clipx.History(path)
    follower = Follower(path)
    assert len(follower.look()["step"]) == 0
    for step in range(5):
        history.append(step, {"norm": 1.0 + step})
    assert follower.look()["norm"].tolist() == [1, 2, 3, 4]
    half = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"step": 9, ')
    assert follower.look()["norm"].tolist() == [1, 2, 3, 4]
    with path.open("ab") as file:
        file.write(b'"norm": 7}\n')
    assert follower.look()["norm"].tolist() == [1, 2, 3, 4, 7]
    assert follower.offset > half
    with path.open("ab") as file:
        file.write(b'{"step": broken}\n')
    with pytest.raises(ValueError, match=r"run\.jsonl:6"):
        follower.look()
    path.write_bytes(b'{"step": 0, "norm": 3}\n')
    follower = Follower(path)
    assert follower.look()["norm"].tolist() == [3]
    # A resumed run has cut the file and is already further than it was.
    path.write_bytes(b'{"step": 0, "norm": 4.25}\n{"step": 1, "norm": 5}\n')
    assert follower.look()["norm"].tolist() == [4.25, 5]
    path.write_bytes(b"")
    assert len(follower.look()["step"]) == 0
    assert sparkline(np.array([1.0, 10.0, 100.0, np.nan])) == "▁▅█ "


BAD = {
    "empty.jsonl": b"",
    "prose.txt": b"hello\n",
    "broken.jsonl": b'{"step": 1}\nnonsense\n',
    "no_norm.jsonl": b'{"step": 1, "loss": 2}\n',
    "nan.jsonl": b'{"step": 1, "norm": "NaN"}\n',
    "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("command", ["plot", "suggest", "watch"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_exit_code_2(tmp_path, monkeypatch, capsys, name, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(BAD[name])
    more = ["--once"] if command == "watch" else []
    if command == "watch" and name in ("empty.jsonl", "nan.jsonl"):
        assert call(command, name, *more) == 0  # it may well begin later
        return
    assert call(command, name, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}")
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == [name]


def test_a_killed_run_is_drawn_with_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.jsonl").write_bytes(
        b'{"step": 1, "norm": 1}\n{"step": 2, "norm": 2}\n{"step": 3, "n'
    )
    assert call("plot", "run.jsonl") == 0
    assert "note: run.jsonl:3: the last line is cut off" in capsys.readouterr().err


def test_the_page_is_whole_and_asks_for_nothing(run, capsys):
    """Opened in a browser by test_browser.py; here, what it is made of."""
    pytest.importorskip("plotly")
    assert call("plot", "run.jsonl", "other.csv", "--html", "page.html") == 0
    text = (run / "page.html").read_text()
    assert text.count('class="plotly-graph-div"') == 5  # three, and layers of each
    own = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!data:)', own)
    assert not re.search(r"<script[^>]*src=", text)
    assert "suggested threshold" in text
    assert call("plot", "run.jsonl", "--html", "page.html") == 2
    assert (run / "page.html").read_text() == text
    odd = history_of(layers=False)
    odd.save("<b>&.jsonl")
    assert call("plot", "<b>&.jsonl", "--html", "odd.html") == 0
    assert (
        "<title>Gradient clipping: &lt;b&gt;&amp;</title>"
        in (run / "odd.html").read_text()
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("command", ["plot", "suggest", "compare", "watch"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        call(command, "--help")
    assert ended.value.code == 0
    assert f"python -m optax_clipx {command} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        call(command)
    assert ended.value.code == 2


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        call("--version")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"optax_clipx {clipx.__version__}\n"


@pytest.mark.slow
def test_both_names_of_the_program():
    for program in (["-m", "optax_clipx"],):
        ran = subprocess.run(
            [sys.executable, *program, "--help"], capture_output=True, check=True
        )
        assert b"suggest" in ran.stdout
    installed = shutil.which("optax-clipx", path=os.path.dirname(sys.executable))
    if installed is None:
        pytest.skip("the package is not installed with its script")
    subprocess.run([installed, "--help"], capture_output=True, check=True)


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(run):
    command = (
        f"{sys.executable} -m optax_clipx suggest run.jsonl | true; exit $PIPESTATUS"
    )
    ran = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert ran.returncode == 0
    assert not ran.stderr


@pytest.mark.parametrize("module", ["matplotlib", "plotly"])
def test_what_is_not_installed_is_named(run, module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    more = ["--html", "x.html"] if module == "plotly" else []
    assert call("plot", "run.jsonl", *more) == 2
    error = capsys.readouterr().err
    assert error == f"error: {module} is missing. Run: pip install {module}\n"


def test_tensorboard_logs_are_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboardX import SummaryWriter

    monkeypatch.chdir(tmp_path)
    run = run_of(count=40)
    with SummaryWriter("logs/a") as writer:
        for step in range(40):
            writer.add_scalar("clip/norm", run["clip/norm"][step], step)
    assert call("plot", "logs/a", "--threshold", 1.0) == 0
    assert (tmp_path / "logs" / "a.png").exists()
    assert call("suggest", "logs/a") == 0
    want = clipx.suggest_threshold(run["clip/norm"].astype(np.float32)).value
    assert f"global_norm({want:.4g})" in capsys.readouterr().out
    if importlib.util.find_spec("rich"):
        assert call("watch", "logs/a", "--once") == 0


def test_every_norm_is_in_a_bar():
    rng = np.random.default_rng(0)
    for spike in (1.0, 3.0, 30.0, 1e37):
        norms = np.append(np.exp(0.3 * rng.normal(size=200)), [spike, 1 / spike])
        figure = clipx.plotting.histogram({"clip/norm": norms}, limit=2.0)
        upper = [patch.get_data().values for patch in figure.axes[0].patches][-1]
        assert upper.sum() == pytest.approx(1)
        edges = figure.axes[0].patches[0].get_data().edges
        bulk = np.histogram(norms[:200], edges)[0]
        assert (bulk > 0).sum() > 8  # a spike does not press the others into one bar
        if spike <= 3:
            assert edges[0] <= norms.min()
            assert edges[-1] >= norms.max()


@pytest.mark.parametrize(
    ("low", "high", "axis"),
    [
        (1.0, 1e20, {"type": "log", "exponentformat": "power", "dtick": 3}),
        (0.3, 5.0, {"type": "log", "dtick": "D2"}),
        (1.1, 1.9, {"type": "linear"}),
    ],
)
def test_axes_of_a_page_have_several_numbers(low, high, axis):
    pytest.importorskip("plotly")
    from optax_clipx.runs import page

    assert page._log_ticks(np.array([low, high])) == axis
