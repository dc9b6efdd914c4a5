"""Every public transformation, for the suites that run over all of them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import optax_clipx as clipx

partial = functools.partial


def by_axes(path, leaf):
    """A label for each leaf, for trees of any structure and with any names."""
    return "even" if jnp.ndim(leaf) % 2 == 0 else "odd"


NORM_METHODS = {
    "clip_by_leaf_norm": clipx.clip_by_leaf_norm,
    "clip_by_leaf_norm_batched": functools.partial(
        clipx.clip_by_leaf_norm, batch_axes=lambda path, leaf: 0 if leaf.ndim else None
    ),
    "clip_by_leaf_norm_inf": functools.partial(clipx.clip_by_leaf_norm, ord=jnp.inf),
    "clip_by_block_rms": clipx.clip_by_block_rms,
    "clip_by_global_norm": clipx.clip_by_global_norm,
    "clip_by_global_norm_1": functools.partial(clipx.clip_by_global_norm, ord=1),
    "clip_by_global_norm_3": functools.partial(clipx.clip_by_global_norm, ord=3),
    "clip_by_group_norm": lambda limit, **options: clipx.clip_by_group_norm(
        {"even": limit, "odd": limit}, by_axes, **options
    ),
    "unit_norms": lambda limit, **options: clipx.clip_by(
        clipx.measures.unit_norms(), limit, **options
    ),
}
ELEMENT_METHODS = {
    "clip": clipx.clip,
    "clip_by_value": lambda limit, **options: clipx.clip_by_value(
        -limit, limit, **options
    ),
}
RESPONSES = {
    f"tree_{response.__name__}": functools.partial(
        lambda limit, response, **options: clipx.clip_by(
            clipx.measures.tree_norm(), limit, response, **options
        ),
        response=response,
    )
    for response in (
        clipx.responses.normalize,
        clipx.responses.smooth,
        clipx.responses.drop,
        clipx.responses.biweight,
    )
}
RELATIVE_METHODS = {"adaptive_grad_clip": clipx.adaptive_grad_clip}
ALL_METHODS = {**NORM_METHODS, **ELEMENT_METHODS, **RESPONSES, **RELATIVE_METHODS}
# Each with a warm-up so short that it clips in a few steps.
TRACKED_QUANTILE = partial(clipx.quantile_clip, 0.9, estimator="tracker")
ADAPTIVE = {
    "zclip": partial(clipx.zclip, warmup_steps=3),
    "zclip_mean": partial(clipx.zclip, warmup_steps=3, mode="mean", max_norm=50.0),
    "zclip_skip_leaf": partial(clipx.zclip, warmup_steps=3, stats="skip", scope="leaf"),
    "auto_clip": clipx.auto_clip,
    "quantile_clip": clipx.quantile_clip,
    "quantile_clip_window_leaf": partial(clipx.quantile_clip, window=5, scope="leaf"),
    "quantile_clip_all": partial(clipx.quantile_clip, max_steps=9, max_norm=30.0),
    "adagc": partial(clipx.adagc, warmup_steps=3),
    "adagc_tree": partial(clipx.adagc, warmup_steps=3, scope="tree", init="mean"),
    "olmo_ratio_clip": partial(clipx.olmo_ratio_clip, 1.1),
    "log_zscore_clip": clipx.log_zscore_clip,
    "tracked_quantile": TRACKED_QUANTILE,
    "tracked_quantile_units": partial(
        TRACKED_QUANTILE, scope=clipx.measures.unit_norms()
    ),
    "quantile_clip_middle": partial(clipx.quantile_clip, 0.5, window=4),
    "norm_growth_clip": clipx.norm_growth_clip,
    "norm_growth_group": partial(
        clipx.norm_growth_clip, scope=clipx.measures.group_norms(by_axes)
    ),
    "historical_update_clip": partial(
        clipx.historical_update_clip, window=6, warmup_steps=3
    ),
    "group_band": lambda **options: clipx.clip_by(
        clipx.measures.leaf_norms(),
        clipx.thresholds.group_band(0.5, 2.0),
        clipx.responses.normalize,
        **options,
    ),
    "warmup_minimum_scaled": lambda **options: clipx.clip_by(
        clipx.measures.tree_norm(),
        clipx.thresholds.warmup(
            3.0,
            then=clipx.thresholds.minimum(
                clipx.thresholds.scaled(clipx.thresholds.quantile(0.5), 2.0), 9.0
            ),
            steps=2,
        ),
        **options,
    ),
}
STATELESS = {
    "smooth_clip": partial(clipx.smooth_clip, 1.0, p=2.0),
    "normalize_by_norm": partial(clipx.normalize_by_norm, 2.0, eps=1e-6),
}
MOMENTS = {
    "clip_by_second_moment": partial(clipx.clip_by_second_moment, 4.0, warmup_steps=1),
    "clip_by_second_moment_raw": partial(
        clipx.clip_by_second_moment,
        4.0,
        warmup_steps=1,
        init="first",
        stats="raw",
        response=partial(clipx.responses.smooth, p=2.0),
    ),
    "scale_by_acclip": clipx.scale_by_acclip,
    "scale_by_acclip_1.5": partial(clipx.scale_by_acclip, alpha=1.5),
    "mixed_clip": partial(clipx.mixed_clip, 0.5, decay=0.5),
    "stabilize_norm": clipx.stabilize_norm,
    "scale_by_stable_adam": clipx.scale_by_stable_adam,
    "clip_by_spectral_norm": partial(clipx.clip_by_spectral_norm, 0.5),
    "clip_by_spectral_norm_soft": partial(
        clipx.clip_by_spectral_norm, 0.5, form="soft", method="newton_schulz"
    ),
}


def in_optimizer(**options):
    """A clipper and a momentum, for the wrappers of an optimizer."""
    return optax.chain(clipx.clip_by_global_norm(0.1, **options), optax.trace(0.9))


def has_few_axes(path, leaf):
    return jnp.ndim(leaf) < 2


def labels_by_axes(tree):
    """Labels as `optax.partition` takes them."""

    def label(leaf):
        return "few" if getattr(leaf, "ndim", 2) < 2 else "many"

    return jax.tree.map(label, tree)


def by_rule(rule, measure=None):
    measure = clipx.measures.tree_norm() if measure is None else measure
    return lambda **options: clipx.clip_by(measure, rule, **options)


WRAPPERS = {
    "error_feedback": lambda **options: clipx.error_feedback(
        clipx.clip_by_global_norm(0.1, **options)
    ),
    "error_feedback_adaptive": lambda **options: clipx.error_feedback(
        clipx.adagc(warmup_steps=3, **options)
    ),
    "cautious": lambda **options: clipx.cautious(
        optax.chain(
            clipx.clip_by_global_norm(0.1, **options), optax.sgd(1.0, momentum=0.9)
        ),
        **place(options),
    ),
    "excluding": lambda **options: clipx.excluding(
        clipx.clip_by_global_norm(0.1, **options), has_few_axes
    ),
    "excluding_labels": lambda **options: clipx.excluding(
        clipx.clip_by_global_norm(0.1, **options), labels_by_axes, label="few"
    ),
    "skip_spikes": lambda **options: clipx.skip_spikes(
        in_optimizer(**options), **place(options)
    ),
    "skip_spikes_zscore": lambda **options: clipx.skip_spikes(
        in_optimizer(**options),
        threshold=clipx.thresholds.zscore(
            4.0, warmup_steps=3, stats="skip", patience=5
        ),
        **place(options),
    ),
    "reset_moments": lambda **options: clipx.reset_moments(
        optax.chain(
            clipx.clip_by_second_moment(4.0, warmup_steps=1, **options),
            optax.trace(0.9),
        ),
        every=7,
        warmup=3,
    ),
    "track_norms": lambda **options: clipx.track_norms(
        in_optimizer(**options), ratios=True, **place(options)
    ),
    "track_norms_updates": lambda **options: clipx.track_norms(
        in_optimizer(**options), updates=True, second_moment=0.999, **place(options)
    ),
    "tap": lambda **options: clipx.tap(  # which asks for metrics
        in_optimizer(**{**options, "metrics": True}), lambda *report: None, every=2
    ),
    "track_norms_labels": lambda **options: clipx.track_norms(
        clipx.clip_by_global_norm(0.1, **options), labels=by_axes, **place(options)
    ),
}
OPTIMIZERS = {
    "stable_adamw": partial(clipx.stable_adamw, 1e-3),
    "normalized_momentum": clipx.normalized_momentum,
}
RULES = {
    "constant": by_rule(clipx.thresholds.constant(0.1)),
    "clip_by_spectral_norm_rule": partial(
        clipx.clip_by_spectral_norm, clipx.thresholds.ema_ratio(1.05)
    ),
    "magnitudes": by_rule(0.1, clipx.measures.magnitudes()),
    "norm_growth": by_rule(
        clipx.thresholds.norm_growth(1.05), clipx.measures.leaf_norms()
    ),
    "quantile_tracker": by_rule(
        clipx.thresholds.quantile_tracker(0.8), clipx.measures.leaf_norms()
    ),
    "follow_schedule": by_rule(
        clipx.thresholds.follow_schedule(
            0.1, lambda step: jnp.where(step < 2, 1.0, 0.5)
        )
    ),
    "rescaled_for_batch": by_rule(clipx.thresholds.rescaled_for_batch(0.2, 1, 4)),
    "relative_to_params": by_rule(
        clipx.thresholds.relative_to_params(0.1), clipx.measures.leaf_norms()
    ),
}


def place(options):
    """What a wrapper has to know of the mesh, too."""
    return {k: v for k, v in options.items() if k in ("axis_name", "specs")}


class Method(NamedTuple):
    """A public transformation as the suites see it.

    `make` takes `nonfinite`, `axis_name`, `specs` and `metrics`, and no other argument;
    of a wrapper `nonfinite` and `metrics` are those of the clipper inside. Every method
    works on any tree of arrays that has a leaf of less than two axes.

    `covers` are the names in the package that it stands for.
    """

    make: Callable[..., optax.GradientTransformation]
    covers: frozenset[str]
    complex: bool = True  # complex leaves are not an error
    forgets: bool = True  # nothing that is not finite stays in its state
    resets: bool = False  # its counts start again from time to time
    skips: bool = False  # it answers what is not finite with zeros, under any policy


REAL = {*MOMENTS, "clip_by_value", "stable_adamw", "reset_moments"} - {"mixed_clip"}
REAL |= {"clip_by_spectral_norm_rule"}
# Names that stand in a key together with others, or not at all.
ALSO = {
    "tree_normalize": ("normalize", "tree_norm", "clip_by"),
    "tree_smooth": ("smooth",),
    "tree_drop": ("drop",),
    "tree_biweight": ("biweight",),
    "constant": ("rescale",),
    "norm_growth": ("leaf_norms",),
    "norm_growth_group": ("group_norms",),
    "warmup_minimum_scaled": ("minimum", "scaled", "quantile"),
    "auto_clip": ("auto",),
    "adagc": ("ema_ratio",),
    "tracked_quantile": ("quantile_clip", "quantile_tracker"),
    "skip_spikes_zscore": ("zscore",),
}


PUBLIC = {
    name: value
    for module in (clipx, clipx.measures, clipx.thresholds, clipx.responses)
    for name, value in vars(module).items()
    if name in module.__all__
}


def _method(name, make):
    words = name.split("_")
    public = ["_".join(words[:i]) for i in range(len(words), 0, -1)]
    longest = [n for n in public if n in PUBLIC][:1]
    return Method(
        make,
        frozenset([*longest, *ALSO.get(name, ())]),
        complex=name not in REAL,
        forgets=name != "normalized_momentum",
        resets=name == "reset_moments",
        skips=name.startswith("skip_spikes"),
    )


# Every public transformation, rule, measure and response of the package, by name; a
# test fails if one is missing.
EVERY = {
    name: _method(name, make)
    for name, make in {
        **{name: partial(make, 0.1) for name, make in ALL_METHODS.items()},
        **ADAPTIVE,
        **STATELESS,
        **MOMENTS,
        **WRAPPERS,
        **OPTIMIZERS,
        **RULES,
    }.items()
}


def remembered(state):
    """What a state carries to later steps: all but what the last step measured."""

    def one(node):
        if isinstance(node, clipx.ClipMetrics):
            return node.steps, node.num_clipped, node.num_nonfinite
        if isinstance(node, clipx.TrackState):
            return remembered(node.inner), node.window
        return node

    kinds = (clipx.ClipMetrics, clipx.TrackState)
    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, kinds))


def clipped_norms(clipper, norms):
    """The norms after clipping, of gradients of one entry with these norms."""

    def step(state, norm):
        clipped, state = clipper.update(norm, state)
        return state, clipped

    norms = jnp.asarray(norms, jnp.float32)
    return jax.jit(lambda n: lax.scan(step, clipper.init(n[0]), n)[1])(norms)
