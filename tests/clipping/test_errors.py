"""Errors say what was expected, what came, and where; and paths rarely taken work."""

import builtins
import functools
import os
import subprocess
import sys
import warnings
from typing import NamedTuple

import equinox
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from versions import MESH_OF_TRACED

import optax_clipx as clipx
from optax_clipx.__main__ import main
from optax_clipx._devices.mesh import vary

GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
per_example, units = clipx.per_example, clipx.units


def stepped(tx, grads=None, params=None):
    grads = GRADS if grads is None else grads
    return tx.update(grads, tx.init(grads), params)


class Pair(NamedTuple):
    first: object
    second: object


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Without the check of annotations, which would be the first to complain."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def loss(params, x):
    return jnp.sum(params["w"] * x)


def leaf(*shape):
    return jnp.zeros(shape)


def in_shards(**options):
    """Clips two leaves on two devices whose types say nothing."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    tx = clipx.clip_by_global_norm(1.0, **options)
    return jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[0],
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=False,
    )({"w": jnp.ones((2, 2))})


def traced(make):
    """A number that is an array, where one is needed that is known."""
    return lambda: jax.jit(make)(2)


ERRORS = {
    "measure": (lambda: clipx.clip_by(1.0, 1.0), TypeError, r"tree_norm\(\), got 1\.0"),
    "response": (
        lambda: clipx.clip_by(clipx.measures.tree_norm(), 1.0, 2.0),
        TypeError,
        r"response to be a function, got 2\.0",
    ),
    "group's limits": (
        lambda: clipx.clip_by_group_norm(1.0, "a"),
        TypeError,
        r"dict from label to threshold, got 1\.0",
    ),
    "scope": (lambda: clipx.zclip(scope="all"), ValueError, "got scope='all'"),
    "smooth p": (
        lambda: clipx.responses.smooth(jnp.ones(1), jnp.ones(1), p=-1.0),
        ValueError,
        r"p > 0, got p=-1\.0",
    ),
    "no rule": (lambda: clipx.thresholds.minimum(), ValueError, "one rule or more"),
    "complex limit": (
        lambda: clipx.thresholds.constant(np.complex64(1j)),
        TypeError,
        "real limit, got",
    ),
    "limits of labels": (
        lambda: stepped(
            clipx.clip_by(
                clipx.measures.group_norms({"w": "a", "b": "b"}),
                clipx.thresholds.constant([1.0, 2.0]),
            )
        ),
        TypeError,
        r"dict from label to threshold, got \[1\.0, 2\.0\]",
    ),
    "warmup_limit of units": (
        lambda: clipx.adagc(scope=clipx.measures.unit_norms()).init(GRADS),
        ValueError,
        "got units",
    ),
    "window and max_steps": (
        lambda: clipx.thresholds.quantile(0.5, window=3, max_steps=4),
        ValueError,
        "both: window=3 and max_steps=4",
    ),
    "traced choice": (
        traced(lambda x: clipx.thresholds.zscore(stats=x).init(jnp.zeros(()))),
        TypeError,
        "stats",
    ),
    "fraction of a step": (
        lambda: clipx.thresholds.zscore(warmup_steps=1.5),
        ValueError,
        r"whole number, got warmup_steps=1\.5",
    ),
    "traced alpha": (
        traced(lambda x: clipx.scale_by_acclip(alpha=x).init(GRADS)),
        TypeError,
        "alpha",
    ),
    "alpha": (
        lambda: clipx.scale_by_acclip(alpha="2"),
        TypeError,
        "number, got alpha='2'",
    ),
    "decay of 1": (
        lambda: clipx.scale_by_acclip(b1=1.0),
        ValueError,
        r"0 <= b1 < 1, got b1=1\.0",
    ),
    "mixed_clip adapts": (
        lambda: clipx.mixed_clip(clipx.thresholds.zscore()),
        ValueError,
        "a rule that adapts",
    ),
    "skip_spikes of what": (
        lambda: clipx.skip_spikes(3),
        TypeError,
        "optax transformation, got 3",
    ),
    "skip_spikes by parameters": (
        lambda: clipx.skip_spikes(
            optax.sgd(1.0), threshold=clipx.thresholds.relative_to_params(0.1)
        ),
        ValueError,
        "does not depend on the parameters",
    ),
    "reset_moments of what": (
        lambda: clipx.reset_moments(3, every=2),
        TypeError,
        "optax transformation, got 3",
    ),
    "watch of what": (lambda: clipx.track_norms(3), TypeError, "transformation, got 3"),
    "error_feedback of what": (
        lambda: clipx.error_feedback(3),
        TypeError,
        "transformation, got 3",
    ),
    "spec": (
        lambda: in_shards(specs={"w": "x"}),
        TypeError,
        r"PartitionSpec in specs= for w, got 'x'",
    ),
    "long spec": (
        lambda: in_shards(specs={"w": P("x", None, None)}),
        ValueError,
        r"at most 2 entries for w of shape \(1, 2\)",
    ),
    "fun": (
        lambda: per_example.clipped_grad(3, 1.0),
        TypeError,
        "fun to be a function, got 3",
    ),
    "measure of examples": (
        lambda: per_example.clipped_grad(loss, 1.0, measure=3),
        TypeError,
        "got 3",
    ),
    "units of examples": (
        lambda: per_example.clipped_grad(
            loss, 1.0, measure=clipx.measures.unit_norms()
        ),
        ValueError,
        r"leaf_norms\(\) or group_norms",
    ),
    "batch_size of a sum": (
        lambda: per_example.clipped_grad(loss, 1.0, batch_size=3),
        ValueError,
        'reduction="mean" beside batch_size=3',
    ),
    "parameters without array": (
        lambda: per_example.clipped_grad(loss, 1.0)({}, jnp.ones((2, 2))),
        ValueError,
        "parameters with an array",
    ),
    "negative argument": (
        lambda: per_example.clipped_grad(loss, 1.0, batch_argnums=-1),
        ValueError,
        "batch_argnums=-1",
    ),
    "limit is a schedule": (
        lambda: per_example.clipped_grad(loss, lambda step: 1.0),
        TypeError,
        "Call a schedule with its step first",
    ),
    "limits of one tree": (
        lambda: per_example.clipped_grad(loss, {"w": 1.0})(GRADS, jnp.ones((2, 2))),
        ValueError,
        "single max_norm for the whole example",
    ),
    "no limit of a group": (
        lambda: per_example.clipped_grad(
            loss, {"a": 1.0}, measure=clipx.measures.group_norms({"w": "a", "b": "b"})
        )(GRADS, jnp.ones((2, 2))),
        ValueError,
        r"max_norm for \['b'\]",
    ),
    "axis of a stack": (
        lambda: units.stacked(units.flax, "w", axis=5)(("w",), leaf(2, 2)),
        ValueError,
        r"axis=5 within the rank of shape \(2, 2\) at w",
    ),
    "filters of rank 6": (
        lambda: units.flax(("conv", "kernel"), jnp.zeros((2,) * 6)),
        ValueError,
        "conv/kernel",
    ),
    "filters of rank 6, Equinox": (
        lambda: units.equinox(("conv", "weight"), jnp.zeros((2,) * 6)),
        ValueError,
        "conv/weight",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_the_error_says_what_and_where(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("rule", "path", "shape", "axes"),
    [
        (units.flax, ("x", "kernel"), (1, 5, 1), (0, 1, 2)),
        (units.flax, ("x", "kernel"), (2, 2, 2, 2), (0, 1, 2)),
        (units.equinox, ("conv", "bias"), (4, 1, 1), (0, 1, 2)),
        (units.equinox, ("x", "bias"), (3, 4), (1,)),
        (units.equinox, ("x", "weight"), (2, 3, 4, 5), (1, 2, 3)),
        (units.haiku, ("embed", "embeddings"), (5, 3), (1,)),
        (units.haiku, ("linear", "w"), (1, 1, 4), (0, 1, 2)),
        (units.haiku, ("conv2_d_transpose", "w"), (3, 3, 2, 4), (0, 1, 3)),
        (units.haiku, ("x", "w"), (2, 3, 4, 5), (0, 1, 2)),
    ],
)
def test_units_by_name_and_rank(rule, path, shape, axes):
    assert rule(path, leaf(*shape)) == axes


def test_a_stack_may_have_leaves_without_units():
    rule = units.stacked(lambda path, leaf: None, "w")
    assert rule(("w",), leaf(3, 2)) is None


@pytest.mark.parametrize("tx", [clipx.skip_spikes, clipx.track_norms])
def test_a_tree_without_arrays_passes_through_wrappers(tx):
    updates, _ = stepped(tx(optax.sgd(1.0)), {})
    assert updates == {}


def test_functions_of_a_tree_without_arrays():
    clipped, norm = clipx.functional.clip_by_global_norm({}, 1.0)
    assert clipped == {}
    assert norm == 0.0


def test_one_limit_of_a_user_rule_stands_for_all_groups():
    rule = clipx.thresholds.Threshold(
        lambda norms: (), lambda norms, state, context: (2.0, ())
    )
    updates, _ = stepped(
        clipx.clip_by(clipx.measures.leaf_norms(), clipx.thresholds.minimum(rule, 9.0))
    )
    assert jnp.linalg.norm(updates["w"]) == pytest.approx(2.0)


def test_limits_of_a_user_rule_for_each_leaf():
    def update(norms, state, context):
        return {"w": 2.5, "b": 0.5}, state

    rule = clipx.thresholds.Threshold(lambda norms: (), update)
    for measure in (clipx.measures.leaf_norms(), clipx.measures.unit_norms(axis=0)):
        updates, _ = stepped(clipx.clip_by(measure, rule))
        np.testing.assert_allclose(updates["w"], [1.5, 2.0], rtol=1e-6)
        np.testing.assert_allclose(updates["b"], [0.5], rtol=1e-6)


def test_sanitizing_mixed_clip():
    tx = clipx.mixed_clip(1.0, nonfinite="sanitize")
    updates, _ = stepped(tx, {"w": jnp.array([jnp.nan, 1.0])})
    assert jnp.isfinite(updates["w"]).all()


def test_metrics_of_two_clippers_in_fields_of_the_same_name():
    pair = (clipx.clip_by_global_norm(1.0), clipx.clip_by_global_norm(2.0))
    states = Pair(*(tx.init(GRADS) for tx in pair))
    assert {"clip/first/norm", "clip/second/norm"} <= set(clipx.metrics([states]))


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run.jsonl"
    lines = (f'{{"step": {i}, "clip/norm": {i % 3 + 0.5}}}\n' for i in range(50))
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["watch", "RUN", "--every", "0"], "Expected --every > 0"),
        (["watch", "RUN", "RUN"], "named twice"),
        (["plot", "RUN", "-o", "FOLDER/x.png", "--force"], None),
        (["plot", "RUN", "RUN", "-o", "FOLDER"], "drawn to one file"),
        (["plot", "FOLDER/none.jsonl"], "no such file"),
        (["suggest", "RUN", "--step", "none"], "--step NAME"),
        (["compare", "RUN"], "--column NAME"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message, run, capsys):
    given = [
        x.replace("RUN", str(run)).replace("FOLDER", str(run.parent)) for x in arguments
    ]
    assert main(given) == (2 if message else 0)
    assert (message or "") in capsys.readouterr().err


def test_a_folder_is_no_file_to_write_to(run, capsys):
    (run.parent / "run.png").mkdir()
    assert main(["plot", str(run)]) == 2
    assert "is a folder. Name a file in it." in capsys.readouterr().err


def test_ctrl_c_ends_watching(run, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert main(["watch", str(run)]) == 0


@pytest.mark.slow
def test_who_reads_the_output_may_stop_reading(run):
    command = [sys.executable, "-m", "optax_clipx", "suggest", str(run)]
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, "")


def as_events(run):
    """The file under a name that only TensorBoard's own files have."""
    return run.rename(run.with_name("events.out.tfevents.1"))


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("matplotlib", lambda run: clipx.plotting.norms(run)),
        ("pandas", lambda run: clipx.History.load(run).to_pandas()),
        ("rich", lambda run: main(["watch", str(run), "--once"])),
        ("plotly", lambda run: main(["plot", str(run), "--html", "x.html"])),
        ("tensorboard", lambda run: clipx.History.load(as_events(run))),
    ],
)
def test_a_missing_package_is_named_with_the_mend(
    module, use, run, monkeypatch, capsys
):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    said = ""
    try:
        use(run)
    except (ImportError, ValueError) as error:
        said = str(error)
    said += capsys.readouterr().err
    assert f"{module} is missing. Run: pip install {module}" in said


