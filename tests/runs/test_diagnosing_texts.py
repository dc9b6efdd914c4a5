"""What a diagnosis says: sentences that agree with the numbers they are about."""

import re
from pathlib import Path

import numpy as np
import pytest
from planted import FAULTS

import optax_clipx as clipx
from optax_clipx import __main__ as command_line
from optax_clipx.runs.advice import ADVICE
from optax_clipx.runs.causes import CHAIN, CHECKS, WORDS

ROOT = Path(__file__).parents[2]


def found(run, code):
    """The finding of a code in a run."""
    return next(x for x in clipx.diagnose(run).findings if x.code == code)


def test_a_diverged_loss_never_ends_below_its_best_level():
    """The last loss alone, 8.993, is below the best level by chance."""
    loss = np.r_[np.full(100, 18.0), np.full(149, 60.0), 8.993]
    diverged = found({"loss": loss}, "loss-diverged")
    assert diverged.sentence == (
        "The loss rises from its best level, 18 (median of steps 0 to 6), to 60 at the"
        " end (median of steps 225 to 249)."
    )
    assert diverged.evidence["best_steps"] == [0, 6]
    assert diverged.evidence["end_steps"] == [225, 249]
    assert diverged.evidence["end"] > diverged.evidence["best"]


def test_a_diverged_loss_that_ends_as_nan_says_so():
    loss = np.r_[np.full(100, 1.0), np.full(149, 60.0), np.nan]
    diverged = found({"loss": loss}, "loss-diverged")
    assert diverged.sentence == (
        "The loss rises from its best level, 1 (median of steps 0 to 6), and is not"
        " finite at the end."
    )


@pytest.mark.parametrize(("limit", "severity"), [(2.0, "info"), (20.0, "warning")])
def test_spikes_that_were_clipped_need_no_change(limit, severity):
    step = np.arange(400)
    norm = np.exp(0.05 * np.random.default_rng(0).normal(size=400))
    norm[[150, 300]] = 12.0
    run = {
        "loss": 2 - step / 400,
        "clip/norm": norm,
        "clip/threshold": 0 * norm + limit,
    }
    spikes = found(run, "spikes")
    assert (spikes.severity, spikes.steps) == (severity, (150, 300))
    clipped = "all of them were clipped, and the loss recovered" in spikes.sentence
    assert clipped == ("nothing to change" in spikes.advice) == (severity == "info")


def diverging(peak=600):
    """Norms of 1.5 that grow from step 600 on, a loss that follows, and a NaN."""
    step = np.arange(900)
    noise = np.exp(0.05 * np.random.default_rng(0).normal(size=900))
    growth = np.exp(np.clip((step - 600) / 60, 0, None))
    loss = 1 + 2 * np.exp(-step / 100) + 0.01 * noise
    loss += np.clip((step - 750) / 20, 0, None)
    loss[840:] = np.nan
    return {
        "loss": loss,
        "grad_norm": 1.5 * growth * noise,
        "learning_rate": 0.003 * np.minimum(step / peak, 1.0),
    }


def test_the_first_line_says_where_a_divergence_started():
    diagnosis = clipx.diagnose(diverging())
    summary, order = str(diagnosis).splitlines()[:2]
    first = {x.code: f"{x.code} at step {x.steps[0]}" for x in diagnosis.findings}
    assert summary == "3 errors in 900 steps"
    assert order == (
        f"It started with {first['growing-norms']}; then came"
        f" {first['loss-diverged']}, then nonfinite at step 840."
    )
    assert diagnosis.codes == ("growing-norms", "loss-diverged", "nonfinite")
    assert order in diagnosis._repr_html_().replace("&#x27;", "'")


def test_what_follows_from_a_divergence_says_so():
    first, *others = str(clipx.diagnose(diverging())).split("error: ")[1:]
    assert first.startswith("growing-norms at steps")
    assert ": training is unstable, often because the maximum of the" in first
    start = found(diverging(), "growing-norms").steps[0]
    for other in others:
        assert f": probably because the gradient norms grew at step {start}\n" in other
        assert "\n  First follow the advice for growing-norms.  (" in other


def died():
    """A loss that diverges at step 500; all leaves die at step 560 or 580."""
    step = np.arange(900)
    noise = np.exp(0.05 * np.random.default_rng(0).normal(size=900))
    run = {f"track_norms/{name}": noise * (step < 560) for name in "abc"}
    run["track_norms/d"] = noise * (step < 580)
    run["loss"] = 0.1 * noise + 3.0 * (step >= 500) + np.exp(-step / 50)
    return run


