"""Random trees, methods in wrappers, and gradients with faults: what always holds.

A configuration costs a compilation and a step next to nothing, so that each method is
drawn with one wrapper, tree, policy and limit, and Hypothesis searches among sequences
of gradients, which one compiled loop takes. No step depends on what came out of an
earlier one, so that a sequence is data, and a state machine would add nothing.

    OPTAX_CLIPX_FUZZ_SEED=1 OPTAX_CLIPX_FUZZ_ROUNDS=20 pytest tests/test_fuzz.py \
        -m "slow or not slow"

draws other configurations, 20 a method, and other sequences, and shortens what fails.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from all_methods import (
    ADAPTIVE,
    ALL_METHODS,
    ELEMENT_METHODS,
    EVERY,
    RULES,
    STATELESS,
    by_axes,
    remembered,
)
from fuzz_cases import (
    FAULTS,
    STEPS,
    Sequence,
    compiled,
    draw_config,
    gradients,
    is_measured,
    sequences,
)
from hypothesis import HealthCheck, Phase, given, seed, settings

import optax_clipx as clipx
from optax_clipx._wrappers.error_feedback import ErrorState

SEED = int(os.environ.get("OPTAX_CLIPX_FUZZ_SEED", 0))
ROUNDS = int(os.environ.get("OPTAX_CLIPX_FUZZ_ROUNDS", 1))
PHASES = (Phase.generate, Phase.shrink)[: 1 + ("OPTAX_CLIPX_FUZZ_SEED" in os.environ)]
USUAL = ("clip_by_global_norm", "unit_norms", "zclip", "skip_spikes")

TINY = float(np.finfo(np.float32).tiny)

# These change the updates by what their metrics say, and by nothing else.
PURE = {*ALL_METHODS, *ADAPTIVE, *STATELESS, *RULES, "clip_by_second_moment"}
PURE -= {"clip_by_spectral_norm_rule"}  # its norm is a singular value
ENTRIES = {*ELEMENT_METHODS, "magnitudes", "clip_by_second_moment"}
STRETCHING = {"tree_normalize", "normalize_by_norm", "group_band"}
SMOOTH = {
    "tree_smooth",
    "tree_biweight",
    "smooth_clip",
    "normalize_by_norm",
    "tree_normalize",
    "auto_clip",
}
ORDS = {
    "clip_by_leaf_norm_inf": np.inf,
    "clip_by_block_rms": "rms",
    "clip_by_global_norm_1": 1,
    "clip_by_global_norm_3": 3,
}
PASSING = (
    "itself",
    "track_norms",
    "excluding",
    "masked",
)  # wrappers that change nothing


def each_leaf(arrays, paths, ord):
    return [reference.norm([x], ord) for x in arrays if x.size]


def each_unit(arrays, paths, ord):
    axes = [reference.optax_unit_axes(x.shape) for x in arrays]
    pairs = zip(arrays, axes, strict=True)
    return [n for x, a in pairs if x.size for n in reference.unit_norms(x, a).flat]


def each_label(arrays, paths, ord):
    labels = [by_axes((), x) for x in arrays]
    return [
        reference.norm([x for x, of in zip(arrays, labels, strict=True) if of == label])
        for label in sorted(set(labels))
    ]


def each_entry(arrays, paths, ord):
    return [np.abs(reference._wide(x)).max() for x in arrays if x.size]


def whole(arrays, paths, ord):
    return [reference.norm(arrays, ord)]


def each_row(arrays, paths, ord):
    def axes(x):
        return tuple(range(1, x.ndim)) if x.ndim else ()

    return [n for x in arrays if x.size for n in reference.unit_norms(x, axes(x)).flat]


GROUPS = {
    "clip_by_leaf_norm": each_leaf,
    "clip_by_leaf_norm_inf": each_leaf,
    "clip_by_leaf_norm_batched": each_row,
    "clip_by_block_rms": each_leaf,
    "clip_by_global_norm": whole,
    "clip_by_global_norm_1": whole,
    "clip_by_global_norm_3": whole,
    "clip_by_group_norm": each_label,
    "unit_norms": each_unit,
    "clip": each_entry,
    "clip_by_value": each_entry,
    "magnitudes": each_entry,
    "constant": whole,
    "tree_normalize": whole,
    "tree_smooth": whole,
    "tree_drop": whole,
    "tree_biweight": whole,
    "smooth_clip": whole,
    "normalize_by_norm": whole,
    "mixed_clip": whole,
}
LIMITS = {"smooth_clip": 1.0, "normalize_by_norm": 2.0, "mixed_clip": 0.5}


class Seen:
    """One step: what came in, what came out, and what the state says."""

    def __init__(self, config, t, given, out, states):
        at = lambda tree: jax.tree.map(lambda x: x[t], tree)  # noqa: E731
        self.given = [x[t] for x in given]
        self.out = [x[t] for x in out]
        self.state = at(states)
        self.before = at(states) if t == 0 else jax.tree.map(lambda x: x[t - 1], states)
        chosen = [i for i, keep in enumerate(config.chosen) if keep]
        self.into = [self.given[i] for i in chosen]
        self.out_of = [self.out[i] for i in chosen]
        paths = [
            tuple(
                str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))))
                for k in keys
            )
            for keys, x in jax.tree_util.tree_leaves_with_path(config.tree)
            if is_measured(x)
        ]
        self.paths = [paths[i] for i in chosen]
        self.bad = not all(np.all(np.isfinite(wide(x))) for x in self.into)
        self.metrics = next(iter(metrics_in(self.state)))


def metrics_in(state):
    kinds = clipx.ClipMetrics
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return [x for x in leaves if isinstance(x, kinds)]


def wide(x):
    return np.asarray(x).astype(complex if np.iscomplexobj(x) else float)


def coarseness(arrays):
    """The rounding of the narrowest leaf, and of numbers near zero in all of them."""
    infos = [jnp.finfo(x.dtype) for x in arrays if x.size] or [jnp.finfo("float32")]
    eps = max(1e-6 if i.bits >= 32 else float(i.eps) for i in infos)
    # What is subnormal in float32 flushes to zero.
    tiny = max(TINY, *(float(i.smallest_subnormal) for i in infos))
    return eps, tiny * (sum(x.size for x in arrays) or 1)


def saturated(norm):
    return min(float(norm), float(np.finfo(np.float32).max))


def check_memory(config, seen):
    """Nothing that is not finite stays.

    Momenta of optax are looked at where they are fed what is finite and clipped.
    """
    method = EVERY[config.name]
    clippers = [
        s.rule if isinstance(s, clipx.ClipState | clipx.SkipState) else s.error
        for s in jax.tree.leaves(seen.state, is_leaf=is_rule)
        if is_rule(s)
    ]
    forgets = config.policy != "propagate" and method.forgets and not method.resets
    kept = [clippers]
    if forgets or method.skips or (config.outer == "skip_spikes" and not method.resets):
        kept.append(remembered(seen.state))
    for x in jax.tree.leaves(kept):
        assert np.all(np.isfinite(x)), seen.state


def is_rule(node):
    return isinstance(node, clipx.ClipState | clipx.SkipState | ErrorState)


def check_counts(config, seen, t, bad_so_far):
    """The counts of steps are those of an independent count."""
    metrics = seen.metrics
    if EVERY[config.name].resets or config.outer == "reset_moments":
        return
    assert metrics.steps == t + 1
    feeds_back = "error_feedback" in (config.name[:14], config.outer)
    if not feeds_back and config.name != "normalized_momentum":
        assert bool(metrics.nonfinite) == seen.bad
        assert metrics.num_nonfinite == bad_so_far
    more = metrics.num_clipped - metrics_in(seen.before)[0].num_clipped
    if t and config.name not in {"scale_by_acclip"}:
        assert more == (metrics.clipped > 0)


def check_norms(config, seen):
    """The norms in the metrics are those of what came in and went out."""
    if config.name not in PURE or config.outer not in PASSING or seen.bad:
        return
    ord = ORDS.get(config.name, 2)
    before, after = reference.norm(seen.into, ord), reference.norm(seen.out_of, ord)
    _, tiny = coarseness([x for x in seen.into if x.dtype.itemsize > 2])
    slack = 1e-5 * saturated(before) + tiny
    assert abs(float(seen.metrics.norm) - saturated(before)) <= slack
    eps, tiny = coarseness(seen.into)
    slack = 4 * eps * saturated(after) + tiny * 2
    if np.isfinite(float(after)):
        assert abs(float(seen.metrics.clipped_norm) - saturated(after)) <= slack


def check_response(config, seen):
    """Nothing grows or turns, and what is within its limit is not touched."""
    if config.name not in PURE or config.outer not in PASSING or seen.bad:
        return
    if config.name not in STRETCHING:
        for x, y in zip(seen.into, seen.out_of, strict=True):
            eps, tiny = coarseness([x])
            assert np.all(np.abs(wide(y)) * (1 - eps) <= np.abs(wide(x)) + tiny)
            turned = np.sign(wide(x)) * np.sign(wide(y)).conj()
            assert np.all(turned.real >= 0)
    if seen.metrics.clipped == 0 and config.name not in SMOOTH | STRETCHING:
        for x, y in zip(seen.into, seen.out_of, strict=True):
            if config.name in ENTRIES:  # XLA's clamp flushes subnormals
                assert np.all(np.abs(wide(x) - wide(y)) <= TINY)
            else:
                assert x.tobytes() == y.tobytes()


def check_limit(config, seen):
    """No group is above its limit after the step."""
    groups = GROUPS.get(config.name)
    if groups is None or config.outer not in PASSING or seen.bad or not seen.into:
        return
    limit = config.limit or LIMITS.get(config.name, 0.1)
    ord = ORDS.get(config.name, 2)
    eps, tiny = coarseness(seen.into)
    for norm in groups(seen.out_of, seen.paths, ord):
        assert float(norm) <= limit * (1 + eps) + tiny
    if config.name in SMOOTH | {"mixed_clip"}:
        return
    norms = np.array(groups(seen.into, seen.paths, ord), float)
    near = np.any(np.abs(norms - limit) < 1e-5 * limit)
    if config.name not in ENTRIES and norms.size and not near:
        share = np.mean(norms > limit)
        assert seen.metrics.clipped == pytest.approx(share, abs=1e-6)


def check_adaptive(config, seen):
    """The tree's norm is at most the limit that the rule gave."""
    if config.name not in {"zclip", "quantile_clip", "adagc_tree", "tracked_quantile"}:
        return
    if config.outer in PASSING and not seen.bad:
        eps, tiny = coarseness(seen.into)
        limit = float(seen.metrics.threshold)
        assert float(reference.norm(seen.out_of)) <= limit * (1 + eps) + tiny