def test_a_page_of_runs_with_bands_and_of_one_without_a_usable_norm(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, norms in (
        ("long", rng.lognormal(size=9000)),
        ("zero", np.zeros(30)),
    ):
        lines = (f'{{"step": {i}, "norm": {x}}}\n' for i, x in enumerate(norms))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    page = tmp_path / "page.html"
    runs = [str(tmp_path / f"{name}.jsonl") for name in ("long", "zero")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["plot", *runs, "--html", str(page)]) == 0
    assert "rgba(" in page.read_text()


def test_a_history_draws_itself_and_does_not_overwrite(run, tmp_path):
    history = clipx.History.load(run)
    path = tmp_path / "deep" / "run.png"
    history.plot(path)
    assert path.stat().st_size > 1000
    with pytest.raises(FileExistsError, match="force=True"):
        history.plot(path, force=False)


def test_a_suggestion_says_how_many_norms_were_not_finite():
    norms = np.r_[np.ones(200), np.nan, np.inf, np.random.default_rng(0).random(100)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "non-finite: 2 norms" in str(clipx.suggest_threshold(norms))


@pytest.mark.parametrize("block", [512, len('{"step": 10, "norm": 11}\n') * 8])
def test_a_run_that_begins_again_in_a_later_block_of_its_file(
    tmp_path, monkeypatch, block
):
    path = tmp_path / "run.jsonl"
    steps = [*range(40), *range(30, 60)]
    lines = (f'{{"step": {i}, "norm": {i + 1}}}' for i in steps)
    path.write_text("".join(f"{line:24}\n" for line in lines))
    monkeypatch.setattr("optax_clipx.runs.jsonl._BLOCK", block)
    with pytest.warns(UserWarning, match="again"):
        history = clipx.History.load(path)
    assert history.steps.tolist() == list(range(60))


def test_a_table_without_rows_says_so(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step,norm\n\n\n")
    with pytest.raises(ValueError, match=str(path.name)):
        clipx.History.load(path)


def test_pictures_of_runs_with_little_in_them(tmp_path):
    quiet = {"step": np.arange(9), "norm": np.ones(9), "clipped": np.zeros(9)}
    assert clipx.plotting.norms(quiet) is not None
    moving = {"step": np.arange(9), "norm": np.linspace(1, 9, 9)}
    figure = clipx.plotting.histogram(moving | {"threshold": np.linspace(1, 2, 9)})
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "the threshold lay here in 90% of steps" in labels
    failed = {"step": np.arange(9), "loss": np.full(9, np.nan)}
    assert clipx.plotting.compare({"failed": failed}) is not None


def test_a_sweep_whose_scores_are_better_when_higher(tmp_path):
    found = clipx.find_threshold(
        lambda limit: -((np.log(limit) - 1) ** 2),
        0.5,
        20.0,
        num=5,
        higher_is_better=True,
        progress=False,
    )
    axes = found.plot().axes[0]
    assert axes.get_yscale() == "linear"
    found.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_a_pair_of_functions_is_a_rule():
    pair = (lambda norms: (), lambda norms, state, context: (norms * 0 + 2.5, state))
    updates, _ = stepped(clipx.clip_by(clipx.measures.tree_norm(), pair))
    assert float(optax.tree.norm(updates)) == pytest.approx(2.5)


def test_bands_may_be_schedules():
    rule = clipx.thresholds.group_band(lambda step: 0.5, lambda step: 2.0)
    updates, _ = stepped(
        clipx.clip_by(clipx.measures.leaf_norms(), rule, clipx.responses.normalize)
    )
    np.testing.assert_allclose(updates["w"], GRADS["w"], rtol=1e-6)


def test_raising_clippers_let_finite_steps_pass_outside_of_jit():
    updates, state = stepped(clipx.clip_by_global_norm(1.0, nonfinite="raise"))
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0)
    clipx.check(state)


def test_a_leaf_below_the_rank_of_its_layer_is_an_error():
    model = equinox.nn.Linear(2, 3, key=jax.random.key(0))
    rule = units.of_model(model)
    assert rule(("weight",), leaf(3, 2)) == (1,)
    with pytest.raises(ValueError, match=r"rank 2 or more at weight, got shape \(3,\)"):
        rule(("weight",), leaf(3))


def test_runs_of_one_name_are_told_apart_by_their_paths(run, tmp_path, capsys):
    other = tmp_path / "other" / run.name
    other.parent.mkdir()
    other.write_text(run.read_text())
    assert main(["watch", str(run), str(other), "--once"]) == 0
    assert f"other/{run.name}" in capsys.readouterr().out


def test_a_limit_that_is_no_number_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        main(["plot", str(run), "--limit", "nan"])
    assert "expected a finite number such as 1.0, got 'nan'" in capsys.readouterr().err


def test_a_suggestion_names_a_rule_where_a_fixed_limit_does_not_fit():
    drifting = np.geomspace(1, 1e-3, 4000)
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=4000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "if you train longer and the norms keep falling, use " in str(
            clipx.suggest_threshold(drifting * noise)
        )


def test_what_is_not_known_of_a_model_goes_by_its_name():
    rule = units.of_model(equinox.nn.Linear(2, 3, key=jax.random.key(0)))
    assert rule(("head", "weight"), leaf(3, 2)) == (1,)


def test_bfloat16_inside_of_a_compiled_function_is_found():
    @jax.jit
    def narrow_loss(params, x):
        narrow = params["w"].astype(jnp.bfloat16) * x.astype(jnp.bfloat16)
        return jnp.sum(narrow.astype(jnp.float32))

    from optax_clipx.per_example._sums import _is_narrow

    params = {"w": jnp.ones(2)}
    assert _is_narrow(lambda x: narrow_loss(params, x), jnp.ones(2))
    assert not _is_narrow(lambda x: jax.jit(loss)(params, x), jnp.ones(2))


def test_root_mean_squares_of_examples():
    params = {"w": jnp.zeros(2), "b": jnp.zeros(2)}
    batch = {"w": jnp.array([[3.0, 4.0]]), "b": jnp.full((1, 2), 1e-3)}

    def linear(params, x):
        return jnp.sum(params["w"] * x["w"]) + jnp.sum(params["b"] * x["b"])

    groups = clipx.measures.group_norms(lambda path, leaf: path[0], ord="rms")
    for measure, size, limit in (
        (groups, 2, 0.5 / np.sqrt(2)),  # each group has an equal share
        (clipx.measures.tree_norm(ord="rms"), 4, 0.5),
    ):
        run = jax.jit(per_example.clipped_grad(linear, 0.5, measure=measure))
        sums, _ = run(params, batch)
        rms = jnp.sqrt(jnp.sum(sums["w"] ** 2) / size)
        assert rms == pytest.approx(limit, rel=1e-5)


def test_a_limit_for_each_leaf_of_a_user_rule_on_the_whole_tree():
    rule = clipx.thresholds.Threshold(
        lambda n: (), lambda n, s, c: ({"w": 2.5, "b": 2.5}, s)
    )
    updates, _ = stepped(clipx.clip_by(clipx.measures.tree_norm(), rule))
    norm = jnp.sqrt(jnp.sum(updates["w"] ** 2) + jnp.sum(updates["b"] ** 2))
    assert norm == pytest.approx(2.5)


def test_limits_for_each_leaf_of_units_on_auto_axes():
    rule = clipx.thresholds.Threshold(
        lambda n: (), lambda n, s, c: ({"w": 2.5, "b": 0.5}, s)
    )
    tx = clipx.clip_by(clipx.measures.unit_norms(axis=0), rule)
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))):
        updates = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(GRADS)
    np.testing.assert_allclose(updates["w"], [1.5, 2.0], rtol=1e-6)


