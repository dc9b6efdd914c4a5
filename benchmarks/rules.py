"""When do the newer rules help, and when do they not? Small trials, three seeds each.

Every trial trains a small network on scikit-learn's digits in situations that its
method is made for, and in others that it is not made for. Each cell (a trial, a
situation, a method) is written as soon as it is known, so that an interrupted run goes
on where it stopped. All take about ten minutes on one core.

    python benchmarks/rules.py --output docs/results --images docs/images
"""

import argparse
import functools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import optax_clipx as clipx
from optax_clipx.runs.drawing import rc, theme_of

SEEDS = 3
STEPS = 800
EVERY = 25  # steps from one held-out loss to the next
Tree = Any


class Situation(NamedTuple):
    """How the network is trained.

    `faults(key, gradients)` gives the gradients that the optimizer sees.
    """

    title: str
    batch: int = 64
    normalized: bool = False
    faults: Callable[[Any, Tree], Tree] = lambda key, grads: grads
    noise: float = 0.0  # the fraction of labels that are wrong
    bad: float = 0.0  # the fraction of batches of which all labels are drawn anew
    hidden: float = 0.0  # the fraction of pixels that are not seen: sparse gradients
    threshold: float = 1.0  # a little above the norms at the peak of the learning rate
    rate: float = 3e-3  # of Adam, at its peak
    before: int = 0  # the batch size that the threshold was chosen for


class Trial(NamedTuple):
    """A rule, where it should help and where not, and what stands beside it."""

    title: str
    situations: tuple[Situation, ...]
    methods: dict[str, Callable[[Situation], optax.GradientTransformation]]
    shows: str = "loss"  # what the picture shows: "loss" or "norm"
    norm_of: str = ""  # the method in whose run the norms are shown
    train: Callable[..., list[dict[str, Any]]] | None = None  # if not the usual way