def test_leaves_that_die_after_a_divergence_follow_from_it():
    dead = found(died(), "dead-leaf")
    assert dead.steps == (560, 560, 560, 580)
    assert str(dead).splitlines() == [
        "warning: dead-leaf at steps 560, 580: probably because the loss diverged at"
        " step 500",
        "  There is no gradient in a, b, c, d.",
        '  First follow the advice for loss-diverged.  (Troubleshooting: "A layer has'
        ' no gradient")',
    ]
    assert dead.evidence["follows"] == "loss-diverged"
    assert dead.evidence["follows_step"] == 500
    assert dead.advice.startswith("jax.tree.map(jnp.any, grads)  # False")


@pytest.mark.parametrize("name", ["loss", "track_norms/a"])
def test_a_fault_without_a_divergence_before_it_follows_from_nothing(name):
    run = died()
    run["loss"] = np.exp(-np.arange(900) / 50)
    run[name][100] = np.nan  # a warning, as it does not stay
    dead = found(run, "dead-leaf")
    assert "follows" not in dead.evidence
    assert dead.likely_cause == "the loss does not depend on these leaves"


def test_faults_before_a_divergence_do_not_follow_from_it():
    run = died()
    run["norm"] = np.exp(0.05 * np.random.default_rng(1).normal(size=900))
    run["norm"][[100, 700]] = 50.0
    assert "loss-diverged" in clipx.diagnose(run).codes
    assert "follows" not in found(run, "spikes").evidence


def test_what_to_do_comes_in_words_before_the_code():
    run = {"norm": np.full(200, 3.0), "threshold": np.ones(200)}
    assert str(found(run, "always-clipped")) == (
        "warning: always-clipped at steps 0 to 199: the threshold is below nearly all"
        " norms\n"
        "  100.0% of the steps are clipped.\n"
        "  Record the run again with zclip, or with ten times the threshold, and then"
        " choose a threshold.\n"
        '  clipx.zclip()  (Troubleshooting: "Clip rate is 100%")'
    )


def test_advice_without_code_is_words_alone():
    run = {"norm": np.ones(400), "threshold": np.full(400, 2.0)}
    run["norm"][[150, 300]] = 12.0
    run["loss"] = np.linspace(2, 1, 400)
    assert str(found(run, "spikes")).splitlines()[-1] == (
        "  You need to change nothing: clipping limits these steps.  (Troubleshooting:"
        ' "Gradient norm spikes")'
    )


def test_the_page_shows_what_is_printed(capsys):
    page = (ROOT / "docs" / "diagnosing.md").read_text()
    code, shown = re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.S
    ).groups()
    exec(code, {})
    assert capsys.readouterr().out.startswith(shown.removesuffix("...\n"))


def test_every_code_has_a_cause_and_a_remedy():
    assert list(WORDS) == list(ADVICE)
    assert set(CHAIN) < set(WORDS)


def test_one_finding_has_no_order():
    loss = np.r_[np.full(100, 18.0), np.full(150, 60.0)]
    assert "It started" not in str(clipx.diagnose({"loss": loss}))


def test_a_stretch_is_written_as_one():
    growth = found(diverging(), "growing-norms")
    first, last = growth.steps
    assert f"growing-norms at steps {first} to {last}: " in str(growth)


def test_the_maximum_of_the_learning_rate_is_named_if_growth_starts_there():
    named = found(diverging(peak=600), "growing-norms").sentence
    assert named.endswith(
        " The growth starts where the learning rate reaches its maximum, 0.003, at step"
        " 600."
    )
    assert "maximum" not in found(diverging(peak=200), "growing-norms").sentence
    constant = diverging() | {"learning_rate": np.full(900, 0.003)}
    assert "maximum" not in found(constant, "growing-norms").sentence


@pytest.mark.parametrize("code", ["growing-norms", "loss-diverged"])
def test_the_remedy_has_three_times_the_usual_norm_of_the_run(code):
    diverged = found(diverging(), code)
    assert diverged.evidence["usual_norm"] == pytest.approx(1.5, rel=0.02)
    assert diverged.advice == (
        "optax.chain(clipx.zclip(max_norm=4.5), optimizer)  # first lower the learning"
        " rate, for example to a third; if your optimizer contains a clipper already,"
        " remove that clipper; 4.5 is 3 times the usual norm before step 600,"
        ' 1.5  (Troubleshooting: "The loss diverges")'
    )