class Keyless:
    """A key that has none of the names JAX gives to keys."""

    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text


@jax.tree_util.register_pytree_with_keys_class
class Box:
    def __init__(self, value):
        self.value = value

    def tree_flatten_with_keys(self):
        return ((Keyless("inside"), self.value),), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def test_keys_of_other_kinds_are_shown_as_text():
    with pytest.raises(TypeError, match="inside"):
        stepped(clipx.clip(1.0), {"box": Box(jnp.arange(3))})


def test_whole_numbers_among_parameters_have_no_gradients():
    params = {"w": jnp.array([3.0, 4.0]), "size": 3}
    state = clipx.zclip().init(params)
    assert jnp.isfinite(clipx.metrics(state)["clip/norm"])


def test_a_followed_run_with_an_empty_line_and_one_without_steps(run):
    from optax_clipx.runs.live import Follower

    follower = Follower(run)
    assert len(follower.look()["step"]) == 50
    with run.open("a") as file:
        file.write("\n\n")
    assert len(follower.look()["step"]) == 50
    with run.open("a") as file:
        file.write('{"clip/norm": 1.0}\n')
    with pytest.raises(ValueError, match="--step NAME"):
        follower.look()


def test_watching_draws_again(run, monkeypatch):
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) > 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", wait)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    assert main(["watch", str(run), "--every", "0.5"]) == 0
    assert waits == [0.5] * 3


