"""Thresholds: rules for how large a norm may be."""

from ._thresholds.auto import auto as auto
from ._thresholds.base import (
    Context as Context,
    Threshold as Threshold,
)
from ._thresholds.batch import (
    NoiseScale as NoiseScale,
    noise_scale as noise_scale,
    rescaled_for_batch as rescaled_for_batch,
)
from ._thresholds.combine import (
    minimum as minimum,
    scaled as scaled,
    warmup as warmup,
)
from ._thresholds.constant import constant as constant
from ._thresholds.ema_ratio import (
    ema_ratio as ema_ratio,
    group_band as group_band,
    norm_growth as norm_growth,
)
from ._thresholds.quantile import (
    quantile as quantile,
    quantile_tracker as quantile_tracker,
)
from ._thresholds.relative import relative_to_params as relative_to_params
from ._thresholds.schedule import follow_schedule as follow_schedule
from ._thresholds.zscore import zscore as zscore

__all__ = [
    "Context",
    "NoiseScale",
    "Threshold",
    "auto",
    "constant",
    "ema_ratio",
    "follow_schedule",
    "group_band",
    "minimum",
    "noise_scale",
    "norm_growth",
    "quantile",
    "quantile_tracker",
    "relative_to_params",
    "rescaled_for_batch",
    "scaled",
    "warmup",
    "zscore",
]
