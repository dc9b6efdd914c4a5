"""The trials of rules: tasks of their own, and the chosen design is the package's."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clipx as clipx

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

from autodesign import designs, report, tasks, training
from clipbench.tasks import MAKERS

CHOSEN = "to eight thresholds 0.1, from 0.3 in 100, or median"


def test_no_task_is_one_of_clipbench():
    assert len(tasks.MAKERS) == 12
    assert not set(tasks.MAKERS) & set(MAKERS)


def test_all_designs_are_different_rules():
    assert len(designs.families()) == 98


def test_the_chosen_design_is_the_rule_of_the_package():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=300) - np.linspace(0, 4, 300)).astype(np.float32)
    clipper = clipx.auto_clip()
    design = designs.all_designs()[CHOSEN]
    context = clipx.thresholds.Context(step=0, extra={"value": jnp.float32(1)})

    def step(carry, norm):
        state, memory = carry
        _, state = clipper.update(norm[None], state)
        limit, memory = design.rule.update(norm, memory, context)
        found = clipx.metrics(state)["clip/clipped_norm"]
        return (state, memory), (found, norm * design.response(norm, limit))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        start = clipper.init(jnp.zeros(1)), design.rule.init(jnp.float32(0))
        _, (found, want) = jax.lax.scan(step, start, jnp.asarray(norms))
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.MAKERS)
def test_a_task_can_be_learned(name):
    what = tasks.MAKERS[name]()
    assert what.steps % training.CHECKS == 0
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rates = np.full((4, 1), 0.003)
        one = {"clipped": training.Design(training.constant(1.0))}
        found = training.trained(what, one, rates, 1)
    assert found.shape == (4, 1, 1, 1)
    assert np.isfinite(found).any()


def record(optimizer, design, *losses):
    """Of one task, at three rates with two seeds each."""
    final = [[loss, loss] for loss in losses]
    return {"task": "t", "optimizer": optimizer, "design": design, "final": final}


def test_ratios_are_to_the_best_fixed_threshold():
    fixed = [record("sgd", f"fixed {c:g}", 4, 2, 3) for c in report.RELATIVE_LIMITS]
    fixed[3] = record("sgd", "fixed 0.3", 1, 2, 3)
    (row,) = report.by_cell([*fixed, record("sgd", "a", None, 1.5, 2)]).values()
    assert report.fixed_ratio(row, 0) == 2
    assert report.fixed_ratio(row, 3) == 1
    np.testing.assert_allclose(report.ratio(row, "a"), 1.5)