def check_policy(config, seen):
    """What is not finite is answered as the policy says."""
    if not seen.bad or config.name not in PURE or config.outer not in PASSING:
        return
    values = [wide(x) for x in seen.out_of]
    if config.policy == "zero":
        assert not any(np.any(x) for x in values)
    elif config.policy == "sanitize":
        assert all(np.all(np.isfinite(x)) for x in values)
    elif config.name not in ELEMENT_METHODS and config.name != "magnitudes":
        assert all(np.all(np.isnan(x)) for x in values)


def check_skip(config, seen, t):
    """A skipped step gives zeros, and the state inside stays bit for bit."""
    if config.outer != "skip_spikes":
        return
    state, before = seen.state, seen.before
    assert state.skipped or not seen.bad
    assert (state.reason > 0) == state.skipped
    assert (state.consecutive_skips > 0) == state.skipped
    if t:
        assert state.num_skipped - before.num_skipped == state.skipped
    if t and state.skipped:
        assert not any(np.any(wide(x)) for x in seen.out)
        for x, y in zip(
            *map(jax.tree.leaves, (state.inner, before.inner)), strict=True
        ):
            assert x.tobytes() == y.tobytes()


def check_left_out(config, seen):
    """Leaves that a wrapper leaves out pass through bit for bit."""
    if config.outer not in ("excluding", "masked", "itself") or config.name not in PURE:
        return
    for keep, x, y in zip(config.chosen, seen.given, seen.out, strict=True):
        assert keep or x.tobytes() == y.tobytes()


