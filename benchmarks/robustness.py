"""What adaptive methods do when something goes wrong, next to the published rules.

Each method sees the same sequences of norms: usual ones (a deviation of 10%) for 150
steps, then a fault. The published rules are transcribed here in plain Python from their
formulas, with the faults of their codes left in: no guard against NaN, no floor, no
patience. tests/methods/test_adaptive_methods.py has ours equal to traces of those codes
where nothing goes wrong.

    python benchmarks/robustness.py --output docs/results/robustness
"""

import argparse
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

import optax_clipx as clipx

LONG = 20_000  # how many steps a new level is waited for
PLACES = 100  # of the single spike, at each of the first steps
AFTER = 300  # steps after it, in which a method may be blind
PROBE = 20.0  # a spike that must be seen
Run = Callable[[np.ndarray], np.ndarray]  # from norms to norms after clipping


class Method(NamedTuple):
    """A method: of this package or published, what it does, and where it is blind.

    `blind` has one more entry than norms: whether the probe would pass instead of each
    of them, and after them.
    """

    kind: str
    run: Run
    blind: Run


def ours(make: Callable[[], Any], kind: str = "ours") -> Method:
    """A transformation, stepped over gradients of one entry."""

    def clip(tx: Any, norm: Any, state: Any) -> Any:
        clipped, state = tx.update(norm[None], state, norm[None])
        return jnp.abs(clipped[0]), state

    @jax.jit
    def outs(norms: Any) -> Any:
        tx = make()

        def step(state: Any, norm: Any) -> Any:
            probed, _ = clip(tx, jnp.float32(PROBE), state)
            clipped, state = clip(tx, norm, state)
            return state, (clipped, probed)

        return lax.scan(step, tx.init(jnp.zeros(1)), norms)[1]

    def run(norms: np.ndarray) -> np.ndarray:
        return np.asarray(outs(jnp.asarray(norms, jnp.float32))[0], np.float64)

    def blind(norms: np.ndarray) -> np.ndarray:
        _, probed = outs(jnp.asarray([*norms, 1.0], jnp.float32))
        return passes(np.asarray(probed))

    return Method(kind, run, blind)


def published(rule: Callable[[], Iterator[float]]) -> Method:
    """A generator that is sent a norm and yields the norm after clipping."""

    def run(norms: np.ndarray) -> np.ndarray:
        clipped = rule()
        next(clipped)
        with np.errstate(all="ignore"):
            return np.array([clipped.send(np.float64(n)) for n in norms])

    def blind(norms: np.ndarray) -> np.ndarray:
        # A generator cannot be asked and go on, so that each answer is a run of its
        # own: every tenth step is asked, and stands for the nine after it.
        asked = range(0, len(norms) + 1, 10)
        answers = [run(np.append(norms[:i], PROBE))[-1] for i in asked]
        return passes(np.repeat(answers, 10)[: len(norms) + 1])

    return Method("published", run, blind)


def passes(probed: np.ndarray) -> np.ndarray:
    """Whether probes are neither clipped nor skipped."""
    return probed > 0.999 * PROBE


def zclip_published() -> Any:
    """ZClip: z 2.5, decay .97, warm-up 25, reciprocal."""
    first: list[Any] = []
    mean = var = out = np.float64(0)
    while True:
        n = yield out
        out = n
        if len(first) < 25:
            first.append(n)
            mean, var = np.mean(first), np.var(first)
            continue
        z = (n - mean) / (np.sqrt(var) + 1e-6)
        x = mean + 2.5**2 / z * np.sqrt(var) if z > 2.5 else n
        out = n * x / (n + 1e-6) if z > 2.5 else n
        mean = 0.97 * mean + 0.03 * x
        var = 0.97 * var + 0.03 * (x - mean) ** 2


def autoclip_published() -> Any:
    """AutoClip: the tenth percentile of all norms."""
    kept: list[Any] = []
    out = np.float64(0)
    while True:
        n = yield out
        kept.append(n)
        limit = np.percentile(kept[-2000:], 10)  # all of them are too slow here
        out = n * min(1.0, limit / (n + 1e-6)) if np.isfinite(limit) else n * limit


def adagc_published() -> Any:
    """AdaGC: ratio 1.04, decay .99, threshold 1 in the first 100 steps."""
    t, g, out = 0, np.float64(math.inf), np.float64(0)
    while True:
        n = yield out
        t += 1
        if t <= 100:
            out = n * np.minimum(1.0, 1.0 / (n + 1e-6))
            g = np.minimum(g, out)
        else:
            out = n * np.minimum(1.0, 1.04 * g / (n + 1e-6))
            g = 0.99 * g + 0.01 * out


