"""Runs for a diagnosis: healthy ones, and the same with one fault planted."""

import numpy as np


def smooth_noise(rng, count, memory=0.9):
    """Noise that remembers: standard deviation 1, as batches from a shuffled file."""
    white = rng.normal(size=count) * np.sqrt(1 - memory**2)
    found = np.empty(count)
    last = rng.normal()
    for i in range(count):
        last = memory * last + white[i]
        found[i] = last
    return found


def healthy(rng, count=1000, noise=0.2, drift=0.0, memory=0.0, floor=0.5):
    """A loss that falls, norms with noise and drift, and a threshold that clips 10%."""
    time = np.arange(count)
    logs = noise * rng.normal(size=count) + drift * time / count
    logs += 0.5 * noise * smooth_noise(rng, count, memory) if memory else 0
    logs += 1.5 * np.exp(-time / (count / 60))  # the start
    norm = np.exp(logs)
    loss = floor + 2 * np.exp(-time / (count / 5)) + 0.03 * rng.normal(size=count)
    return {
        "step": time,
        "loss": loss,
        "clip/norm": norm,
        "clip/threshold": np.full(count, np.quantile(norm[count // 10 :], 0.9)),
        "track/update_norm": 0.01 * np.exp(0.1 * rng.normal(size=count)),
        "learning_rate": np.full(count, 1e-3),
        "skip/skipped": np.zeros(count),
    }


def with_leaves(rng, norms, count=1000, noise=0.2):
    """A healthy run with a leaf for each name, of about that norm."""
    run = healthy(rng, count, noise)
    squares = 0.0
    for name, norm in norms.items():
        run[f"track_norms/{name}"] = norm * np.exp(noise * rng.normal(size=count))
        squares = squares + run[f"track_norms/{name}"] ** 2
    run["clip/norm"] = np.sqrt(squares)
    run["clip/threshold"][:] = np.quantile(run["clip/norm"], 0.9)
    return run


LAYERS = {f"layers/{i}/{kind}": 1.0 + 0.1 * i for i in range(6) for kind in ("w", "b")}


def spikes(rng):
    run = healthy(rng)
    steps = np.sort(100 * rng.permutation(9)[:3] + 70 + rng.integers(0, 25, 3))
    run["clip/norm"][steps] *= rng.uniform(8, 100, 3)
    return run, steps


def periodic_spikes(rng):
    run = healthy(rng)
    period = int(rng.integers(40, 130))
    steps = np.arange(int(rng.integers(20, 60)), 990, period)
    run["clip/norm"][steps] *= rng.uniform(8, 30, len(steps))
    return run, steps


def level_shift(rng):
    run = healthy(rng)
    step = int(rng.integers(200, 800))
    run["clip/norm"][step:] *= float(rng.choice([0.25, 0.5, 2.0, 4.0, 16.0]))
    return run, [step]


def growing_norms(rng):
    run = healthy(rng)
    start, end = int(rng.integers(300, 500)), int(rng.integers(800, 950))
    growth = np.log(rng.uniform(20, 200)) * np.arange(1000 - start) / (end - start)
    run["clip/norm"][start:] *= np.exp(growth)
    run["loss"][end:] += np.linspace(0.2, 5, 1000 - end)
    return run, [start]


def loss_diverged(rng):
    run = healthy(rng)
    step = int(rng.integers(400, 900))
    run["loss"][step:] += np.minimum(0.5 * np.arange(1, 1001 - step), 3.0)
    return run, [step]


def nonfinite(rng):
    run = healthy(rng)
    step = int(rng.integers(100, 900))
    for name in ("clip/norm", "loss"):
        run[name][step:] = np.nan
    return run, [step]


def update_before_loss(rng):
    run = healthy(rng)
    step = int(rng.integers(200, 800))
    run["track/update_norm"][step : step + 10] *= 5.0
    run["loss"][step + 4 : step + 60] += 2.0 * np.exp(-np.arange(56) / 15)
    return run, [step]


def lock_out(rng):
    run = healthy(rng)
    step = int(rng.integers(200, 800))
    run["skip/skipped"][step:] = 1.0
    run["clip/norm"][step:] *= 1.3
    return run, [step]


def rises_with_schedule(rng):
    run = healthy(rng)
    rate = 0.5 * (1 + np.cos(np.pi * np.arange(1000) / 1000)) + 0.02
    run["learning_rate"] = 1e-3 * rate
    run["clip/norm"] *= rate ** -rng.uniform(0.3, 0.6)
    return run, [0]


def warmup_spike(rng):
    run = healthy(rng)
    step = int(rng.integers(3, 60))
    run["clip/norm"][step] *= rng.uniform(50, 500)
    norm, limit = run["clip/norm"], run["clip/threshold"]
    mean = norm[0]
    for i in range(1000):
        mean = 0.98 * mean + 0.02 * norm[i] if i > step else max(mean, norm[i])
        limit[i] = 2 * mean
    return run, [step]


def always_clipped(rng):
    run = healthy(rng)
    run["clip/threshold"][:] = 0.2
    return run, [0]


def never_clipped(rng):
    run = healthy(rng)
    run["clip/threshold"][:] = 100.0
    return run, [0]


def dominant_leaf(rng):
    return with_leaves(rng, LAYERS | {"embed": rng.uniform(15, 100)}), [0]


def starved_leaves(rng):
    run = with_leaves(rng, LAYERS | {"embed": rng.uniform(50, 200)})
    run["clip/threshold"][:] = 5.0
    return run, [0]


def dead_leaf(rng):
    run = with_leaves(rng, LAYERS)
    step = int(rng.integers(200, 900))
    run["track_norms/layers/3/w"][step:] = 0.0
    return run, [step]


def vanishing_by_depth(rng):
    factor = rng.uniform(2.8, 6.0)
    return with_leaves(rng, {f"layers/{i}/w": factor**i for i in range(8)}), [0]


def exploding_by_depth(rng):
    factor = rng.uniform(2.8, 6.0)
    return with_leaves(rng, {f"layers/{i}/w": factor**-i for i in range(8)}), [0]


def restarts(rng):
    run = healthy(rng)
    step = int(rng.integers(200, 800))
    again = np.concatenate([np.arange(step + 50), np.arange(step, 1000)])
    return {name: values[again] for name, values in run.items()}, [step]


FAULTS = {
    "spikes": spikes,
    "periodic-spikes": periodic_spikes,
    "level-shift": level_shift,
    "growing-norms": growing_norms,
    "loss-diverged": loss_diverged,
    "nonfinite": nonfinite,
    "update-before-loss": update_before_loss,
    "lock-out": lock_out,
    "rises-with-schedule": rises_with_schedule,
    "warmup-spike": warmup_spike,
    "always-clipped": always_clipped,
    "never-clipped": never_clipped,
    "dominant-leaf": dominant_leaf,
    "starved-leaves": starved_leaves,
    "dead-leaf": dead_leaf,
    "vanishing-by-depth": vanishing_by_depth,
    "exploding-by-depth": exploding_by_depth,
    "restarts": restarts,
}


def falling(rng):
    return healthy(rng, drift=-np.log(4))


def rising(rng):
    return healthy(rng, drift=np.log(3))


def noisy(rng):
    return healthy(rng, noise=0.6)


def remembering(rng):
    return healthy(rng, noise=0.3, memory=0.95)


def heavy_tailed(rng):
    run = healthy(rng, noise=0.0)
    run["clip/norm"] *= np.exp(0.3 * rng.laplace(size=1000))
    run["clip/threshold"][:] = np.quantile(run["clip/norm"][100:], 0.9)
    return run


def policy_gradient(rng):
    """A surrogate loss around zero that says nothing of progress."""
    run = healthy(rng, noise=0.5)
    run["loss"] = 0.1 * rng.normal(size=1000)
    return run


def surrogate(rng):
    """A surrogate loss that goes back to zero as the policy gets sure."""
    run = healthy(rng)
    fall = np.exp(-(((np.arange(1000) - 400) / 200) ** 2))
    run["loss"] = -0.5 * fall + 0.03 * rng.normal(size=1000)
    return run


def plateau(rng):
    """A loss that stays for long, then falls in tens of steps, with higher norms."""
    run = healthy(rng)
    left = 1 / (1 + np.exp(-(np.arange(1000) - 500) / 20))
    run["loss"] = 2.3 - 1.8 * left + 0.03 * rng.normal(size=1000)
    run["clip/norm"] *= 1 + 2 * np.exp(-(((np.arange(1000) - 500) / 40) ** 2))
    run["clip/threshold"][:] = np.quantile(run["clip/norm"][100:], 0.9)
    return run


def short(rng):
    return healthy(rng, count=60)


def layered(rng):
    return with_leaves(rng, LAYERS)


HEALTHY = {
    "quiet": healthy,
    "falling": falling,
    "rising": rising,
    "noisy": noisy,
    "remembering": remembering,
    "heavy-tailed": heavy_tailed,
    "policy gradient": policy_gradient,
    "surrogate": surrogate,
    "plateau": plateau,
    "short": short,
    "layered": layered,
}
