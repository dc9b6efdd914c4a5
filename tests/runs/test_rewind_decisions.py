"""When a run goes back, where to, and past which batches; and that this is bounded."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx
from optax_clipx.runs.divergence import bad_stretch
from optax_clipx.runs.rewind_decisions import RewindDecision, batch_of, decide, target
from optax_clipx.runs.table import MISSING

NAN, INF = math.nan, math.inf


class Checkpoints:
    """What Rewind needs of a manager: the checkpoints' steps."""

    def __init__(self, steps=(), keep=100):
        self.steps = sorted(steps)
        self.keep = keep

    def save(self, step):
        self.steps = [*self.steps, step][-self.keep :]

    def all_steps(self):
        return list(self.steps)

    def delete(self, step):
        self.steps.remove(step)

    def restore(self, step, args=None):
        return f"state {step}"

    def wait_until_finished(self):
        pass


def drive(rewind, history, manager, metrics_of, steps=200, every=10):
    """A loop with these metrics of a batch; the batches that were seen."""
    seen = []
    _, step = rewind.restore("fresh", args="given")
    while step < steps:
        seen.append(rewind.batch(step))
        history.append(step, metrics_of(seen[-1]))
        if rewind.step(step):
            _, step = rewind.restore("fresh", args="given")
            continue
        step += 1
        if step % every == 0:
            history.flush()
            manager.save(step)
    return seen


def make(folder, manager=None, **options):
    manager = Checkpoints([0]) if manager is None else manager
    history = clipx.History(folder / "run.jsonl", resume=True)
    return clipx.Rewind(manager, history, **options), history, manager


def loss_in(bad, value=9.0):
    return lambda batch: {"loss": value if batch in bad else 1.0}


def rows(losses, skipped=None, nonfinite=None):
    count = len(losses)
    missing = np.full(count, MISSING)
    return {
        "step": np.arange(count, dtype=float),
        "loss": np.asarray(losses, float),
        "skip/skipped": missing if skipped is None else np.asarray(skipped, float),
        "clip/nonfinite": missing
        if nonfinite is None
        else np.asarray(nonfinite, float),
    }


def stretch(rows, patience=3, band=6.0):
    return bad_stretch(rows, "loss", patience, band)