def growth_published() -> Any:
    """Fira: at most 1.01 times the last norm."""
    last, out = None, np.float64(0)
    while True:
        n = yield out
        out = n if last is None or n <= 1.01 * last else 1.01 * last
        last = out


def log_zscore_published() -> Any:
    """Chorowski et al.: decay .95, two deviations of the logarithm."""
    t, m, s, out = 0, np.float64(0), np.float64(0), np.float64(0)
    while True:
        n = yield out
        b = min(0.95, t / (t + 1))
        t += 1
        value = np.log(n + 1e-8)
        m, s = b * m + (1 - b) * value, b * s + (1 - b) * value**2
        limit = np.exp(m + 2 * np.sqrt(max(1e-8, s - m * m)))
        out = n if n < limit else n * np.exp(m) / n


def window_published() -> Any:
    """Levanter: three deviations above the mean of the last 128, from the 64th on."""
    kept: list[Any] = []
    out = np.float64(0)
    while True:
        n = yield out
        limit = np.float64(math.inf)
        if len(kept) >= 64:
            limit = np.mean(kept[-128:]) + 3 * max(np.std(kept[-128:]), 1e-6)
        out = n * np.minimum(1.0, limit / n)
        kept.append(n)


def skip_window_published() -> Any:
    """OLMo-core and MaxText: skip six deviations above the mean of the last 128."""
    kept: list[Any] = []
    out = np.float64(0)
    while True:
        n = yield out
        fits = True
        if len(kept) >= 64:
            fits = n - np.mean(kept[-128:]) <= 6 * np.std(kept[-128:])
        out = n if fits else np.float64(0)
        kept.append(n)


def skip_average_published() -> Any:
    """Skip above 20 times a moving average that accepted steps alone feed."""
    average, out = np.float64(1), np.float64(0)
    while True:
        n = yield out
        fits = n <= 20 * average
        out = n if fits else np.float64(0)
        average = 0.99 * average + 0.01 * n if fits else average


def apply_if_finite() -> Any:
    """Optax's own wrapper."""
    return optax.apply_if_finite(optax.identity(), max_consecutive_errors=5)


def zero(method: Any, *args: Any, **options: Any) -> Callable[[], Any]:
    """A method of ours that zeroes what is not finite."""
    return functools.partial(method, *args, nonfinite="zero", **options)


METHODS: dict[str, Method] = {
    "zclip": ours(zero(clipx.zclip)),
    "zclip, stats='skip'": ours(zero(clipx.zclip, stats="skip")),
    "zclip, patience=20": ours(zero(clipx.zclip, patience=20)),
    "ZClip": published(zclip_published),
    "quantile_clip": ours(zero(clipx.quantile_clip)),
    "quantile_clip, window=100": ours(zero(clipx.quantile_clip, window=100)),
    "AutoClip": published(autoclip_published),
    "auto_clip": ours(zero(clipx.auto_clip)),
    "quantile_clip(0.9), tracker": ours(
        zero(clipx.quantile_clip, 0.9, estimator="tracker")
    ),
    "quantile_clip(0.9), window=100": ours(zero(clipx.quantile_clip, 0.9, window=100)),
    "adagc": ours(zero(clipx.adagc)),
    "adagc, patience=20": ours(zero(clipx.adagc, patience=20)),
    "AdaGC": published(adagc_published),
    "olmo_ratio_clip(1.5)": ours(zero(clipx.olmo_ratio_clip, 1.5)),
    "norm_growth_clip": ours(zero(clipx.norm_growth_clip)),
    "norm_growth_clip, patience=20": ours(zero(clipx.norm_growth_clip, patience=20)),
    "Fira's limiter": published(growth_published),
    "log_zscore_clip": ours(zero(clipx.log_zscore_clip)),
    "Chorowski et al.": published(log_zscore_published),
    "historical_update_clip": ours(zero(clipx.historical_update_clip)),
    "Levanter's clip_update_norm": published(window_published),
    "clip_by_spectral_norm, quantile(0.9, window=100)": ours(
        zero(clipx.clip_by_spectral_norm, clipx.thresholds.quantile(0.9, window=100))
    ),
    "clip_by_second_moment, AdamWClip": ours(
        zero(clipx.clip_by_second_moment, 9.0, debias=True, warmup_steps=1)
    ),
    "clip_by_second_moment, ADOPT": ours(
        zero(
            clipx.clip_by_second_moment,
            lambda k: jnp.sqrt(k.astype(jnp.float32)),
            decay=0.9999,
            init="first",
            stats="raw",
            floor=1e-6,
            warmup_steps=1,
        )
    ),
    "skip_spikes": ours(lambda: clipx.skip_spikes(optax.identity())),
    "skip, window of 128": published(skip_window_published),
    "skip, fed by accepted steps": published(skip_average_published),
    "optax.apply_if_finite": ours(apply_if_finite, "published"),
}


