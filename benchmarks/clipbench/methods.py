"""The methods of clipping, with the number that each of them asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

import optax_clipx as clipx
from clipbench.earlier import first_auto_clip, power_auto_clip


@dataclass(frozen=True)
class Method:
    """A way to clip.

    Attributes:
        make: from the number to a transformation. A step whose gradients are not finite
            is dropped by all of them, so that rules are compared and not guards.
        numbers: the default of the paper first, then others nearby.
        asks_for: the name of the number; empty where there is none.
    """

    make: Callable[[Any], optax.GradientTransformation]
    numbers: tuple[float, ...]
    asks_for: str


def zeroing(method: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    """A method by its first argument."""
    return lambda number: method(number, nonfinite="zero", **options)


FIXED = "fixed limit"
FIRST_AUTO = "auto_clip, first design"
POWER_AUTO = "auto_clip, to the power 0.4"
# Of the median norm of the first gradients, so that no task is favoured by its units.
RELATIVE_LIMITS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

METHODS = {
    # Measures and changes nothing, also where nothing is finite.
    "none": Method(clipx.clip_by_global_norm, (float("inf"),), ""),
    FIXED: Method(zeroing(clipx.clip_by_global_norm), RELATIVE_LIMITS, "max_norm"),
    "fixed 1.0": Method(zeroing(clipx.clip_by_global_norm), (1.0,), ""),
    "auto_clip": Method(lambda number: clipx.auto_clip(nonfinite="zero"), (0.0,), ""),
    FIRST_AUTO: Method(first_auto_clip, (0.0,), ""),
    POWER_AUTO: Method(power_auto_clip, (0.0,), ""),
    "zclip": Method(zeroing(clipx.zclip), (2.5, 1.25, 5.0), "z_threshold"),
    "quantile_clip": Method(
        zeroing(clipx.quantile_clip), (0.1, 0.025, 0.4), "quantile"
    ),
    "adagc": Method(zeroing(clipx.adagc), (1.04, 1.01, 1.16), "ratio"),
    "quantile_clip, tracker": Method(
        zeroing(clipx.quantile_clip, estimator="tracker"), (0.9, 0.5, 0.98), "quantile"
    ),
    "log_zscore_clip": Method(
        zeroing(clipx.log_zscore_clip), (2.0, 1.0, 4.0), "z_threshold"
    ),
    "historical_update_clip": Method(
        zeroing(clipx.historical_update_clip), (3.0, 1.5, 6.0), "z_threshold"
    ),
    "norm_growth_clip": Method(
        zeroing(clipx.norm_growth_clip), (1.01, 1.001, 1.1), "ratio"
    ),
    "adaptive_grad_clip": Method(
        zeroing(clipx.adaptive_grad_clip), (0.01, 0.0025, 0.04), "clipping"
    ),
}


@dataclass(frozen=True)
class Optimizer:
    """What the clipped gradients go to.

    Attributes:
        make: from the learning rate to a transformation.
        rates: which are tried.
        per_norm: whether these are for gradients of norm 1: they are divided by the
            median norm of the first gradients.
    """

    make: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    per_norm: bool


OPTIMIZERS = {
    "sgd": Optimizer(optax.sgd, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), per_norm=True),
    "momentum": Optimizer(
        lambda rate: optax.sgd(rate, momentum=0.9),
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        per_norm=True,
    ),
    "adam": Optimizer(optax.adam, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), per_norm=False),
    "lion": Optimizer(
        optax.lion, (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03), per_norm=False
    ),
}
