"""Gradient clipping for JAX: right at any magnitude, and it says what it did."""

from importlib.metadata import version as _version

from . import (
    backward as backward,
    functional as functional,
    per_example as per_example,
    plotting as plotting,
    units as units,
)
from ._checkpoints import carry_over as carry_over
from ._clipping import clip_by as clip_by
from ._error_feedback import error_feedback as error_feedback
from ._excluding import excluding as excluding
from ._measures import (
    Measure as Measure,
    group_norms as group_norms,
    leaf_norms as leaf_norms,
    magnitudes as magnitudes,
    tree_norm as tree_norm,
    unit_norms as unit_norms,
)
from ._methods._auto import auto_clip as auto_clip
from ._methods._fixed import (
    adaptive_grad_clip as adaptive_grad_clip,
    clip as clip,
    clip_by_block_rms as clip_by_block_rms,
    clip_by_global_norm as clip_by_global_norm,
    clip_by_group_norm as clip_by_group_norm,
    clip_by_leaf_norm as clip_by_leaf_norm,
    clip_by_value as clip_by_value,
)
from ._methods._zscore import (
    historical_update_clip as historical_update_clip,
    log_zscore_clip as log_zscore_clip,
    zclip as zclip,
)
from ._methods._quantile import (
    autoclip as autoclip,
    quantile_clip as quantile_clip,
)
from ._methods._ratio import (
    adagc as adagc,
    norm_growth_limit as norm_growth_limit,
    olmo_ratio_clip as olmo_ratio_clip,
)
from ._methods._smooth import (
    normalize_by_norm as normalize_by_norm,
    smooth_clip as smooth_clip,
)
from ._metrics import (
    ClipMetrics as ClipMetrics,
    ClipState as ClipState,
    SkipState as SkipState,
    WatchState as WatchState,
    check as check,
    metrics as metrics,
)
from ._moments import (
    clip_spikes as clip_spikes,
    scale_by_acclip as scale_by_acclip,
)
from ._momentum import (
    mixed_clip as mixed_clip,
    normalized_momentum as normalized_momentum,
)
from ._responses import (
    drop as drop,
    normalize as normalize,
    rescale as rescale,
    smooth as smooth,
)
from ._spectral import clip_by_spectral_norm as clip_by_spectral_norm
from ._stabilizers import stabilize_norm as stabilize_norm
from ._stable_adam import (
    scale_by_stable_adam as scale_by_stable_adam,
    stable_adamw as stable_adamw,
)
from ._skipping import reset_moments as reset_moments, skip_spikes as skip_spikes
from .history import History as History
from ._suggesting import (
    Suggestion as Suggestion,
    suggest_threshold as suggest_threshold,
)
from ._watching import watch as watch
from ._sweeping import Sweep as Sweep, find_threshold as find_threshold
from .per_example import (
    per_example_global_norm_clip as per_example_global_norm_clip,
    per_example_layer_norm_clip as per_example_layer_norm_clip,
)
from ._thresholds._auto import auto_threshold as auto_threshold
from ._thresholds._base import Context as Context, Threshold as Threshold
from ._thresholds._constant import constant as constant
from ._thresholds._combine import (
    minimum as minimum,
    scaled as scaled,
    warmup as warmup,
)
from ._thresholds._ema_ratio import (
    ema_ratio as ema_ratio,
    group_band as group_band,
    norm_growth as norm_growth,
)
from ._thresholds._quantile import (
    quantile as quantile,
    quantile_tracker as quantile_tracker,
)
from ._thresholds._relative import relative_to_params as relative_to_params
from ._thresholds._zscore import zscore as zscore

__version__ = _version("optax_clipx")