def check_sequence(config, run, sequence):
    """All steps of one sequence."""
    given = gradients(config, sequence)
    out, states = run(given)
    bad_so_far = 0
    for t in range(STEPS):
        seen = Seen(config, t, given, out, states)
        bad_so_far += seen.bad
        try:
            check_memory(config, seen)
            check_counts(config, seen, t, bad_so_far)
            check_norms(config, seen)
            check_response(config, seen)
            check_limit(config, seen)
            check_adaptive(config, seen)
            check_policy(config, seen)
            check_skip(config, seen, t)
            check_left_out(config, seen)
        except AssertionError as error:
            error.add_note(
                f"step {t} ({sequence.steps[t]}) of {config}: {seen.metrics}"
            )
            raise


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in EVERY],
)
def test_sequences_with_faults(name, record_property):
    for number in range(ROUNDS):
        config = draw_config(name, SEED + number)
        has_float64 = any(x.dtype == np.float64 for x in config.params)
        with jax.enable_x64(has_float64):
            steps, faults = fuzz(config)
            record_property("fuzzed_steps", steps)
            record_property("injected_faults", faults)


def fuzz(config):
    """How many steps were checked, and how many faults were in them."""
    run, steps, faults = compiled(config), 0, 0

    @seed(SEED)
    @settings(
        max_examples=5,
        deadline=None,
        database=None,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
    @given(sequences)
    def search(sequence):
        nonlocal steps, faults
        steps += STEPS
        faults += sum(kind in FAULTS for kind, _ in sequence.steps)
        check_sequence(config, run, sequence)

    search()
    return steps, faults


def test_a_clipper_that_is_off_by_a_thousandth_is_found():
    drawn = draw_config("clip_by_global_norm", 0)
    chosen = [True] * len(drawn.params)
    config = drawn._replace(outer="itself", limit=1.0, chosen=chosen)
    usual = Sequence(0, [("usual", 0.0)] * STEPS)
    check_sequence(config, compiled(config), usual)
    with pytest.raises(AssertionError):
        check_sequence(config, compiled(config._replace(limit=1.001)), usual)