def test_without_norms_the_remedy_says_what_to_put():
    loss = np.r_[np.full(100, 18.0), np.full(150, 60.0)]
    diverged = found({"loss": loss}, "loss-diverged")
    assert diverged.remedy.endswith(
        " In place of 1.0, put three times the median norm of steps that went well."
    )
    assert diverged.advice == (
        "optax.chain(clipx.zclip(max_norm=1.0), optimizer)  # first lower the learning"
        " rate, for example to a third; if your optimizer contains a clipper already,"
        " remove that clipper; in place of 1.0, put three times the median"
        ' norm of steps that went well  (Troubleshooting: "The loss diverges")'
    )


@pytest.mark.parametrize(("rises_at", "max_norm"), [(10, "6"), (2, "1.0")])
def test_five_norms_before_a_divergence_are_a_usual_norm(rises_at, max_norm):
    growth = 2.0 * 4.0 ** np.arange(8)
    run = {"norm": np.r_[np.full(rises_at, 2.0), growth, np.full(100, np.nan)]}
    advice = found(run, "growing-norms").advice
    assert f"clipx.zclip(max_norm={max_norm})" in advice
    assert ("in place of 1.0" in advice) == (max_norm == "1.0")


def test_an_always_clipped_run_is_to_be_recorded_again():
    run = {"norm": np.full(200, 3.0), "threshold": np.ones(200)}
    assert found(run, "always-clipped").advice.startswith(
        "clipx.zclip()  # record again with it, or with ten times the threshold  ("
    )


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ([60], "The norm has 1 spike, of 30 times its level."),
        ([60, 120], "The norm has 2 spikes, of up to 30 times its level."),
    ],
)
def test_spikes_are_counted(at, words):
    norms = np.ones(200)
    norms[at] = 30.0
    assert found({"norm": norms}, "spikes").sentence == words


@pytest.mark.parametrize(
    ("at", "words"),
    [([60], "recovered from it."), ([60, 120], "recovered from all of them.")],
)
def test_recovery_from_spikes_is_told(at, words):
    run = {"norm": np.ones(200), "loss": np.linspace(2, 1, 200)}
    run["norm"][at] = 30.0
    assert found(run, "spikes").sentence.endswith(f"; the loss {words}")


@pytest.mark.parametrize(("factor", "words"), [(0.25, "falls to"), (4, "rises to")])
def test_a_level_shift_falls_or_rises(factor, words):
    norms = np.exp(0.05 * np.random.default_rng(0).normal(size=400))
    norms[200:] *= factor
    run = {"norm": norms}
    shift = found(run, "level-shift")
    assert shift.sentence.startswith(f"From one step to the next the norm {words} ")
    assert shift.evidence["factors"] == pytest.approx([factor], rel=0.05)


def test_a_target_that_is_not_known_is_not_mentioned():
    run = {"norm": np.full(200, 3.0), "threshold": np.ones(200)}
    always = found(run, "always-clipped")
    assert always.sentence == "100.0% of the steps are clipped."
    assert "target" not in always.evidence


def test_what_was_not_checked_names_a_column_to_record():
    diagnosis = clipx.diagnose({"norm": np.ones(100), "loss": np.ones(100)})
    assert (
        "Not checked: whether the updates grow before the loss (update-before-loss)."
        " This needs a column with the norm of the updates, for example update_norm."
    ) in str(diagnosis)


def test_every_fault_is_said_in_words_if_it_was_not_checked():
    assert list(CHECKS) == list(ADVICE)
    mixed = {"step": [0, 1, 2, 0, 1, 2] * 20, "norm": np.ones(120)}
    unjudged = clipx.diagnose(mixed).unjudged()
    assert unjudged == ["Not checked: all other faults. This needs a log of one run."]


