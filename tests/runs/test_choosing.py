"""`suggest_threshold` and `find_threshold`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import optax_clipx as clipx


def lognormal(count=2000, seed=0, sigma=0.5):
    return np.random.default_rng(seed).lognormal(sigma=sigma, size=count)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_quantile_of_a_steady_run(rate):
    norms = lognormal(10_000)
    found = clipx.suggest_threshold(norms, rate)
    assert found.clip_rate == pytest.approx(rate, abs=2e-3)
    assert np.mean(norms > found.value) == pytest.approx(rate, abs=2e-3)
    assert found.value == pytest.approx(np.quantile(norms, 1 - rate), rel=1e-2)
    assert (found.warmup, found.nonfinite, found.warning, found.rule) == (
        0,
        0,
        "",
        None,
    )
    assert len(found.rates) == 10
    assert np.mean(found.rates) == pytest.approx(found.clip_rate, abs=1e-9)
    assert f"{found.value:.4g}" in str(found)


def test_spikes_do_not_move_it():
    norms = lognormal()
    plain = clipx.suggest_threshold(norms).value
    few = norms.copy()
    few[::50] *= 1e6
    assert clipx.suggest_threshold(few).value == pytest.approx(plain, rel=0.1)
    many = norms.copy()
    many[::4] *= 1e6
    found = clipx.suggest_threshold(many)
    assert found.value == pytest.approx(plain, rel=0.1)
    assert found.spikes == pytest.approx(0.25, abs=0.01)
    assert found.clip_rate == pytest.approx(0.25 + 0.75 * 0.1, abs=0.01)
    assert "25% of the steps are spikes" in found.warning


@pytest.mark.parametrize("factor", [30.0, 1 / 30])
def test_warmup_is_left_out(factor):
    norms = lognormal()
    plain = clipx.suggest_threshold(norms).value
    norms[:150] *= np.geomspace(factor, 1.0, 150)
    found = clipx.suggest_threshold(norms)
    assert 50 <= found.warmup <= 200
    assert found.value == pytest.approx(plain, rel=0.1)
    assert found.rule is None
    assert "warm-up" in str(found)


@pytest.mark.parametrize("total", [0.1, 10.0])
def test_drift_is_told_and_a_rule_proposed(total):
    norms = lognormal() * np.geomspace(1, total, 2000)
    found = clipx.suggest_threshold(norms)
    late = 3 * np.median(np.array_split(norms[found.warmup :], 3)[-1])
    most = f"max_norm={found.value if total < 1 else float(f'{late:.2g}'):.4g}"
    assert found.rule == f'optax_clipx.quantile_clip(0.9, estimator="tracker", {most})'
    assert "The norms change during the run" in found.warning
    assert (found.drift > 1) == (total > 1)
    # Of norms that fell, the last third counts; of norms that rose, all do.
    counted = norms[found.warmup :]
    if total < 1:
        counted = np.array_split(counted, 3)[-1]
    assert np.mean(counted > found.value) == pytest.approx(0.1, abs=0.003)
    assert eval(found.rule, {"optax_clipx": clipx}).init({"w": np.ones(1)}) is not None
    assert clipx.suggest_threshold(lognormal()).rule is None


@pytest.mark.slow
def test_false_alarms_are_rare():
    """Steady runs, short and long, narrow and heavy-tailed."""
    alarms = [
        clipx.suggest_threshold(lognormal(count, seed, sigma)).rule is not None
        for count, seeds in ((100, 30), (1000, 30), (10_000, 10))
        for sigma in (0.05, 0.5, 1.5)
        for seed in range(seeds)
    ]
    assert np.mean(alarms) < 0.02


def test_nan_and_infinity_are_above_any_limit():
    norms = lognormal()
    norms[5::100] = np.nan
    norms[7::100] = np.inf
    norms[9::100] = 0
    found = clipx.suggest_threshold(norms)
    assert found.nonfinite == 40
    assert found.clip_rate == pytest.approx(0.1, abs=5e-3)
    assert np.isfinite(found.value)
    assert not found.exploded


def test_a_run_clipped_at_every_step_says_nothing_of_higher_limits(tmp_path):
    norms = lognormal() + 5
    found = clipx.suggest_threshold(norms, limit=2.0)
    assert (found.value, found.recorded, found.clip_rate) == (2.0, 2.0, 1.0)
    assert "no information about higher thresholds" in found.warning
    lower = clipx.suggest_threshold(norms, limit=np.full(len(norms), 5.9))
    assert lower.value == pytest.approx(np.quantile(norms, 0.9), rel=1e-2)
    assert lower.recorded is None
    history = clipx.History()
    columns = {"clip/norm": norms, "clip/threshold": np.full(len(norms), 2.0)}
    history.append(range(len(norms)), columns)
    assert clipx.suggest_threshold(history) == found
    assert clipx.suggest_threshold(history.save(tmp_path / "run.jsonl")) == found
    assert clipx.suggest_threshold(history, limit=np.inf).value > 5


@pytest.mark.parametrize(
    ("limit", "words"),
    [([1.0, 2.0], r"shape \(2,\)"), (-1.0, "limit >= 0, got -1")],
)
def test_bad_limits(limit, words):
    with pytest.raises(ValueError, match=words):
        clipx.suggest_threshold(np.ones(3), limit=limit)


def test_few_norms_are_said_to_be_few():
    assert "only 3 norms" in clipx.suggest_threshold([1.0, 2.0, 3.0]).warning
    assert clipx.suggest_threshold([2.0]).value == 2.0
    constant = clipx.suggest_threshold(np.ones(1000))
    assert (constant.value, constant.clip_rate) == (1.0, 0.0)


def test_histories_and_files_will_do(tmp_path):
    history = clipx.History()
    norms = lognormal()
    history.append(range(len(norms)), {"clip/norm": norms, "loss": norms})
    want = clipx.suggest_threshold(norms)
    assert clipx.suggest_threshold(history) == want
    path = history.save(tmp_path / "run.jsonl")
    assert clipx.suggest_threshold(path) == clipx.suggest_threshold(str(path)) == want


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("norms", "rate", "words"),
    [
        ([1.0], 0, "clip_rate=0"),
        ([1.0], 1.5, "clip_rate=1.5"),
        ([], 0.1, "none among 0"),
        ([np.nan, 0.0], 0.1, "none among 2"),
        ([1.0, -2.0], 0.1, "got -2 at index 1"),
        (np.ones((2, 2)), 0.1, r"shape \(2, 2\)"),
    ],
)
def test_bad_norms(norms, rate, words):
    with pytest.raises(ValueError, match=words):
        clipx.suggest_threshold(norms, rate)


def test_several_columns_may_be_the_norm():
    history = clipx.History()
    history.append(0, {"a/norm": 1.0, "b/norm": 2.0})
    with pytest.raises(ValueError, match="a/norm, b/norm"):
        clipx.suggest_threshold(history)
    history = clipx.History()
    history.append(0, {"loss": 1.0})
    with pytest.raises(ValueError, match="no column 'norm'"):
        clipx.suggest_threshold(history)


def valley(limit, seed=0, learning_rate=0.1):
    if limit > 5:
        return float("nan")
    return (np.log(limit / 0.5)) ** 2 + 0.01 * seed + abs(learning_rate - 0.1)


def test_a_sweep_finds_the_valley():
    found = clipx.find_threshold(valley, 0.05, 50, num=7, seeds=[0, 1, 2])
    assert found.best == pytest.approx(0.5)
    assert found.scores.shape == (7, 1, 3)
    assert np.isnan(found.scores[-1]).all()
    assert found.warning == ""
    both = clipx.find_threshold(
        valley, 0.05, 50, num=7, learning_rates=[0.01, 0.1], progress=False
    )
    assert (both.best, both.best_learning_rate) == (pytest.approx(0.5), 0.1)
    accuracy = clipx.find_threshold(
        lambda limit: -valley(limit), 0.05, 4, higher_is_better=True, progress=False
    )
    assert accuracy.best == pytest.approx(0.5, rel=0.5)


def test_a_limit_at_the_edge_is_told():
    found = clipx.find_threshold(valley, 1.0, 4.0, progress=False)
    assert found.best == 1.0
    assert "smallest" in found.warning
    assert "low=" in found.warning


def test_a_best_limit_by_chance_is_told():
    noise = iter(np.random.default_rng(0).normal(size=20))
    found = clipx.find_threshold(
        lambda limit, seed: next(noise), 1, 10, num=4, seeds=range(5), progress=False
    )
    assert "scores of different seeds differ by" in found.warning


def test_a_seed_that_fails_is_worse_than_any_that_does_not():
    def train(limit, seed):
        return float("nan") if limit > 1 and seed < 2 else 1 / limit

    found = clipx.find_threshold(train, 0.1, 10, num=3, seeds=range(3), progress=False)
    assert found.best == 1.0


def test_a_sweep_goes_on_where_it_was(tmp_path):
    path, calls = tmp_path / "sweep.jsonl", []

    def train(limit, seed):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append((limit, seed))
        return valley(limit, seed)

    options = {"num": 7, "seeds": [0, 1], "progress": False, "path": path}
    with pytest.raises(KeyboardInterrupt):
        clipx.find_threshold(train, 0.05, 50, **options)
    assert len(path.read_text().splitlines()) == 5
    path.write_text(path.read_text() + '{"limit": 0.0')  # killed in the middle
    first = list(calls)
    calls = []

    def again(limit, seed):
        calls.append((limit, seed))
        return valley(limit, seed)

    found = clipx.find_threshold(again, 0.05, 50, **options)
    assert not set(first) & set(calls)
    assert len(calls) == 14 - 5
    whole = clipx.find_threshold(valley, 0.05, 50, **{**options, "path": None})
    np.testing.assert_array_equal(found.scores, whole.scores)
    calls = []
    clipx.find_threshold(again, 0.05, 50, **options)
    assert not calls
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_bad_sweeps(tmp_path):
    with pytest.raises(ValueError, match="low=2"):
        clipx.find_threshold(valley, 2, 1)
    with pytest.raises(ValueError, match="num=1"):
        clipx.find_threshold(valley, 1, 2, num=1)
    with pytest.raises(ValueError, match="seeds"):
        clipx.find_threshold(valley, 1, 2, seeds=[])
    with pytest.raises(ValueError, match=r"every threshold from 10 to 20"):
        clipx.find_threshold(valley, 10, 20, progress=False)
    other = tmp_path / "other.jsonl"
    other.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"other.jsonl:1: .*another path"):
        clipx.find_threshold(valley, 1, 2, path=other, progress=False)


def test_a_sweep_saves_its_picture(tmp_path):
    pytest.importorskip("matplotlib")
    clipx.find_threshold(
        valley, 0.05, 50, progress=False, picture=tmp_path / "sweep.png"
    )
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["regression, mlp", pytest.param("rows, rnn", marks=pytest.mark.whole)]
)
def test_the_suggested_limit_trains_as_well_as_the_best_of_ten(task, tmp_path):
    """On the main example, recorded as it trains; its longer tasks are in the docs."""
    script = Path(__file__).parents[2] / "benchmarks" / "choosing.py"
    options = ["--only", task, "--seeds", "3", "--output", str(tmp_path)]
    subprocess.run([sys.executable, str(script), *options], check=True)
    rows = json.loads((tmp_path / "choosing.json").read_text())["rows"]
    found = {
        row["how"]: row["of best"]
        for row in rows
        if row["recorded"].startswith("threshold")
    }
    for rate in (0.1, 0.5, 0.9):
        assert found[f"clip_rate={rate:g}"] > 0.97


def test_in_a_file_the_progress_bar_is_one_line(capsys):
    clipx.find_threshold(lambda limit: limit, 1, 9, num=9)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("thresholds: 100%")
