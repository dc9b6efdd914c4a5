"""Scores and seeds of `find_threshold`."""

import jax.numpy as jnp
import numpy as np
import pytest

import optax_clipx as clipx


def sweep(train, **options):
    return clipx.find_threshold(train, 1, 4, num=3, progress=False, **options)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("make", [np.array, jnp.asarray])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_score_may_be_an_array_with_one_entry(make, shape):
    found = sweep(lambda limit: make(np.full(shape, (limit - 2) ** 2, np.float32)))
    assert found.best == 2


def test_a_score_of_many_entries_is_named():
    with pytest.raises(ValueError, match=r"one number, got shape \(5,\)"):
        sweep(lambda limit: np.zeros(5))


@pytest.mark.parametrize("seeds", [[0.2, 0.7], [0.0], ["1"]])
def test_a_seed_that_is_not_whole_is_named(seeds):
    calls = []
    with pytest.raises(ValueError, match=f"whole numbers.*got {seeds[0]!r}"):
        sweep(lambda limit, seed: calls.append(seed), seeds=seeds)
    assert not calls


def test_seeds_may_be_numpys():
    seen = set()
    sweep(lambda limit, seed: seen.add(seed) or limit, seeds=np.arange(2))
    assert seen == {0, 1}


def test_scores_that_come_from_a_file_are_told(tmp_path, capsys):
    path = tmp_path / "sweep.jsonl"
    sweep(lambda threshold: threshold, path=path)
    assert capsys.readouterr().err == ""
    sweep(lambda threshold: 9 - threshold, path=path)
    assert capsys.readouterr().err == (
        f"3 of 3 scores taken from {path}; delete it to train again\n"
    )


@pytest.mark.parametrize(("slope", "flat"), [(0.001, True), (0.01, False)])
def test_scores_that_hardly_differ_are_told(slope, flat):
    """Of thresholds from 1 to 4, the scores differ by 0.3% or 2.9%."""
    said = "differ by less than 1%. You can use any of these thresholds."
    assert (said in sweep(lambda threshold: 1 + slope * threshold).warning) == flat


def test_what_print_shows_of_a_sweep():
    def train(limit, learning_rate, seed):
        return np.nan if limit * learning_rate > 5 else limit + learning_rate + seed

    options = {"learning_rates": [0.5, 2.0], "seeds": [0, 1], "progress": False}
    sweep = clipx.find_threshold(train, 1.0, 16.0, num=3, **options)
    assert str(sweep).splitlines()[:4] == [
        "best threshold: 1 with the learning rate 0.5",
        "  threshold 1: score 2",
        "  threshold 4: score 5",
        "  threshold 16: training failed",
    ]
    assert str(sweep).splitlines()[4].startswith("warning: The best threshold, 1, is")