def test_norms_that_fall_before_a_divergence_are_usual_where_they_end():
    run = diverging()
    run["grad_norm"] = run["grad_norm"] * np.r_[np.geomspace(10, 1, 600), np.ones(300)]
    growth = found(run, "growing-norms")
    start, advice = growth.steps[0], growth.advice
    recent = float(np.median(run["grad_norm"][start - start // 3 : start]))
    assert recent < 0.5 * np.median(run["grad_norm"][:start])
    where = f"before step {start} (last third of these steps), {recent:.3g}"
    assert f"the usual norm {where}" in advice
    assert f"max_norm={3 * recent:.2g})" in advice


def test_why_another_clipper_may_be_suggested_is_told_where_it_may():
    norms = np.exp(0.05 * np.random.default_rng(0).normal(size=400))
    norms[200] = 30.0
    said = "suggest_threshold may name another clipper"
    assert said in str(clipx.diagnose({"norm": norms}))
    assert said in clipx.diagnose({"norm": norms})._repr_html_()
    assert said not in str(clipx.diagnose({"norm": np.delete(norms, 200)}))
    assert said not in str(clipx.diagnose(diverging()))
    other = "If optax_clipx.diagnose finds a fault and names another clipper"
    assert other in str(clipx.suggest_threshold(norms))


def test_advice_from_a_file_names_the_file(tmp_path):
    history = clipx.History()
    run = {"norm": np.full(200, 3.0), "threshold": np.full(200, 9.0)}
    history.append(range(200), run)
    path = history.save(tmp_path / "run.jsonl")
    assert (
        f"clipx.suggest_threshold({str(path)!r}, "
        in found(path, "never-clipped").advice
    )


def test_compare_gives_a_range_only_of_several_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, loss in {"a": 2.0, "b": 3.0, "c": 5.0}.items():
        (tmp_path / f"{name}.csv").write_text(f"step,loss\n0,{loss}\n1,{loss}\n")
    command_line.main(["compare", "one=a.csv", "two=b.csv", "two=c.csv"])
    assert capsys.readouterr().out.splitlines()[:2] == [
        "one: loss 2 (1 run), median of the last tenth of the steps",
        "two: loss 4 (3 to 5 in 2 runs), median of the last tenth of the steps",
    ]


def test_the_advice_for_norms_that_rise_with_the_schedule_can_be_typed():
    step = np.arange(1000)
    norm = np.exp(step / 500 + 0.05 * np.random.default_rng(0).normal(size=1000))
    run = {"norm": norm, "learning_rate": 1e-3 * 0.997**step}
    line = found(run, "rises-with-schedule").advice.split("  #")[0]
    assert line.startswith("clipx.clip_by(")
    assert ", schedule))" in line
    scope = {"clipx": clipx, "schedule": lambda step: 1e-3}
    assert eval(line, scope).init({"w": np.ones(3, np.float32)}) is not None


def test_a_run_that_is_never_clipped_is_compared_step_by_step():
    """A norm above the median threshold is below the threshold of its own step."""
    run = {"norm": np.full(300, 2.0), "threshold": np.full(300, 2.5)}
    run["norm"][:50], run["threshold"][:50] = 6.0, 8.0
    assert found(run, "never-clipped").sentence == (
        "No step is clipped: the largest norm is 80% of the threshold of its step."
    )


@pytest.mark.parametrize("code", ["growing-norms", "loss-diverged"])
def test_the_clipper_of_a_run_is_told_to_be_replaced(code):
    said = "use this clipper in place of yours in optax.chain"
    clipped = clipx.diagnose(diverging(), threshold=5.0).findings
    advice = next(x.advice for x in clipped if x.code == code)
    assert f"to a third; {said}; 4.5 is 3 times the usual norm" in advice
    assert advice.startswith("clipx.zclip(max_norm=4.5)  # ")
    assert said not in found(diverging(), code).advice


def test_where_a_limit_comes_from_is_printed():
    run = diverging() | {"learning_rate": np.full(900, 0.003)}
    printed = str(clipx.diagnose(run, threshold=5.0))
    assert (
        " Also clip outliers. Use this clipper in place of yours in optax.chain. 4.5 is"
        " 3 times the usual norm before step 600, 1.5.\n"
        "  clipx.zclip(max_norm=4.5)  (Trouble"
    ) in printed
    assert printed.count("4.5 is 3 times") == 1  # not where other advice is followed


def test_a_limit_of_the_updates_is_not_in_place_of_the_clipper():
    """The clipper of the gradients may stay."""
    run, (step,) = FAULTS["update-before-loss"](np.random.default_rng(0))
    advice = found(run, "update-before-loss").advice
    usual = np.median(run["track/update_norm"][:step])
    limit = float(f"{3 * usual:.2g}")
    assert advice.startswith(
        f"optax.chain(optimizer, clipx.clip_by_global_norm({limit:g}))  # {limit:g} is"
        f" 3 times the median norm of the updates before step {step}, {usual:.3g}  ("
    )