def usual(number: int = 150, seed: int = 0) -> np.ndarray:
    """Norms of a run that goes well."""
    return 1 + 0.1 * np.random.default_rng(seed).normal(size=number)


def with_tail(*tail: Any) -> np.ndarray:
    """Usual norms, and then these."""
    return np.concatenate([usual(), *[np.atleast_1d(t) for t in tail]])


def after_one(bad: float) -> Callable[[Run], str]:
    """The spike that comes 20 steps after a norm that is not finite."""

    def test(run: Run) -> str:
        out = run(with_tail(bad, usual(20, 1), 1000.0))
        if not np.isfinite(out[-1]):
            return "NaN for good"
        lost = int(np.sum(out[151:171] < 0.2))
        verdict = "clips" if out[-1] < 100 else "**off**"
        return f"{verdict}, {lost} steps lost" if lost else verdict

    return test


def tiny_bump(run: Run) -> str:
    """After 200 equal norms comes a norm that is 0.1% larger: whether it is clipped."""
    out = run(np.concatenate([np.ones(200), [1.001]]))
    changed = abs(out[-1] / 1.001 - 1) > 1e-4 and abs(out[-2] - 1) < 1e-3
    return "clipped" if changed else "left alone"


def one_spike(run: Run) -> str:
    """The norm that remains of a norm of 1000."""
    return f"{run(with_tail(1000.0))[-1]:.3g}"


def second_spike(run: Run) -> str:
    """Two norms of 50 come four steps apart: the norm that remains of the second."""
    return f"{run(with_tail(50.0, usual(3, 1), 50.0))[-1]:.3g}"


def new_level(run: Run) -> str:
    """From one step on, all norms are 30 times as high.

    This is the number of steps until half of such a norm remains after clipping.
    """
    out = run(with_tail(30 * usual(LONG, 1)))[150:]
    passed = np.nonzero(out > 15)[0]
    return f"{passed[0]}" if len(passed) else f"**> {LONG:,}**"


def first_norm(run: Run) -> str:
    """The norm that remains of a norm of 10, if the first norm of the run was 25."""
    out = run(np.concatenate([[25.0], usual(200, 1), [10.0]]))
    return f"{out[-1]:.3g}"


def blindness(method: Method) -> str:
    """How long a spike at the start hides later spikes, in steps.

    One norm of the first 100 is 200 times the usual norm. Blind are those of the next
    300 steps in which a norm of 20 would be neither clipped nor skipped. This is done
    for each place of the spike; the table has the largest number. For published rules,
    every tenth step is tried.
    """
    norms = usual(PLACES + AFTER)
    longest = 0
    for place in range(PLACES):
        spiked = norms.copy()
        spiked[place] *= 200
        after = method.blind(spiked)[place + 1 : place + 1 + AFTER]
        longest = max(longest, int(np.sum(after)))
    return f"**>= {AFTER}**" if longest >= AFTER else f"{longest}"


def zeros(run: Run) -> str:
    """The part of a usual norm that remains after 300 steps with zero gradients."""
    out = run(np.concatenate([np.zeros(300), usual(200, 1)]))
    late = np.median(out[-20:])
    return f"{late:.2g}" if np.isfinite(late) else "NaN"


COLUMNS = {
    "after one NaN": after_one(np.nan),
    "after one inf": after_one(np.inf),
    "constant, then +0.1%": tiny_bump,
    "x1000": one_spike,
    "second of two x50": second_spike,
    "steps to adapt to x30": new_level,
    "10 after a first 25": first_norm,
    "1 after zeros": zeros,
}
BLIND = "steps blind after x200"


def row(method: Method) -> dict[str, str]:
    """The cells of a method."""
    cells = {column: test(method.run) for column, test in COLUMNS.items()}
    return {"kind": method.kind, **cells, BLIND: blindness(method)}


def markdown(table: dict[str, dict[str, str]]) -> str:
    """The table, with a line for each method."""
    lines = [
        f"| method | | {' | '.join((*COLUMNS, BLIND))} |",
        "|---|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for name, row in table.items():
        cells = [row[c] for c in ("kind", *COLUMNS, BLIND)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    tests = {**COLUMNS, BLIND: blindness}
    notes = [f"- **{name}**: {test_doc(test)}" for name, test in tests.items()]
    return "\n".join([*lines, "", *notes, ""])


def test_doc(test: Any) -> str:
    """What a column shows."""
    if test.__doc__:
        return " ".join(test.__doc__.split())
    return "A norm of 1000 comes 20 steps later: whether it is clipped."


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    table = {name: row(method) for name, method in tqdm(METHODS.items(), unit="method")}
    print(markdown(table))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(table, indent=1))
        options.output.with_suffix(".md").write_text(markdown(table))


if __name__ == "__main__":
    main()
