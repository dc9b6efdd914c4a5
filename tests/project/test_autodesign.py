"""The trials of rules: tasks of their own, and the chosen design is the package's."""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

from autodesign import chance, deciding, designs, later_tasks, report, tasks, training
from clipbench import earlier
from clipbench.tasks import MAKERS

CHOSEN = "to eight thresholds 0.1, from 0.3 in 100, or median"


def test_no_task_is_one_of_clipbench():
    assert len(tasks.MAKERS) == 12
    assert not set(tasks.MAKERS) & set(MAKERS)


def test_no_further_task_is_one_of_those_before():
    assert len(later_tasks.LATER_MAKERS) == 12
    assert not set(later_tasks.LATER_MAKERS) & {*tasks.MAKERS, *MAKERS}


def test_all_designs_are_different_rules():
    assert len(designs.families()) == 98
    assert len(designs.later_designs()) == 25
    assert len(designs.last_designs()) == 31
    assert not set(designs.families()) & set(designs.later_designs())
    assert not set(designs.last_designs()) & set(designs.second_list())


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


@pytest.mark.parametrize(
    ("clipper", "name"),
    [
        (clipx.auto_clip(), CHOSEN),
        (earlier.power_auto_clip(), "unit 0.1, to the power 0.4"),
    ],
    ids=["auto_clip", "power"],
)
def test_the_chosen_designs_are_rules_of_clipbench(clipper, name):
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=300) - np.linspace(0, 4, 300)).astype(np.float32)
    list_ = designs.all_designs() | designs.last_designs()
    design = list_[name]
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
def test_the_rule_of_the_package_trains_as_the_package_does():
    what = dataclasses.replace(tasks.MAKERS["deep linear network"](), steps=20)
    list_ = designs.third_list()
    rules = {n: list_[n] for n in (designs.PACKAGE, CHOSEN)}
    rates = np.array([[0.02], [0.01], [0.01], [0.003]])
    key = jax.random.key(0)

    def schedule(rate):
        return lambda number: rate * jnp.clip((20 - number) / (20 / 3), 0.0, 1.0)

    def final_of(optimizer):
        tx = optax.chain(clipx.auto_clip(nonfinite="zero"), optimizer)

        def step(carry, number):
            params, state = carry
            batch = what.batch(jax.random.fold_in(key, number + 1), number)
            grads = jax.grad(what.loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), what.final(params)

        params = what.init(jax.random.fold_in(key, 0))
        _, finals = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(20))
        return jnp.mean(finals[-3:])

    makers = [optax.sgd, functools.partial(optax.sgd, momentum=0.9)]
    makers += [optax.adam, optax.lion]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        pairs = zip(makers, rates[:, 0], strict=True)
        want = jax.jit(lambda: [final_of(m(schedule(r))) for m, r in pairs])()
        found = training.trained(what, rules, rates, 1)[..., 0, 0]
    for column in found.T:
        np.testing.assert_allclose(column, want, rtol=2e-4)


def test_the_rule_of_the_package_starts_again_where_the_design_does_not():
    list_ = designs.third_list()
    context = clipx.thresholds.Context(step=0, extra={"value": jnp.float32(1)})
    norms = jnp.concatenate([jnp.ones(100), jnp.full(70, 100.0)])

    def last(rule):
        def step(state, norm):
            limit, state = rule.update(norm, state, context)
            return state, limit

        return jax.lax.scan(step, rule.init(jnp.float32(0)), norms)[1][-1]

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(last(list_[CHOSEN].rule), 0.1, rtol=1e-5)
        assert last(list_[designs.PACKAGE].rule) > 20


@pytest.mark.parametrize(
    ("name", "again"), [("of the first 5", 70), ("again after 100 above 30", 120)]
)
def test_the_last_designs_start_again_after_many_norms_far_above(name, again):
    context = clipx.thresholds.Context(step=0, extra={"value": jnp.float32(1)})
    norms = jnp.concatenate([jnp.ones(20), jnp.full(120, 100.0)])

    def step(state, norm):
        limit, state = rule.update(norm, state, context)
        return state, limit

    rule = designs.last_designs()[name].rule
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _, found = jax.lax.scan(step, rule.init(jnp.float32(0)), norms)
    assert np.max(found[:again]) < 0.11
    np.testing.assert_allclose(found[again], 0.307 * 0.1 * 100, rtol=1e-5)


def test_a_power_of_the_norm_is_bounded():
    norms = np.array([0.5, 1.0, 4.0, 1e6], np.float32)
    found = norms * designs.as_power(norms, 1.0, power=0.5)
    np.testing.assert_allclose(found, [0.5, 1.0, 2.0, 30.0], rtol=1e-6)


@pytest.mark.slow
def test_the_other_seeds_are_those_after_the_first():
    what = dataclasses.replace(tasks.MAKERS["deep linear network"](), steps=20)
    rule = {"clipped": training.Design(training.constant(1.0))}
    rates = np.full((4, 1), 0.003)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = training.trained(what, rule, rates, 2)
        later = training.trained(what, rule, rates, 1, first=1)
    np.testing.assert_allclose(later[..., 0], found[..., 1], rtol=1e-5)