def test_pictures_of_a_run_that_says_nothing_of_clipping():
    seen = {"step": np.arange(9), "norm": np.ones(9), "threshold": np.full(9, 2.0)}
    assert clipx.plotting.norms(seen) is not None


def test_a_heatmap_of_one_value():
    history = {f"track_norms/{name}": np.full(9, 2.0) for name in "ab"}
    figure = clipx.plotting.heatmap({"step": np.arange(9)} | history)
    assert figure is not None


def test_a_tag_of_tensorboard_named_step(tmp_path):
    writer = pytest.importorskip("tensorboardX").SummaryWriter(str(tmp_path))
    for step in range(9):
        writer.add_scalar("step", 100 + step, step)
        writer.add_scalar("clip/norm", 1.0 + step, step)
    writer.close()
    history = clipx.History.load(tmp_path)
    assert history.steps.tolist() == list(range(9))


def test_a_history_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    history = clipx.History.load(run)
    path, before = run.parent / "again.jsonl", sorted(run.parent.iterdir())
    monkeypatch.setattr("os.replace", lambda *paths: os.stat("/nowhere"))
    with pytest.raises(FileNotFoundError):
        history.save(path)
    assert sorted(run.parent.iterdir()) == before


def shards_of(function, *, check, specs=None, out=None):
    """Manual over x; the mesh also has y, which is not bound inside."""
    specs, out = specs or P("x"), out or P("x")
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=specs,
            out_specs=out,
            check_vma=check,
            axis_names={"x"},
        )
    )


