"""Strict settings for every test: eight devices, no silent promotion, checked types."""

import os
import warnings

import jax
import pytest
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


FEW = 3  # a test with no more cases than this runs whole
SMALL = 8  # with no more than this, every other case is slow
SHARE = 10  # of the others every tenth case, and one more where slow tests run
WHOLE = bool(os.environ.get("OPTAX_CLIPX_WHOLE"))


def pytest_configure(config):
    """Keeps compiled programs, since many tests compile the same ones.

    Each worker has its own: JAX does not write them in one piece.
    """
    folder = config.cache.mkdir(f"xla-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(config, items):
    """Takes samples of large tables: the usual run a share, the slow one another."""
    cases = {}
    for item in items:
        if not any(map(item.get_closest_marker, ("slow", "sampled"))):
            cases.setdefault((item.path, item.originalname), []).append(item)
    for table in cases.values():
        for i, item in enumerate(table):
            share = SHARE if len(table) > SMALL else 2
            if len(table) > FEW and i % share:
                item.add_marker(pytest.mark.slow)
                complete = item.get_closest_marker("complete")
                if not complete and i % share != share // 2:
                    item.add_marker(pytest.mark.whole)
    left_out = [x for x in items if x.get_closest_marker("whole") and not WHOLE]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [x for x in items if x not in set(left_out)]


def pytest_terminal_summary(terminalreporter):
    """Says how much was fuzzed: steps, and faults among them."""
    counts = {"fuzzed_steps": 0, "injected_faults": 0}
    for report in terminalreporter.getreports("passed"):
        for name, number in report.user_properties:
            if name in counts:
                counts[name] += number
    if counts["fuzzed_steps"]:
        steps, faults = counts.values()
        terminalreporter.write_line(f"fuzzed {steps:,} steps with {faults:,} faults")
