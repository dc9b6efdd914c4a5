"""The trials of rules: tasks of their own, and the chosen design is the package's."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clipx as clipx

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

from autodesign import deciding, designs, report, tasks, training
from clipbench.tasks import MAKERS

CHOSEN = "to eight thresholds 0.1, from 0.3 in 100, or median"


def test_no_task_is_one_of_clipbench():
    assert len(tasks.MAKERS) == 12
    assert not set(tasks.MAKERS) & set(MAKERS)


def test_all_designs_are_different_rules():
    assert len(designs.families()) == 98
    assert len(designs.later_designs()) == 25
    assert not set(designs.families()) & set(designs.later_designs())


@pytest.mark.parametrize(
    ("name", "want"),
    [("median 0.1, from 0.1 in 100", 3.0), ("25th percentile 0.1, from 0.1 in 100", 3)],
)
def test_a_steady_level_is_the_lower_median_of_the_first_norms(name, want):
    norms = [100.0, 1.0, 2.0, 3.0, 4.0, 2.0, 5.0, 1.0, 6.0, 7.0, 3.0]
    rule = designs.later_designs()[name].rule
    state = rule.init(jnp.float32(0))
    context = clipx.thresholds.Context(step=0, extra={"value": jnp.float32(1)})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for norm in norms:
            limit, state = rule.update(jnp.float32(norm), state, context)
    ramp = 0.1 + 0.9 * len(norms) / 100
    np.testing.assert_allclose(limit, 0.1 * ramp * want, rtol=1e-5)


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


def cells_of(ratios):
    """Cells in which the fixed thresholds reach 1 and each design its ratio."""
    fixed = {"final": np.ones((3, 8, 6))}
    for at in zip(*ratios.values(), strict=True):
        row = {
            n: {"final": np.full((3, 1, 6), x)} for n, x in zip(ratios, at, strict=True)
        }
        yield {report.FIXED: fixed, "none": {"final": np.full((3, 1, 6), 2.0)}} | row


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([1.0] * 10, [np.nan] + [0.5] * 9, "a"),  # one diverges
        ([1.0] * 9 + [1.5], [0.9] * 8 + [1.5] * 2, "a"),  # one is below the goal
        ([1.0] * 9 + [1.5], [0.9] * 9 + [1.5], "b"),  # lower mean
        ([1.0] * 10, [0.995] * 9 + [1.04], "a"),  # equal means, more cells
        ([3.0] * 9 + [1.0], [1.5] * 9 + [2.0], "b"),  # none reaches the goal
    ],
)
def test_the_rule_of_decision(a, b, want):
    first, second, *_ = designs.later_designs()
    rows = list(cells_of({first: a, second: b}))
    assert deciding.decision(rows) == {"a": first, "b": second}[want]