def test_moments_of_shards_must_be_told():
    """What is not finite on one device has to leave the moments of all as they are."""
    grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(2)}

    def step(grads, **options):
        tx = clipx.clip_by_second_moment(**options)
        return tx.update(grads, tx.init(grads))[0]

    with pytest.raises(ValueError, match="axis_name="):
        shards_of(step, check=False)(grads)
    told = functools.partial(step, axis_name="x")
    assert jnp.isfinite(shards_of(told, check=False)(grads)["w"]).all()


def test_a_matrix_in_shards_of_unknown_dimensions():
    tx = clipx.clip_by_spectral_norm(1.0)
    step = shards_of(lambda g: tx.update(g, tx.init(g))[0], check=True)
    with pytest.raises(ValueError, match=r"w cannot .* Pass specs="):
        step({"w": jnp.ones((4, 4))})


@pytest.mark.slow
@pytest.mark.parametrize("axis_name", [None, "x", ("x", "y")])
@pytest.mark.parametrize("check", [True, False])
def test_the_loss_of_all_devices(check, axis_name):
    tx = clipx.skip_spikes(optax.sgd(0.1), axis_name=axis_name)

    def step(grads, loss):
        updates, _ = tx.update(grads, tx.init(grads), grads, loss=loss[0])
        return updates

    grads = {"w": jnp.array([3.0, 4.0])}
    if not check and axis_name is None:
        with pytest.raises(ValueError, match="axis_name="):
            shards_of(step, check=check)(grads, jnp.array([1.0, 3.0]))
        return
    updates = shards_of(step, check=check)(grads, jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(updates["w"], -0.1 * grads["w"])


@pytest.mark.parametrize("by_type", [True, False])
def test_units_that_a_named_axis_has_whole(by_type):
    specs = {"w": P(None, None), "bias": P()}
    tx = clipx.clip_by(
        clipx.measures.unit_norms(
            axis=lambda path, leaf: (0,) if leaf.ndim == 2 else ()
        ),
        1.0,
        specs=specs,
    )
    weights = jnp.array([[3.0, 0.3], [4.0, 0.4]])

    def step(grads):
        if by_type:  # says of equal copies that they may differ
            grads = jax.tree.map(lambda x: vary(x, ("x",)), grads)
        updates, state = tx.update(grads, tx.init(grads))
        updates = jax.tree.map(lambda x: x[None], updates)
        return updates, state.metrics.norm

    out = P("x") if by_type else P(None)
    updates, norm = shards_of(step, check=True, specs=(specs,), out=(out, P()))(
        {"w": weights, "bias": jnp.array(0.5)}
    )
    np.testing.assert_allclose(updates["w"][0], [[0.6, 0.3], [0.8, 0.4]], rtol=1e-6)
    assert norm == pytest.approx(jnp.sqrt(jnp.sum(weights**2) + 0.25))


@MESH_OF_TRACED
def test_arrays_that_a_compiled_function_closes_over():
    mesh = jax.make_mesh((2,), ("x",))
    grads = {
        "w": jax.device_put(jnp.array([3.0, 4.0]), jax.NamedSharding(mesh, P("x")))
    }
    tx = clipx.clip_by_global_norm(1.0)
    state = jax.jit(lambda: tx.init(grads))()  # an update JAX refuses: no device set
    assert clipx.metrics(state)["clip/steps"] == 0


def test_metrics_of_as_many_entries_as_devices_on_each_device():
    from optax_clipx._clipping.metrics import _is_replicated

    mesh = jax.make_mesh((2,), ("x",))
    whole = jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, P()))
    assert not _is_replicated(whole)
    assert _is_replicated(jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, P("x"))))


def test_a_state_is_no_metrics():
    state = clipx.clip_by_global_norm(1.0).init(GRADS)
    with pytest.raises(TypeError, match=r"optax_clipx\.metrics\(opt_state\)"):
        clipx.History().append(0, (state,))