ALL = tasks.MAKERS | later_tasks.LATER_MAKERS


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_task_can_be_learned(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        what = ALL[name]()
        assert what.steps % training.CHECKS == 0
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


def test_the_tables_of_the_third_round(tmp_path, capsys):
    fixed = [record("sgd", f"fixed {c:g}", 4, 2, 3) for c in report.RELATIVE_LIMITS]
    none = record("sgd", "none", 4, 3, None)
    here = [{**r, "seconds": 1} for r in [*fixed, none]]
    before = [{**r, "task": "u"} for r in here] + [{**here[0], "final": [[9.0, 9.0]]}]
    path = tmp_path / "table.md"
    report.write_third(here, before, path, ["none"])
    text = path.read_text()
    assert "1 cells," in text
    assert "2 cells," in text
    assert "| t | sgd | 1 | 1.5 |" in text
    assert text.count("| none | 0% | 0% | 1.5 |") == 2
    assert "behind the package" not in text
    best = {**record("sgd", report.PACKAGE, 1, 2, 3), "seconds": 1}
    report.write_third([*here, best], [], path, ["none", report.PACKAGE])
    assert "twenty-four" not in path.read_text()
    assert "| none | 1 (1 to 1) |" in path.read_text()


def test_the_tables_of_the_fourth_round(tmp_path, capsys):
    names = [f"fixed {c:g}" for c in report.RELATIVE_LIMITS] + ["none", "of both"]
    one = [{**record("sgd", name, 4, 2, 3), "seconds": 1} for name in names]
    parity, copying = ([{**r, "task": t} for r in one] for t in ("parity", "copying"))
    path = tmp_path / "table.md"
    report.write_fourth([*parity, *copying], path, designs.fourth_list())
    text = path.read_text()
    assert text.count("| of both | 100% | 100% | 1 |") == 3
    assert text.count("1 cells,") == 2
    assert "2 cells," in text
    assert "| parity | sgd | 1 |" in text
    report.write_fourth(parity, path, designs.fourth_list())
    assert "first twelve" not in path.read_text()


def test_a_cell_in_which_all_diverge_counts_as_diverged():
    both = [f"fixed {c:g}" for c in report.RELATIVE_LIMITS] + ["none"]
    lost = [{**record("sgd", name, None, None), "seconds": 1} for name in both]
    good = [{**record("adam", name, 2, 3), "seconds": 1} for name in both]
    *_, none, _, _ = report.summary([*lost, *good], ["none"])
    assert none.startswith("| none | 50% | 50% | diverged | diverged | 1 | 0 | 2.236 |")


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


LOST = [np.nan] + [1.0] * 9


@pytest.mark.parametrize(
    ("a", "b", "stable", "want"),
    [
        ([1.0] * 10, [0.995] * 10, True, "a"),  # equal: the package's rule stays
        ([1.0] * 10, [0.9] * 10, True, "b"),  # lower mean
        (LOST, [1.2] * 5 + [1.0] * 5, True, "b"),  # the package's diverges
        (LOST, [1.2] * 5 + [1.0] * 5, False, "a"),  # where other seeds do as well
        (LOST, [np.nan] * 2 + [0.5] * 8, True, "a"),  # in the fewest cells
    ],
)
def test_the_last_rule_of_decision(a, b, stable, want):
    second, *_ = designs.last_designs()
    rows = list(cells_of({designs.PACKAGE: a, second: b}))
    before = list(cells_of({designs.PACKAGE: a}))
    if not stable:
        before[0][report.FIXED] = {"final": np.full((3, 8, 6), np.nan)}
    found = deciding.last_decision(rows, before)
    assert found == {"a": designs.PACKAGE, "b": second}[want]


def test_survivals_are_counted_over_runs():
    names = [f"fixed {c:g}" for c in report.RELATIVE_LIMITS] + ["none"]
    records = [
        {**record(o, name, *losses), "task": chance.CRITIC, "run": run}
        for run, losses in ((1, (4, 2, 3)), (2, (None, 2, 3)), (3, (None, None, None)))
        for o in training.SCALES
        for name in names
    ]
    head, _, luck, *rest = chance.survivals(records)
    assert head == "| survived, of 3 runs | sgd | momentum | adam | lion | all |"
    assert luck == f"| {report.LUCK} | 2 | 2 | 2 | 2 | 8 |"
    assert rest[-1] == "| none | 2 | 2 | 2 | 2 | 8 |"
    assert len(rest) == 9


def test_divergences_are_told_from_those_of_the_fixed_threshold():
    fixed = [f"fixed {c:g}" for c in report.RELATIVE_LIMITS]
    fine, lost = (1, 2, 3), (None, None, None)
    records = [
        {**record(o, name, *losses), "run": run}
        for run, o, of_fixed, of_none in (
            (2, "sgd", fine, lost),
            (3, "sgd", fine, fine),
            (2, "adam", lost, fine),
            (3, "adam", fine, lost),
        )
        for name, losses in [(n, of_fixed) for n in fixed] + [("none", of_none)]
    ]
    _, _, luck, *_, none, _, text = chance.divergences(records)
    assert luck == f"| {report.LUCK} | 1 | 0 | 0 | 0 | 1 |"
    assert none == "| none | 2 | 2 | 1 | 1 | 1 |"
    assert text.startswith("2 cells in 2 runs. 1 of them are stable. ")
    assert text.endswith("The last column is of 3 runs.")


def test_runs_of_one_task_are_drawn_together():
    cells = {("a", "sgd", "2"): 1.0, ("a", "sgd", "3"): 1.0, ("b", "sgd", "2"): 2.0}
    drawn = report.near(cells)
    assert drawn[0] == 2
    assert set(drawn[1:]) == {0, 2, 4}


def test_a_ratio_counts_as_at_most_five_and_at_least_a_fifth():
    found = deciding.mean(np.array([0.0, 1.0, np.inf, 2.0]))
    np.testing.assert_allclose(found, 2**0.25, rtol=1e-12)