def usual(count=40):
    return [2.0, 2.1, 1.9, 2.0] * (count // 4)


def test_a_loss_is_bad_above_the_median_and_six_deviations():
    # Median 2, median absolute deviation 0.05: 6 * 1.4826 * 0.05 is 0.445.
    found = stretch(rows([*usual(), 2.45, 2.45, 2.45]))
    assert (found.onset, found.reason, found.loss) == (40, "loss", 2.45)
    assert found.limit == pytest.approx(2.44478)
    assert stretch(rows([*usual(), 2.44, 2.44, 2.44])) is None


def test_a_loss_of_no_spread_has_to_rise_by_a_tenth():
    assert stretch(rows([*[2.0] * 40, 2.19, 2.19, 2.19])) is None
    assert stretch(rows([*[-2.0] * 40, -1.79, -1.79, -1.79])).limit == -1.8


def test_single_spikes_are_none_of_it():
    assert stretch(rows([*usual(), 99.0, 99.0, 2.0])) is None
    assert stretch(rows([*usual(), 99.0, 2.0, 99.0])) is None


def test_a_spike_in_the_window_hides_nothing():
    assert stretch(rows([*usual(), *[1e30] * 5, *usual(8), 9.0, 9.0, 9.0])).onset == 53


def test_the_onset_is_the_first_of_the_bad_steps_in_a_row():
    assert stretch(rows([*usual(), 9.0, 9.0, 9.0, 9.0, 9.0])).onset == 40


def test_with_fewer_than_20_losses_there_is_no_limit():
    assert stretch(rows([*[1.0] * 19, 9.0, 9.0, 9.0])) is None
    assert stretch(rows([*[1.0] * 20, 9.0, 9.0, 9.0])).limit == pytest.approx(1.1)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_losses_that_are_not_finite_need_no_limit(bad):
    found = stretch(rows([1.0, bad, bad, bad]))
    assert (found.onset, found.reason, found.limit) == (1, "nonfinite", None)


def test_skipped_steps_count_without_any_loss():
    found = stretch(rows([MISSING] * 6, skipped=[0, 1, 0, 1, 1, 1]))
    assert (found.onset, found.reason, found.loss) == (3, "skipped", None)


def test_gradients_that_are_not_finite_count():
    found = stretch(rows([1.0] * 5, nonfinite=[0, 0, 1, 1, 1]))
    assert (found.onset, found.reason) == (2, "nonfinite")


def test_steps_without_a_loss_are_left_out():
    losses = [*usual(), 9.0, MISSING, 9.0, MISSING, 9.0]
    assert stretch(rows(losses)).onset == 40


def decision(rewind, step, onset, to, first, following):
    return RewindDecision(rewind, step, onset, to, first, following, "loss", 9.0, 2.0)


def test_a_checkpoint_from_the_bad_steps_is_not_used():
    assert target(70, [40, 60, 70, 80], [], margin=1) == 60
    assert target(70, [70, 80], [], margin=1) is None


def test_a_checkpoint_is_a_margin_before_the_bad_steps_where_one_is():
    assert target(70, [20, 40, 60, 80], [], margin=20) == 40
    assert target(70, [60, 65, 80], [], margin=20) == 60


def test_the_same_checkpoint_is_not_gone_back_to_again():
    first = decision(1, 81, 70, 60, 60, 92)
    assert target(70, [20, 40, 60], [first], margin=5) == 40
    second = decision(2, 81, 70, 40, 40, 120)
    assert target(70, [20, 40, 50], [first, second], margin=5) == 50
    # 60 was saved again after the second.
    assert target(70, [20, 40, 60], [first, second], margin=5) == 60


def test_the_oldest_is_used_again_where_there_is_no_other():
    first = decision(1, 81, 70, 40, 40, 92)
    assert target(70, [40, 60], [first], margin=20) == 40


def test_the_batch_of_a_step_is_told_by_the_last_rewind_before_it():
    first = decision(1, 81, 70, 60, 60, 100)
    second = decision(2, 75, 70, 40, 40, 200)
    third = decision(3, 95, 90, 80, 240, 300)
    assert [batch_of(x, []) for x in (0, 70)] == [0, 70]
    assert [batch_of(x, [first]) for x in (59, 60, 61)] == [59, 100, 101]
    assert [batch_of(x, [first, second]) for x in (39, 40, 60)] == [39, 200, 220]
    found = [batch_of(x, [first, second, third]) for x in (79, 80, 90)]
    assert found == [239, 300, 310]


def test_a_run_that_has_not_got_past_passes_over_twice_as_many():
    bad = stretch(rows([*usual(), 9.0, 9.0, 9.0]))
    first = decide(42, bad, 20, [], margin=10)
    assert first == decision(1, 42, 40, 20, 20, 53)._replace(limit=first.limit)
    second = decide(43, bad, 0, [first], margin=10)
    assert second.first_batch == 0
    assert second.next_batch == batch_of(43, [first]) + 1 + 20
    earlier = decision(1, 39, 35, 20, 20, 53)  # got past that
    assert decide(42, bad, 20, [earlier], margin=10).next_batch == 75 + 1 + 10


def test_a_loop_goes_back_once_and_passes_over_the_bad_batches(tmp_path):
    rewind, history, manager = make(tmp_path, margin=10)
    seen = drive(rewind, history, manager, loss_in(range(105, 120)))
    assert seen == [*range(114), *range(124, 234)]
    (found,) = rewind.decisions
    assert found == RewindDecision(1, 113, 105, 90, 90, 124, "loss", 9.0, 1.1)
    assert manager.steps == list(range(0, 201, 10))
    assert history.steps.tolist() == list(range(200))


def test_a_longer_block_takes_more_rewinds(tmp_path):
    rewind, history, manager = make(tmp_path, margin=10)
    drive(rewind, history, manager, loss_in(range(105, 160)))
    assert [x.to for x in rewind.decisions] == [90, 80]
    assert [x.next_batch for x in rewind.decisions] == [124, 153]


def test_batches_only_rise(tmp_path):
    rewind, history, manager = make(tmp_path, margin=3, max_rewinds=20)
    bad = {*range(60, 100), *range(140, 190), *range(300, 320)}
    seen = drive(rewind, history, manager, loss_in(bad), steps=300)
    assert [x.to for x in rewind.decisions] == [50, 40, 30, 50, 40, 140, 130]
    assert np.all(np.diff(seen) > 0)


def test_after_max_rewinds_comes_an_error(tmp_path):
    rewind, history, manager = make(tmp_path, max_rewinds=3, margin=10)
    with pytest.raises(
        RuntimeError, match=r"^Gave up: at step \d+ the loss 9\.0 is ab"
    ):
        drive(rewind, history, manager, loss_in(range(105, 10**6)))
    assert [x.to for x in rewind.decisions] == [90, 80, 70]
    assert len((tmp_path / "run.jsonl.rewinds").read_text().splitlines()) == 6


def test_giving_up_holds_after_a_restart(tmp_path):
    bad = loss_in(range(105, 10**6))
    rewind, history, manager = make(tmp_path, max_rewinds=1)
    with pytest.raises(RuntimeError, match="max_rewinds=1"):
        drive(rewind, history, manager, bad)
    history.close()
    rewind, history, manager = make(tmp_path, manager, max_rewinds=1)
    with pytest.raises(RuntimeError, match="max_rewinds=1"):
        drive(rewind, history, manager, bad)
    assert len(rewind.decisions) == 1


def test_without_an_early_checkpoint_comes_an_error(tmp_path):
    rewind, history, manager = make(tmp_path, Checkpoints(keep=1))
    with pytest.raises(RuntimeError, match=r"^Cannot go back: .* steps \[110\]\. Save"):
        drive(rewind, history, manager, loss_in(range(105, 10**6)))


def test_skipped_steps_without_a_loss_make_a_run_go_back(tmp_path):
    rewind, history, manager = make(tmp_path, margin=10)
    drive(rewind, history, manager, lambda x: {"skip/skipped": 105 <= x < 120})
    assert rewind.decisions[0].reason == "skipped"
    assert len(rewind.decisions) == 1


def test_it_goes_back_before_skip_spikes_takes_up_the_level(tmp_path):
    """With the patience of both as it is by default."""
    tx = clipx.skip_spikes(optax.sgd(0.1))
    params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    update = jax.jit(tx.update)
    rewind, history, _ = make(tmp_path, Checkpoints([0]))
    skipped = 0
    for step in range(60):
        norm = 1e3 if step >= 40 else 1.0 + 0.1 * (step % 3)
        _, state = update(jnp.array([norm]), state, params)
        metrics = clipx.metrics(state)
        skipped += int(metrics["skip/skipped"])
        history.append(step, metrics)
        if rewind.step(step):
            break
    assert rewind.decisions[0][:4] == (1, 48, 40, 0)
    assert skipped == 9


def test_a_rewind_is_recorded_in_the_history(tmp_path):
    rewind, history, manager = make(tmp_path, margin=10)
    drive(rewind, history, manager, loss_in(range(105, 120)))
    history.close()
    history = clipx.History.load(tmp_path / "run.jsonl")
    where = history.recorded("rewind/number")
    assert history.steps[where].tolist() == [90]
    assert history["rewind/step"][where].tolist() == [113]
    assert history["rewind/next_batch"][where].tolist() == [124]
    assert history["loss"].tolist() == [1.0] * 200


def test_a_healthy_run_is_left_alone(tmp_path):
    """It falls, is noisy, and has a spike now and then."""
    rewind, history, manager = make(tmp_path)
    rng = np.random.default_rng(0)
    losses = (1 + 5 / np.arange(1, 1500)) * rng.lognormal(0, 0.2, 1499)
    losses[rng.integers(0, 1499, 30)] *= 50
    drive(rewind, history, manager, lambda x: {"loss": losses[x]}, 1499)
    assert not rewind.decisions


def test_the_device_is_not_waited_for(tmp_path):
    """The record of the step itself is not read: it is still being computed."""
    rewind, history, _ = make(tmp_path)

    class Computing:
        dtype, shape = np.dtype("f4"), ()

        def copy_to_host_async(self):
            pass

        def __array__(self, *args, **kwargs):
            raise AssertionError("waited")

    for step in range(50):
        history.append(step, {"loss": 1.0})
        assert rewind.step(step) is None
    history.append(50, {"loss": Computing()})
    assert rewind.step(50) is None
    history._writer.pending = None


def test_a_save_that_is_under_way_is_waited_for(tmp_path):
    """Its end deletes the oldest checkpoint."""

    class Saving(Checkpoints):
        def wait_until_finished(self):
            self.steps = [10, 20]

    history = clipx.History(resume=True)
    manager = Saving([0, 10, 20])
    rewind = clipx.Rewind(manager, history, tmp_path / "log", patience=1, margin=8)
    history.append(range(18), {"loss": [NAN if x > 16 else 1.0 for x in range(18)]})
    assert rewind.step(18).to == 10


def test_restore_comes_first_after_a_decision(tmp_path):
    rewind, history, _ = make(tmp_path, Checkpoints([0, 10]), patience=1, margin=1)
    history.append(range(20), {"loss": [NAN if x > 15 else 1.0 for x in range(20)]})
    assert rewind.step(20).to == 10
    for call in (rewind.step, rewind.batch):
        with pytest.raises(RuntimeError, match="Expected a call of restore first"):
            call(20)
    assert rewind.restore("fresh", args="given") == ("state 10", 10)
    assert rewind.batch(10) == 22


def test_judging_twice_changes_nothing(tmp_path):
    rewind, history, manager = make(tmp_path, margin=10)
    drive(rewind, history, manager, loss_in(range(105, 120)), steps=115)
    rewind.restore("fresh", args="given")
    history.append(110, {"loss": 1.0})
    rewind.step(110)
    rewind.step(110)
    assert history["loss"][110] == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patience": 0}, "Expected patience to be 1 or more, got patience=0"),
        ({"window": 19}, "Expected window to be 20 or more, got window=19"),
        ({"margin": 0}, "Expected margin to be 1 or more, got margin=0"),
        ({"max_rewinds": -1}, "Expected max_rewinds to be 0 or more"),
        ({"band": NAN}, "Expected band > 0, got band=nan"),
    ],
)
def test_arguments_are_checked(options, words, tmp_path):
    history = clipx.History(tmp_path / "run.jsonl", resume=True)
    with pytest.raises(ValueError, match=words):
        clipx.Rewind(Checkpoints(), history, **options)


