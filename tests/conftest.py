"""Strict settings for every test: eight devices, no silent promotion, checked types."""

import functools
import gc
import itertools
import os
import warnings

import pytest

# Most of the time of a test is LLVM's, for programs that run once on few numbers: these
# flags leave a seventh of it. `XLA_FLAGS= python -m pytest` takes XLA's own settings.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
WHOLE = bool(os.environ.get("OPTAX_CLIPX_WHOLE"))


def pytest_configure(config):
    """Prepares each process that runs tests, and not the one that distributes them."""
    options = config.option
    distributes = getattr(options, "dist", "no") != "no" and not options.collectonly
    if hasattr(config, "workerinput") or not distributes:
        gc.disable()  # until the tests are collected
        strict_settings()
        keep_programs(config.cache.mkdir("xla"))
        share_contexts()
        check_annotations()


def strict_settings():
    """Eight devices, no silent promotion, and what compiles quickly."""
    import jax

    flags = QUICK
    if jax.__version_info__ < (0, 11):  # later ones stop at a flag they do not know
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", flags)  # read where a program is first compiled
    if not hasattr(jax, "enable_x64"):  # before JAX 0.8
        from jax.experimental import enable_x64

        jax.enable_x64 = enable_x64
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def keep_programs(folder):
    """Keeps compiled programs for all workers: many tests compile the same ones."""
    import jax
    from jax._src.lru_cache import LRUCache

    def put_in_one_piece(cache, key, program):
        """Another worker never reads a part of what is being written."""
        path = cache.path / f"{key}-cache"
        part = path.with_name(f"{os.getpid()}-part")
        part.write_bytes(program)
        part.replace(path)

    LRUCache.put = put_in_one_piece
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def share_contexts():
    """Lowers a hundred programs in one context of MLIR: making one takes 5 ms."""
    from jax._src.interpreters import mlir

    make, programs = mlir.make_ir_context, itertools.count()
    latest = functools.lru_cache(maxsize=1)(lambda hundred: make())
    mlir.make_ir_context = lambda: latest(next(programs) // 100)


def check_annotations():
    """Imports the package so that types and shapes are checked at each call."""
    from typechecker import hook

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import chex  # noqa: F401  (warns on import under some versions)
        import flax  # noqa: F401

    with hook("optax_clipx"):
        import optax_clipx  # noqa: F401


def pytest_collection_finish():
    """Nothing that was imported is garbage: no collection looks at it again."""
    gc.freeze()
    gc.enable()


def pytest_runtest_teardown(item, nextitem):
    """Nor at what JAX keeps of the programs of a file whose tests are over."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(config, items):
    """Marks what `one_in` leaves out of the usual run, and of the slow one."""
    tables = {}
    for item in items:
        if item.get_closest_marker("one_in") and not item.get_closest_marker("slow"):
            tables.setdefault((item.path, item.originalname), []).append(item)
    for table in tables.values():
        mark = table[0].get_closest_marker("one_in")
        (every,) = mark.args
        for i, item in enumerate(table):
            if i % every:
                item.add_marker(pytest.mark.slow)
                if i % every != every // 2 and mark.kwargs.get("rest") != "slow":
                    item.add_marker(pytest.mark.whole)
    left_out = {x for x in items if x.get_closest_marker("whole") and not WHOLE}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [x for x in items if x not in left_out]


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
