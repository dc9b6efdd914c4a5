"""Every line of "Coming from another library" does what the line beside it does."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "coming_from.md"
RNG = np.random.default_rng(0)
GRADS = {
    "kernel": RNG.normal(size=(5, 3)).astype(np.float32),
    "bias": RNG.normal(size=3).astype(np.float32),
}
PARAMS = {
    name: RNG.normal(size=x.shape).astype(np.float32) for name, x in GRADS.items()
}
BATCHED = {name: np.stack([x, 2 * x, 0.1 * x]) for name, x in GRADS.items()}
BY_HAND = {  # rows that a table cannot run: what tests them
    "error_if_nonfinite=True": "test_raising",
    "the norm that `clip_grad_norm_` returns": "test_the_norm_before",
    "tensor.register_hook(lambda g: g.clamp(-1, 1))": "test_hooks",
    "scaler.unscale_(optimizer)` before clipping": "test_unscaling",
    "clip_grad_norm_(model.head.parameters(), 1.0)": "test_a_part_of_the_parameters",
    "loss.backward()` of `k` micro-batches, then `clip_grad_norm_` and"
    " `optimizer.step()": "test_accumulation",
    "scaler.step(optimizer)`, which skips the step if the gradients"
    " overflowed": "test_an_overflow",
    "scaler.update()": "test_the_loss_scale_of_flax",
}


def rows():
    """The pairs of code in the tables."""
    table = re.findall(r"^\| (`.*|the .*) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return [(old.strip("`"), new.strip("`")) for old, new in table]


def ours(code, grads=None):
    """What the line makes of the gradients."""
    names = {"clipx": clipx, "optax": optax, "jnp": jnp, "batched": BATCHED}
    found = eval(code, names | {"grads": GRADS, "loss": linear})
    if not hasattr(found, "update"):
        return found
    grads = GRADS if grads is None else grads
    return found.update(grads, found.init(PARAMS), PARAMS)[0]


def linear(params, example):
    return sum(jnp.sum(params[name] * example[name]) for name in GRADS)


def scaled(tree, factor):
    return {name: x * np.float32(factor) for name, x in tree.items()}


def total(tree, ord=2):
    return np.linalg.norm(np.concatenate([x.ravel() for x in tree.values()]), ord)


def test_every_row_is_run_by_a_test():
    tested = {*OPTAX, *FORMULAS, *BY_HAND, *PRIVATE}
    assert {old for old, _ in rows()} == tested
    assert set(BY_HAND.values()) <= set(globals())


OPTAX = [old for old, _ in rows() if old.startswith("optax.")]


@pytest.mark.one_in(10, rest="slow")
@pytest.mark.parametrize("old", OPTAX)
@pytest.mark.filterwarnings("ignore:optax.*global_norm:DeprecationWarning")
def test_lines_of_optax(old):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = ours(old)
    found = ours(dict(rows())[old])
    if isinstance(found, tuple):  # the second of optax's counts otherwise
        theirs, found = theirs[0], found[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        found,
        theirs,
    )


def by_norm(limit, ord=2, eps=0.0):
    return scaled(GRADS, min(1.0, limit / (total(GRADS, ord) + eps)))


def by_leaf(limit):
    return {n: x * min(1.0, limit / np.linalg.norm(x)) for n, x in GRADS.items()}


def by_value(limit):
    return {name: np.clip(x, -limit, limit) for name, x in GRADS.items()}


MODEL = "model.parameters()"
FORMULAS = {
    f"clip_grad_norm_({MODEL}, 1.0)": lambda: by_norm(1.0, eps=1e-6),
    f"clip_grad_norm_({MODEL}, 1.0, norm_type=1)": lambda: by_norm(1.0, 1, 1e-6),
    f"clip_grad_norm_({MODEL}, 1.0, norm_type=torch.inf)": lambda: by_norm(
        1.0, np.inf, 1e-6
    ),
    f"clip_grad_value_({MODEL}, 0.5)": lambda: by_value(0.5),
    f"get_total_norm([p.grad for p in {MODEL}])": lambda: total(GRADS),
    "Adam(clipvalue=0.5)": lambda: by_value(0.5),
    "Adam(clipnorm=1.0)": lambda: by_leaf(1.0),
    "Adam(global_clipnorm=1.0)": lambda: by_norm(1.0),
}


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("old", FORMULAS)
def test_lines_with_a_formula(old):
    expected = FORMULAS[old]()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        ours(dict(rows())[old]),
        expected,
    )


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("old", [old for old in FORMULAS if MODEL in old])
def test_lines_of_torch_itself(old):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch.nn import utils

    model = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(torch.tensor(x)) for name, x in PARAMS.items()}
    )
    for name, x in GRADS.items():
        model[name].grad = torch.tensor(x)
    names = {"model": model, "torch": torch} | {
        n: getattr(utils, n)
        for n in ("clip_grad_norm_", "clip_grad_value_", "get_total_norm")
    }
    result = eval(old, names)
    found = ours(dict(rows())[old])
    if "get_total" in old:
        assert float(found) == pytest.approx(float(result), rel=1e-6)
        return
    for name in GRADS:
        np.testing.assert_allclose(found[name], model[name].grad.numpy(), rtol=1e-5)


PRIVATE = [old for old, _ in rows() if "private" in old or "jax_privacy" in old]


@pytest.mark.parametrize("old", PRIVATE)
def test_lines_of_private_training(old):
    with jax.numpy_rank_promotion("allow"):  # an example may come with its batch axis
        grads, _ = jax.jit(ours(dict(rows())[old]))(PARAMS, BATCHED)
    examples = [{n: x[i] for n, x in BATCHED.items()} for i in range(3)]
    if "per_layer" in old:
        limits = {"bias": 0.5, "kernel": 0.8}
        clipped = [
            {n: x * min(1.0, limits[n] / np.linalg.norm(x)) for n, x in e.items()}
            for e in examples
        ]
    else:
        clipped = [scaled(e, min(1.0, 1.0 / total(e))) for e in examples]
    for name in GRADS:
        expected = sum(e[name] for e in clipped)
        np.testing.assert_allclose(grads[name], expected, rtol=1e-5)


def test_raising():
    tx = clipx.clip_by_global_norm(1.0, nonfinite="raise")
    bad = GRADS | {"bias": np.full(3, np.nan, np.float32)}
    with pytest.raises(Exception, match="Non-finite"):
        jax.block_until_ready(tx.update(bad, tx.init(PARAMS))[0])


def test_the_norm_before():
    tx = clipx.clip_by_global_norm(1.0)
    _, state = tx.update(GRADS, tx.init(PARAMS))
    norm = clipx.metrics(state)["clip/norm"]
    assert float(norm) == pytest.approx(total(GRADS), rel=1e-6)


def test_hooks():
    x = jnp.asarray(GRADS["bias"])
    found = jax.grad(lambda x: jnp.sum(5 * clipx.backward.clip_value(x, -1.0, 1.0)))(x)
    np.testing.assert_array_equal(found, np.ones(3))


def test_unscaling():
    tx = clipx.clip_by_global_norm(1.0)
    scaled_up = scaled(GRADS, 2.0**10)
    unscaled = scaled(scaled_up, 2.0**-10)
    found, _ = tx.update(unscaled, tx.init(PARAMS))
    for name, x in by_norm(1.0).items():
        np.testing.assert_allclose(found[name], x, rtol=1e-6)


def test_a_part_of_the_parameters():
    mask = {"kernel": True, "bias": False}
    tx = optax.masked(clipx.clip_by_global_norm(1.0, eps=1e-6), mask)
    found, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    norm = np.linalg.norm(GRADS["kernel"])
    np.testing.assert_allclose(found["kernel"], GRADS["kernel"] / norm, rtol=1e-5)
    np.testing.assert_array_equal(found["bias"], GRADS["bias"])


def test_accumulation():
    """The clipped mean, which is the clipped sum of losses that are divided by 2."""
    inner = optax.chain(clipx.clip_by_global_norm(1.0, eps=1e-6), optax.sgd(1.0))
    tx = optax.MultiSteps(inner, 2)
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(GRADS, state, PARAMS)
        found, _ = tx.update(scaled(GRADS, 3), state, PARAMS)
    norm = 2 * total(GRADS)
    for name, grad in GRADS.items():
        np.testing.assert_allclose(found[name], -2 * grad / norm, rtol=1e-5)


def test_an_overflow():
    tx = clipx.skip_spikes(optax.adam(0.1), threshold=jnp.inf)
    bad = GRADS | {"bias": np.full(3, np.inf, np.float32)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        found, after = tx.update(bad, state, PARAMS)
    assert all((x == 0).all() for x in jax.tree.leaves(found))
    np.testing.assert_array_equal(
        optax.tree.get(after, "mu")["kernel"], optax.tree.get(state, "mu")["kernel"]
    )


def test_the_loss_scale_of_flax():
    dynamic_scale = pytest.importorskip("flax.training.dynamic_scale")
    scale = dynamic_scale.DynamicScale(scale=8.0, growth_interval=1)
    one = jnp.float32(1.0)
    for _ in range(2):
        scale, finite, _, _ = scale.value_and_grad(lambda x: x * x)(one)
    assert (bool(finite), float(scale.scale)) == (True, 16.0)
    scale, finite, _, _ = scale.value_and_grad(lambda x: x * jnp.inf)(one)
    assert (bool(finite), float(scale.scale)) == (False, 8.0)