def test_what_is_no_manager_is_refused(tmp_path):
    history = clipx.History(tmp_path / "run.jsonl", resume=True)
    with pytest.raises(TypeError, match=r"got str.*pip install orbax"):
        clipx.Rewind("runs/states", history)


def test_a_history_has_to_take_steps_again():
    with pytest.raises(ValueError, match=r"Write: History\(path, resume=True\)"):
        clipx.Rewind(Checkpoints(), clipx.History(), "rewinds.jsonl")


def test_a_history_in_memory_needs_a_path_for_the_decisions():
    with pytest.raises(
        ValueError, match=r'Rewind\(manager, history, "rewinds.jsonl"\)'
    ):
        clipx.Rewind(Checkpoints(), clipx.History(resume=True))


def test_a_history_without_losses_is_an_error(tmp_path):
    rewind, history, manager = make(tmp_path)
    with pytest.raises(ValueError, match="Expected a history with the column 'loss'"):
        drive(rewind, history, manager, lambda batch: {"train_loss": 1.0})


def test_the_column_of_the_loss_can_be_named(tmp_path):
    rewind, history, manager = make(tmp_path, loss="train_loss")
    drive(rewind, history, manager, lambda x: {"train_loss": 1.0 + 8 * (x > 100)}, 110)
    assert rewind.decisions[0].onset == 101