@functools.cache
def digits() -> Any:
    """Training images and labels, and the held-out ones."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = (images[order] / 16 - 0.3).astype(np.float32)
    y = labels[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def init(key: Any) -> Tree:
    """Three layers."""
    sizes = (64, 32, 32, 10)
    keys = jax.random.split(key, 3)
    return [
        {"w": jax.random.normal(k, (i, o)) * np.sqrt(2 / i), "b": jnp.zeros(o)}
        for k, i, o in zip(keys, sizes, sizes[1:], strict=False)
    ]


def logits(params: Tree, x: Any, normalized: bool) -> Any:
    """The network; a layer norm makes the scale of the weights before it irrelevant."""
    for i, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        if normalized:
            x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)
        x = jax.nn.relu(x) if i < 2 else x
    return x * 3 if normalized else x


def batch_of(situation: Situation, key: Any) -> tuple[Any, Any, Any]:
    """A key for faults of the gradient, and the images and labels of a step."""
    x, y, _, _ = map(jnp.asarray, digits())
    draw, fault, wrong = jax.random.split(key, 3)
    chosen = jax.random.randint(draw, (situation.batch,), 0, len(x))
    other = jax.random.randint(wrong, (situation.batch,), 0, 10)
    is_wrong = jax.random.uniform(fault, (situation.batch,)) < situation.noise
    is_wrong |= jax.random.uniform(jax.random.fold_in(key, 7)) < situation.bad
    seen_pixels = jax.random.uniform(wrong, (1, 64)) >= situation.hidden
    images = jnp.where(seen_pixels, x[chosen], 0)
    return fault, images, jnp.where(is_wrong, other, y[chosen])


def train(situation: Situation, make: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """What happened in the run of each seed; all seeds train side by side."""
    tx = make(situation)
    _, _, x_test, y_test = map(jnp.asarray, digits())

    def loss_of(params: Tree, x: Any, y: Any) -> Any:
        found = logits(params, x, situation.normalized)
        return optax.softmax_cross_entropy_with_integer_labels(found, y).mean()

    def step(order: Any, carry: Any, number: Any) -> Any:
        params, state = carry
        fault, images, labels = batch_of(situation, jax.random.fold_in(order, number))
        grads = jax.grad(loss_of)(params, images, labels)
        grads = situation.faults(fault, grads)
        updates, state = tx.update(grads, state, params)
        read = clipx.metrics(state) if has_metrics(state) else {}
        seen = {
            "norm": optax.tree.norm(grads),
            "clipped": jnp.asarray(read.get("clip/clipped", jnp.nan)) > 0,
            "threshold": jnp.asarray(read.get("clip/threshold", jnp.nan)),
        }
        return (optax.apply_updates(params, updates), state), seen

    def block(order: Any, carry: Any, numbers: Any) -> Any:
        carry, seen = jax.lax.scan(functools.partial(step, order), carry, numbers)
        return carry, seen | {"loss": loss_of(carry[0], x_test, y_test)}

    def run(seed: Any) -> Any:
        start, order = jax.random.split(jax.random.key(seed))
        params = init(start)
        numbers = jnp.arange(STEPS).reshape(-1, EVERY)
        (params, _), seen = jax.lax.scan(
            functools.partial(block, order), (params, tx.init(params)), numbers
        )
        right = logits(params, x_test, situation.normalized).argmax(-1) == y_test
        return right.mean(), seen

    accuracy, seen = jax.jit(jax.vmap(run))(jnp.arange(SEEDS))
    return [
        summary(float(accuracy[i]), {k: np.ravel(v[i]) for k, v in seen.items()})
        for i in range(SEEDS)
    ]


def summary(accuracy: float, seen: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    fifth, often = STEPS // 5, EVERY // 5
    clipped = seen["clipped"].astype(float)
    return {
        "accuracy": accuracy,
        "loss": float(seen["loss"][-3:].mean()),
        "first": float(clipped[:fifth].mean()),
        "last": float(clipped[-fifth:].mean()),
        "series": {
            "loss": [float(f"{x:.4g}") for x in seen["loss"]],
            "norm": [float(f"{x:.4g}") for x in seen["norm"][::often]],
            "threshold": [float(f"{x:.4g}") for x in seen["threshold"][::often]],
        },
    }


def has_metrics(state: Any) -> bool:
    """Whether a clipper is in it."""
    is_clipper = lambda x: isinstance(x, clipx.ClipState)  # noqa: E731
    return any(map(is_clipper, jax.tree.leaves(state, is_leaf=is_clipper)))


def bad_batches(key: Any, grads: Tree) -> Tree:
    """In one step of fifty, a gradient of noise, ten times as long."""
    here = jax.random.uniform(key) < 0.02
    size = 10 * optax.tree.norm(grads)
    noise = optax.tree.random_like(key, grads, jax.random.normal)
    noise = optax.tree.scale(size / optax.tree.norm(noise), noise)
    return jax.tree.map(lambda g, n: jnp.where(here, n, g), grads, noise)


def rank_one(key: Any, grads: Tree) -> Tree:
    """In every fourth step, each matrix gets one singular value 30 times too large."""
    here = jax.random.uniform(key) < 0.25

    def spiked(number: int, g: Any) -> Any:
        if g.ndim != 2:
            return g
        one, other = jax.random.split(jax.random.fold_in(key, number))
        u, v = (
            jax.random.normal(one, g.shape[:1]),
            jax.random.normal(other, g.shape[1:]),
        )
        spike = jnp.outer(u / jnp.linalg.norm(u), v / jnp.linalg.norm(v))
        return jnp.where(here, g + 30 * jnp.linalg.norm(g) * spike, g)

    leaves, treedef = jax.tree.flatten(grads)
    return treedef.unflatten([spiked(i, g) for i, g in enumerate(leaves)])


def spikes(rate: float, signed: bool, key: Any, grads: Tree) -> Tree:
    """Some entries are 300 times the root mean square of their leaf."""

    def spiked(number: int, g: Any) -> Any:
        one, other = jax.random.split(jax.random.fold_in(key, number))
        here = jax.random.uniform(one, g.shape) < rate
        size = 300 * jnp.sqrt(jnp.mean(jnp.square(g)))
        sign = jnp.sign(jax.random.normal(other, g.shape)) if signed else 1.0
        return jnp.where(here, size * sign, g)

    leaves, treedef = jax.tree.flatten(grads)
    return treedef.unflatten([spiked(i, g) for i, g in enumerate(leaves)])


entries = functools.partial(spikes, 1e-3, True)  # one of a thousand
upward = functools.partial(spikes, 0.02, False)  # one of fifty, all positive


COSINE = optax.warmup_cosine_decay_schedule(0.0, 1.0, 40, STEPS, 0.01)
TREE = clipx.measures.tree_norm()


def decayed(clipper: Any, situation: Situation) -> optax.GradientTransformation:
    """SGD at a rate that decays to a hundredth; with weight decay, if normalized."""
    decay = 0.1 if situation.normalized else 0.0
    return optax.chain(clipper, optax.add_decayed_weights(decay), optax.sgd(COSINE))


def before_sgd(clipper: Any, rate: float = 0.1) -> optax.GradientTransformation:
    """SGD with momentum at a rate that decays."""
    schedule = optax.cosine_decay_schedule(rate, STEPS)
    return optax.chain(clipper, optax.sgd(schedule, momentum=0.9))


def before_adam(clipper: Any, **options: Any) -> optax.GradientTransformation:
    """Adam at a rate that decays."""
    schedule = optax.cosine_decay_schedule(3e-3, STEPS)
    return optax.chain(clipper, optax.adam(schedule, **options))


@functools.cache
def recorded(situation: Situation) -> tuple[float, float]:
    """A threshold and the noise scale, from a run of one seed without clipping.

    The threshold clips a tenth of the steps. The noise scale is that of the whole run.
    """

    def loss_of(params: Tree, x: Any, y: Any) -> Any:
        found = logits(params, x, situation.normalized)
        return optax.softmax_cross_entropy_with_integer_labels(found, y)

    grad_fn = clipx.per_example.clipped_grad(
        loss_of, jnp.inf, batch_argnums=(1, 2), reduction="mean", noise_scale=True
    )
    tx = before_sgd(optax.identity())

    def step(carry: Any, number: Any) -> Any:
        params, state = carry
        _, x, y = batch_of(situation, jax.random.fold_in(jax.random.key(99), number))
        grads, found = grad_fn(params, x, y)
        updates, state = tx.update(grads, state, params)
        read = clipx.per_example.metrics(found)
        seen = (
            optax.tree.norm(grads),
            read["examples/noise"],
            read["examples/signal"],
        )
        return (optax.apply_updates(params, updates), state), seen

    params = init(jax.random.key(99))
    run = jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(STEPS))[1])
    norms, noise, signal = run((params, tx.init(params)))
    return float(jnp.quantile(norms, 0.9)), float(noise.mean() / signal.mean())


def rescaled(situation: Situation, **options: Any) -> optax.GradientTransformation:
    """The threshold of a smaller batch, rescaled for this one."""
    threshold, noise_scale = recorded(situation._replace(batch=situation.before))
    if options.pop("measured", False):
        options["noise_scale"] = noise_scale
    rule = clipx.thresholds.rescaled_for_batch(
        threshold, situation.before, situation.batch, **options
    )
    return before_sgd(clipx.clip_by_global_norm(rule))


def tukey(stats: str) -> optax.GradientTransformation:
    """Entries above 4.685 times their usual size become zero."""
    return clipx.clip_by_second_moment(
        4.685**2,
        debias=True,
        warmup_steps=1,
        stats=stats,
        response=clipx.responses.biweight,
    )


def above_median(factor: float, response: Any) -> Callable[..., Any]:
    """SGD, before which norms far above their median are clipped."""
    median = clipx.thresholds.quantile(0.5, window=100)
    rule = clipx.thresholds.scaled(median, factor)
    return lambda s: before_sgd(clipx.clip_by(TREE, rule, response))


def adopt() -> optax.GradientTransformation:
    """ADOPT's clipping."""
    return clipx.clip_by_second_moment(
        jnp.sqrt, init="first", stats="raw", floor=1e-6, warmup_steps=1
    )


