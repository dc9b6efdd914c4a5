"""Gradient clipping for JAX: right at any magnitude, and it says what it did."""

import typing as _typing
from importlib.metadata import version as _version

from . import (
    backward as backward,
    functional as functional,
    history as history,
    measures as measures,
    per_example as per_example,
    plotting as plotting,
    qk as qk,
    responses as responses,
    thresholds as thresholds,
    units as units,
)

# Errors for functions that were not called
from ._clipping.uncalled import explain_missing_calls as _explain_missing_calls

# Switches for a whole program
from ._devices.config import config as config

# Clipping by value and norm
from ._methods.fixed import (
    adaptive_grad_clip as adaptive_grad_clip,
    clip as clip,
    clip_by_block_rms as clip_by_block_rms,
    clip_by_global_norm as clip_by_global_norm,
    clip_by_group_norm as clip_by_group_norm,
    clip_by_leaf_norm as clip_by_leaf_norm,
    clip_by_value as clip_by_value,
)
from ._clipping.clip_by import clip_by as clip_by

# Adaptive clipping
from ._methods.auto import auto_clip as auto_clip
from ._methods.quantile import quantile_clip as quantile_clip
from ._methods.ratio import (
    adagc as adagc,
    norm_growth_clip as norm_growth_clip,
    olmo_ratio_clip as olmo_ratio_clip,
)
from ._methods.smooth import (
    normalize_by_norm as normalize_by_norm,
    smooth_clip as smooth_clip,
)
from ._methods.zscore import (
    historical_update_clip as historical_update_clip,
    log_zscore_clip as log_zscore_clip,
    zclip as zclip,
)

# Matrices and moments
from ._methods.acclip import scale_by_acclip as scale_by_acclip
from ._methods.mixed import (
    mixed_clip as mixed_clip,
    normalized_momentum as normalized_momentum,
)
from ._methods.qk_clip import (
    qk_clip as qk_clip,
    qk_clip_updates as qk_clip_updates,
)
from ._methods.second_moment import clip_by_second_moment as clip_by_second_moment
from ._methods.spectral import clip_by_spectral_norm as clip_by_spectral_norm
from ._methods.stabilizers import stabilize_norm as stabilize_norm
from ._methods.stable_adam import (
    scale_by_stable_adam as scale_by_stable_adam,
    stable_adamw as stable_adamw,
)

# Wrappers of an optimizer or a clipper
from ._wrappers.carry_over import carry_over as carry_over
from ._wrappers.cautious import cautious as cautious
from ._wrappers.error_feedback import error_feedback as error_feedback
from ._wrappers.excluding import (
    excluding as excluding,
    muon_leaves as muon_leaves,
)
from ._wrappers.reset_moments import reset_moments as reset_moments
from ._wrappers.skip_spikes import (
    SkipReason as SkipReason,
    skip_spikes as skip_spikes,
)
from ._wrappers.dominance import dominant_leaf as dominant_leaf
from ._wrappers.reports import TapCounts as TapCounts, flush_taps as flush_taps
from ._wrappers.tap import tap as tap
from ._wrappers.track_norms import track_norms as track_norms

# What happened in a step
from ._clipping.metrics import (
    ClipMetrics as ClipMetrics,
    ClipState as ClipState,
    QKClipState as QKClipState,
    SkipState as SkipState,
    TrackState as TrackState,
    check as check,
    metrics as metrics,
)

# Gradients of single examples
from .per_example import (
    per_example_global_norm_clip as per_example_global_norm_clip,
    per_example_layer_norm_clip as per_example_layer_norm_clip,
)

# Recorded runs
from .runs.diagnosing import diagnose as diagnose
from .runs.diagnosis import Diagnosis as Diagnosis
from .runs.findings import Finding as Finding
from .runs.history import History as History
from .runs.rewinding import Rewind as Rewind
from .runs.suggesting import suggest_threshold as suggest_threshold
from .runs.suggestion import Suggestion as Suggestion
from .runs.sweeping import (
    Sweep as Sweep,
    find_threshold as find_threshold,
)

from ._trees.docstrings import complete_package as _complete_docstrings
from ._trees.names import missing as _missing

__version__ = _version("optax_clipx")

__all__ = [
    "ClipMetrics",
    "ClipState",
    "Diagnosis",
    "Finding",
    "History",
    "QKClipState",
    "Rewind",
    "SkipReason",
    "SkipState",
    "Suggestion",
    "Sweep",
    "TapCounts",
    "TrackState",
    "__version__",
    "adagc",
    "adaptive_grad_clip",
    "auto_clip",
    "backward",
    "carry_over",
    "cautious",
    "check",
    "clip",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_second_moment",
    "clip_by_spectral_norm",
    "clip_by_value",
    "config",
    "diagnose",
    "dominant_leaf",
    "error_feedback",
    "excluding",
    "find_threshold",
    "flush_taps",
    "functional",
    "historical_update_clip",
    "history",
    "log_zscore_clip",
    "measures",
    "metrics",
    "mixed_clip",
    "muon_leaves",
    "norm_growth_clip",
    "normalize_by_norm",
    "normalized_momentum",
    "olmo_ratio_clip",
    "per_example",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "plotting",
    "qk",
    "qk_clip",
    "qk_clip_updates",
    "quantile_clip",
    "reset_moments",
    "responses",
    "scale_by_acclip",
    "scale_by_stable_adam",
    "skip_spikes",
    "smooth_clip",
    "stabilize_norm",
    "stable_adamw",
    "suggest_threshold",
    "tap",
    "thresholds",
    "track_norms",
    "units",
    "zclip",
]

_explain_missing_calls(globals()[name] for name in __all__)


# What all clippers take is described once; `help()` and the site show it everywhere.
_complete_docstrings(globals())


def __dir__() -> list[str]:
    return __all__


if not _typing.TYPE_CHECKING:  # a type checker would let every name pass

    def __getattr__(name: str) -> object:
        raise _missing(name, __name__)
