"""Strict settings for every test: eight devices, no silent promotion, checked types."""

import warnings

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import chex  # noqa: F401  (warns on import under some versions)
    import flax  # noqa: F401

with install_import_hook("optax_clipx", "beartype.beartype"):
    import optax_clipx  # noqa: F401