def spectra(clip: float) -> Callable[..., Any]:
    """Adam, whose updates are clipped by their singular values."""

    def make(situation: Situation) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, situation.rate, STEPS // 10, STEPS
        )
        during = clipx.thresholds.follow_schedule(clip, rate, power=-1, floor=1e-3)
        rule = clipx.thresholds.warmup(during, then=clip, steps=STEPS // 10)
        clipper = clipx.clip_by_spectral_norm(rule, form="soft", shape_factor=True)
        return optax.chain(
            optax.scale_by_adam(), clipper, optax.scale_by_learning_rate(rate)
        )

    return make


def cautious(**options: Any) -> optax.GradientTransformation:
    """Adam, of which only entries that descend are applied."""
    return clipx.cautious(before_adam(optax.identity()), **options)


TRIALS = {
    "follow_schedule": Trial(
        "A threshold that follows the learning rate",
        (
            Situation(
                "normalized layers, weight decay",
                normalized=True,
                faults=bad_batches,
                noise=0.2,
                threshold=2.0,
            ),
            Situation("no normalization", faults=bad_batches, noise=0.2),
        ),
        {
            "no clipping": lambda s: decayed(clipx.clip_by_global_norm(jnp.inf), s),
            "fixed threshold": lambda s: decayed(
                clipx.clip_by_global_norm(s.threshold), s
            ),
            "follow_schedule": lambda s: decayed(
                clipx.clip_by(
                    TREE, clipx.thresholds.follow_schedule(s.threshold, COSINE)
                ),
                s,
            ),
            "auto_clip": lambda s: decayed(clipx.auto_clip(), s),
        },
        shows="norm",
        norm_of="follow_schedule",
    ),
    "batch_size": Trial(
        "A threshold for another batch size",
        (
            Situation(
                "from 8 to 64 examples in a batch",
                faults=bad_batches,
                noise=0.2,
                before=8,
            ),
            Situation(
                "from 64 to 512 examples in a batch",
                batch=512,
                faults=bad_batches,
                noise=0.2,
                before=64,
            ),
        ),
        {
            "no clipping": lambda s: before_sgd(clipx.clip_by_global_norm(jnp.inf)),
            "old threshold": lambda s: before_sgd(
                clipx.clip_by_global_norm(recorded(s._replace(batch=s.before))[0])
            ),
            "rescaled": rescaled,
            "rescaled, noise_scale": lambda s: rescaled(s, measured=True),
            "recorded again": lambda s: before_sgd(
                clipx.clip_by_global_norm(recorded(s)[0])
            ),
        },
        shows="norm",
        norm_of="recorded again",
    ),
    "cautious": Trial(
        "Cautious Adam",
        (
            Situation("batches of 256", batch=256),
            Situation("batches of 4, one label of five wrong", batch=4, noise=0.2),
            Situation("nine of ten pixels hidden in a batch of 8", batch=8, hidden=0.9),
        ),
        {
            "adam": lambda s: before_adam(optax.identity()),
            "cautious": lambda s: cautious(),
            "cautious, no cap": lambda s: cautious(max_factor=float("inf")),
        },
    ),
    "spectral_rule": Trial(
        "A spectral threshold that adapts",
        (
            Situation(
                "one singular value spikes in every fourth step", faults=rank_one
            ),
            Situation("no spikes"),
        ),
        {
            "no clipping": lambda s: before_sgd(clipx.clip_by_global_norm(jnp.inf)),
            "global norm, 1.0": lambda s: before_sgd(clipx.clip_by_global_norm(1.0)),
            "spectral, 1.0": lambda s: before_sgd(clipx.clip_by_spectral_norm(1.0)),
            "spectral, 0.1": lambda s: before_sgd(clipx.clip_by_spectral_norm(0.1)),
            "spectral, median of 50": lambda s: before_sgd(
                clipx.clip_by_spectral_norm(clipx.thresholds.quantile(0.5, window=50))
            ),
        },
    ),
    "biweight_norm": Trial(
        "Norms that are outliers set to zero, or to their threshold",
        (
            Situation("one batch of ten has random labels", batch=16, bad=0.1),
            Situation("all labels are right, batches of 8", batch=8),
        ),
        {
            "no clipping": lambda s: before_sgd(clipx.clip_by_global_norm(jnp.inf)),
            "rescale, 3": above_median(3.0, clipx.responses.rescale),
            "drop, 3": above_median(3.0, clipx.responses.drop),
            "biweight, 4.685": above_median(4.685, clipx.responses.biweight),
        },
    ),
    "spectra": Trial(
        "SPECTRA: updates of Adam, clipped by their singular values",
        (
            Situation("learning rate 0.003, one label of five wrong", noise=0.2),
            Situation(
                "learning rate 0.05, one label of five wrong", noise=0.2, rate=0.05
            ),
            Situation(
                "learning rate 0.3, one label of five wrong", noise=0.2, rate=0.3
            ),
        ),
        {
            "adam": spectra(float("inf")),
            "SPECTRA, 10": spectra(10.0),
            "SPECTRA, 1": spectra(1.0),
        },
    ),
    "second_moment": Trial(
        "Entries against their second moment",
        (
            Situation("one entry of a thousand spikes", faults=entries),
            Situation("no spikes, batches of 8", batch=8),
        ),
        {
            "adam": lambda s: before_adam(clipx.clip_by_global_norm(jnp.inf)),
            "global norm, 1.0": lambda s: before_adam(clipx.clip_by_global_norm(1.0)),
            "SPAM's default": lambda s: before_adam(clipx.clip_by_second_moment()),
            "AdamWClip": lambda s: before_adam(
                clipx.clip_by_second_moment(9.0, debias=True, warmup_steps=1)
            ),
            "ADOPT": lambda s: before_adam(adopt()),
            "AdamWClip, smooth": lambda s: before_adam(
                clipx.clip_by_second_moment(
                    9.0,
                    debias=True,
                    warmup_steps=1,
                    response=functools.partial(clipx.responses.smooth, p=2.0),
                )
            ),
        },
    ),
    "biweight": Trial(
        "Outliers set to zero, or to their threshold",
        (
            Situation("one entry of a thousand spikes", faults=entries),
            Situation("no spikes, batches of 8", batch=8),
            Situation("one entry of fifty spikes upwards", faults=upward),
        ),
        {
            "adam": lambda s: before_adam(clipx.clip_by_global_norm(jnp.inf)),
            "rescale, 3": lambda s: before_adam(
                clipx.clip_by_second_moment(9.0, debias=True, warmup_steps=1)
            ),
            "biweight, 4.685": lambda s: before_adam(tukey("raw")),
            "biweight, stats=clipped": lambda s: before_adam(tukey("clipped")),
        },
    ),
}


def fill(known: Path, trials: dict[str, Trial]) -> dict[str, Any]:
    """The cells that are known, and those that are missing, one after the other."""
    cells: dict[str, Any] = {}
    if known.exists():
        lines = known.read_text().splitlines()
        cells = {cell["key"]: cell for cell in map(json.loads, lines)}
    wanted = [
        (f"{name} | {situation.title} | {method}", trial, situation, make)
        for name, trial in trials.items()
        for situation in trial.situations
        for method, make in trial.methods.items()
    ]
    for key, trial, situation, make in tqdm(wanted, unit="cell"):
        if key not in cells:
            runs = (trial.train or train)(situation, make)
            cells[key] = {"key": key, "runs": runs}
            with known.open("a") as file:
                file.write(json.dumps(cells[key]) + "\n")
    return cells


def of_seeds(cells: dict[str, Any], *key: str) -> list[dict[str, Any]]:
    """The runs of one method in one situation."""
    return cells[" | ".join(key)]["runs"]


def table(name: str, trial: Trial, cells: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds.

    The clip rate is the fraction of steps in which anything was clipped.
    """
    found = {
        (situation.title, method): of_seeds(cells, name, situation.title, method)
        for situation in trial.situations
        for method in trial.methods
    }
    clips = any(
        run["first"] + run["last"] > 0 for runs in found.values() for run in runs
    )
    names = ["situation", "method", "held-out loss", "accuracy"]
    names += ["clip rate, first fifth", "last fifth"] if clips else []
    lines = [f"| {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) - 2)]
    for key, runs in found.items():
        loss, accuracy, first, last = (
            np.array([run[k] for run in runs])
            for k in ("loss", "accuracy", "first", "last")
        )
        shown = [
            f"{loss.mean():.3g} ± {loss.std(ddof=1):.1g}"
            if np.isfinite(loss).all()
            else "training fails",
            f"{accuracy.mean():.1%} ± {accuracy.std(ddof=1):.1%}",
        ]
        shown += [f"{first.mean():.0%}", f"{last.mean():.0%}"] if clips else []
        lines.append(f"| {' | '.join((*key, *shown))} |")
    return "\n".join(lines) + "\n"


def draw(name: str, trial: Trial, cells: dict[str, Any], theme: str) -> Any:
    """Both situations side by side: the middle seed, and from the least to the most."""
    colours = theme_of(theme)
    figure, axes = plt.subplots(
        1, len(trial.situations), figsize=(8, 3.2), layout="constrained"
    )
    for ax, situation in zip(axes, trial.situations, strict=True):
        for number, method in enumerate(trial.methods):
            runs = of_seeds(cells, name, situation.title, method)
            thresholds = runs[0]["series"]["threshold"]
            if trial.shows == "norm" and not np.isfinite(thresholds).any():
                continue
            colour = colours.lines[number % len(colours.lines)]
            dashed = number >= 3  # of the later colours some are much alike
            line(ax, trial, runs, method, colour, colours, dashed)
        title = textwrap.fill(situation.title, 72 // len(trial.situations))
        ax.set_title(title, fontsize=9.5, fontweight="normal")
        ax.set(yscale="log", xlabel="step")
    axes[0].set_ylabel(
        "threshold and norm"
        if trial.shows == "norm"
        else "held-out loss\n(lower is better)"
    )
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    return figure


def line(
    ax: Any,
    trial: Trial,
    runs: list[Any],
    method: str,
    colour: str,
    colours: Any,
    dashed: bool,
) -> None:
    """One method in one panel."""
    style: dict[str, Any] = {"color": colour, "ls": "--" if dashed else "-"}
    if trial.shows == "norm":
        norms = np.array(runs[0]["series"]["norm"])
        steps = np.arange(len(norms)) * (EVERY // 5)
        if method == trial.norm_of:
            label = f"norm, with {method}"
            ax.plot(steps, norms, color=colours.lines[4], lw=0.8, label=label)
        threshold = np.array(runs[0]["series"]["threshold"])
        ax.plot(steps, threshold, lw=1.6, label=method, **style)
        return
    losses = np.array([run["series"]["loss"] for run in runs])
    steps = EVERY * (1 + np.arange(losses.shape[1]))
    ax.plot(steps, np.median(losses, axis=0), lw=1.4, label=method, **style)
    low, high = losses.min(axis=0), losses.max(axis=0)
    ax.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)


def main(trials: dict[str, Trial], description: str | None) -> None:
    """Runs what is missing, writes the tables and draws."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=trials, default=list(trials))
    parser.add_argument("--known", type=Path, default=Path("rules.jsonl"))
    parser.add_argument("--output", type=Path, help="where to write the tables")
    parser.add_argument("--images", type=Path, help="where to write the pictures")
    options = parser.parse_args()
    for folder in filter(None, (options.output, options.images)):
        folder.mkdir(parents=True, exist_ok=True)  # now, and not after ten minutes
    chosen = {name: trials[name] for name in options.only}
    cells = fill(options.known, chosen)
    for name, trial in chosen.items():
        text = table(name, trial, cells)
        print(f"{trial.title}\n\n{text}")
        if options.output:
            path = options.output / f"rules_{name}.md"
            path.write_text(text)
        for theme in ("light", "dark") if options.images else ():
            with plt.rc_context(rc(theme)):
                figure = draw(name, trial, cells, theme)
                figure.savefig(options.images / f"rules_{name}_{theme}.png", dpi=150)
                plt.close(figure)


if __name__ == "__main__":
    main(TRIALS, __doc__)