OTHER = """
import sys
sys.path[:0] = sys.argv[1].split("|")
from pathlib import Path
import numpy as np
from test_rewind_decisions import drive, make
folder = Path(sys.argv[2])
losses = np.random.default_rng(3).lognormal(0, 0.3, 2000)
losses[200:260] *= 1e3
losses[500:505] = np.nan
losses[505:560] *= 20
rewind, history, manager = make(folder, primary=sys.argv[3] == "0")
seen = drive(rewind, history, manager, lambda x: {"loss": losses[x]}, 900)
print([*map(tuple, rewind.decisions)], seen)
"""


@pytest.mark.slow
def test_processes_that_record_the_same_decide_alike(tmp_path):
    running = []
    for process in range(2):
        (tmp_path / str(process)).mkdir()
        line = [sys.executable, "-c", OTHER, os.path.dirname(__file__)]
        line += [str(tmp_path / str(process)), str(process)]
        environment = {**os.environ, "PYTHONHASHSEED": str(process)}
        running.append(
            subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
        )
    first, second = (process.communicate()[0] for process in running)
    assert first == second
    assert first.count("'loss'") >= 2
    assert (tmp_path / "0" / "run.jsonl.rewinds").exists()
    assert not (tmp_path / "1" / "run.jsonl.rewinds").exists()


def test_the_file_has_one_object_a_line(tmp_path):
    rewind, history, manager = make(tmp_path, margin=10)
    drive(rewind, history, manager, loss_in(range(105, 120), NAN))
    first, second = (tmp_path / "run.jsonl.rewinds").read_text().splitlines()
    assert json.loads(first) == {
        **{"rewind": 1, "step": 113, "onset": 105, "to": 90},
        **{"first_batch": 90, "next_batch": 124},
        **{"reason": "nonfinite", "loss": "NaN", "limit": pytest.approx(1.1)},
    }
    assert json.loads(second) == {"done": 1}
