"""The methods of clipping, the optimizers, and the settings they are compared in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from clipbench import methods as small

import optax_clipx as clipx

Transformation = optax.GradientTransformation
OPTIMIZERS = ("adamw", "muon")
DECAY = 0.1  # of the weights, in every run
B2 = 0.99
FIXED = small.FIXED


@dataclass(frozen=True)
class Method:
    """A way to clip.

    Attributes:
        around: from the number and the optimizer without its learning rate to the
            optimizer with clipping.
        numbers: the default first, then two others.
        asks_for: the name of the number; empty where there is none.
        optimizers: with which it can be used.
        slow: whether it has its default number alone, and its turn at the end.
    """

    around: Callable[[Any, Transformation], Transformation]
    numbers: tuple[float, ...] = (0.0,)
    asks_for: str = ""
    optimizers: tuple[str, ...] = OPTIMIZERS
    slow: bool = False


def first(make: Callable[[Any], Transformation]) -> Callable[..., Transformation]:
    """Clips the gradients, and gives them to the optimizer."""
    return lambda number, core: optax.chain(make(number), core)


def as_there(name: str) -> Method:
    """A method of clipbench."""
    there = small.METHODS[name]
    return Method(first(there.make), there.numbers, there.asks_for)


def spectral(number: Any) -> Transformation:
    """Each matrix has a quantile of its own last singular values as its threshold.

    Newton-Schulz in 12 steps: its error is 0.7% of a matrix's norm, and an SVD of all
    matrices takes 80 times as long as a step of training.
    """
    rule = clipx.thresholds.quantile(number, window=100)
    return clipx.clip_by_spectral_norm(
        rule, method="newton_schulz", steps=12, nonfinite="zero"
    )


def spam(number: Any, core: Transformation) -> Transformation:
    """SPAM; resets every 100 steps, as the default of 500 is longer than a run."""
    clipper = clipx.clip_by_second_moment(number, nonfinite="zero")
    return optax.chain(clipper, clipx.reset_moments(core, every=100, warmup=30))


def stable_adamw(number: Any, core: Transformation) -> Transformation:
    """StableAdamW in the place of AdamW."""
    scale = clipx.scale_by_stable_adam(b2=number, nonfinite="zero")
    return optax.chain(scale, *after_adam())


METHODS = {
    "none": as_there("none"),
    FIXED: Method(
        first(small.METHODS[FIXED].make), (1.0, 0.03, 0.1, 0.3, 3.0, 10.0), "max_norm"
    ),
    "auto_clip": as_there("auto_clip"),
    small.FIRST_AUTO: as_there(small.FIRST_AUTO),
    small.POWER_AUTO: as_there(small.POWER_AUTO),
    "quantile_clip": as_there("quantile_clip"),
    "zclip": as_there("zclip"),
    "adagc": as_there("adagc"),
    "skip_spikes": Method(lambda number, core: clipx.skip_spikes(core)),
    "SPAM": Method(spam, (5000.0, 500.0, 50.0), "theta"),
    "stabilize_norm": Method(
        first(lambda b3: clipx.stabilize_norm(b3=b3, nonfinite="zero")),
        (0.999, 0.99, 0.9),
        "b3",
    ),
    "stable_adamw": Method(stable_adamw, (B2, 0.95, 0.999), "b2", ("adamw",)),
    "adaptive_grad_clip": as_there("adaptive_grad_clip"),
    "spectral, quantile": Method(first(spectral), (0.9,), "quantile", slow=True),
}


def after_adam() -> tuple[Transformation, Transformation]:
    """The decay of the weights, and downhill."""
    return optax.add_decayed_weights(DECAY), optax.scale(-1.0)


def muon_matrices(params: Any) -> Any:
    """The matrices of the blocks; embeddings, head and gains have AdamW."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (
            optax.contrib.MuonDimensionNumbers()
            if path[0].key == "blocks" and np.ndim(x) == 2
            else None
        ),
        params,
    )


def core(optimizer: str) -> Transformation:
    """The optimizer at learning rate 1.

    Muon's updates have the RMS of AdamW's, so that one learning rate is for both.
    """
    if optimizer == "adamw":
        return optax.chain(optax.scale_by_adam(b2=B2), *after_adam())
    return optax.contrib.muon(
        1.0,
        weight_decay=DECAY,
        adam_weight_decay=DECAY,
        adam_b2=B2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_matrices,
    )


def optimizer_of(
    name: str, method: str, number: Any, rate: Any, steps: int
) -> Transformation:
    """The whole optimizer: linear warm-up in a tenth of the steps, then a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    return optax.chain(
        METHODS[method].around(number, core(name)),
        optax.scale_by_schedule(lambda count: rate * schedule(count)),
    )


class Setting(NamedTuple):
    """What the methods are compared in."""

    model: str
    optimizer: str
    data: str  # "clean" or "corrupt"


# The most important first.
SETTINGS = {
    "no norm": Setting("no norm", "adamw", "clean"),
    "no norm, corrupt batches": Setting("no norm", "adamw", "corrupt"),
    "QK-norm": Setting("pre-norm, QK-norm", "adamw", "clean"),
    "QK-norm, Muon": Setting("pre-norm, QK-norm", "muon", "clean"),
    "pre-norm": Setting("pre-norm", "adamw", "clean"),
}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
TRIED = (1.0, 0.1, float("inf"))  # thresholds with which a rate is tuned
