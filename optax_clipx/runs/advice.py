"""What each finding says, what to do about it, and where that is explained."""

from typing import NamedTuple

PAGE = "docs/troubleshooting.md#"


class Advice(NamedTuple):
    """A sentence with the names of the evidence in it, a line to type, a place."""

    sentence: str
    line: str
    anchor: str


# The worse come first among findings of one severity.
ADVICE = {
    "nonfinite": Advice(
        "The first {value} is in {first_in}; {count} steps are not finite.",
        'clipx.clip_by_global_norm(1.0, nonfinite="raise")  # names the leaves',
        "loss-is-nan-after-n-steps",
    ),
    "loss-diverged": Advice(
        "The loss rises from its best level, {best}, to {end} at the end.",
        "optax.chain(clipx.auto_clip(), optax.adam(learning_rate / 3))",
        "the-loss-diverges",
    ),
    "growing-norms": Advice(
        "The norm grows to {factor} times; at step {warned} it had doubled.",
        "optax.chain(clipx.auto_clip(), optax.adam(learning_rate / 3))",
        "the-loss-diverges",
    ),
    "update-before-loss": Advice(
        "The updates grow {lead} steps before the loss does, {count} times.",
        "optax.chain(optax.adam(learning_rate), clipx.clip_by_global_norm(max_update))",
        "updates-grow-before-the-loss",
    ),
    "lock-out": Advice(
        "{in_a_row} steps in a row are skipped.",
        "clipx.skip_spikes(optimizer, patience=20)",
        "every-step-is-skipped",
    ),
    "spikes": Advice(
        "The norm is up to {factor} times its level; {count} spikes, {not_recovered}"
        " from which the loss did not recover.",
        "optax.chain(clipx.zclip(), optax.adam(learning_rate))",
        "gradient-norm-spikes",
    ),
    "periodic-spikes": Advice(
        "{count} spikes follow each other every {period} steps, of {factor} times the"
        " level.",
        "batch = batches[step % period]  # look at the data of these steps",
        "spikes-at-equal-distances",
    ),
    "level-shift": Advice(
        "The norm takes another level at once, {factors} times the one before.",
        "optax.chain(clipx.zclip(patience=20), optax.adam(learning_rate))",
        "the-gradient-norm-changes-at-one-step",
    ),
    "rises-with-schedule": Advice(
        "The norm rises to {factor} times while the learning rate falls to"
        " {learning_rate_factor} times.",
        "clipx.clip_by_global_norm(lambda step: max_norm * (schedule(step) / peak)"
        " ** -0.5)",
        "norms-rise-as-the-learning-rate-falls",
    ),
    "warmup-spike": Advice(
        "A norm of {norm} at the start leaves the threshold at {threshold}, far above"
        " the later norms of {later_norms}, for {blind_steps} steps.",
        "clipx.zclip(max_norm=10.0)",
        "an-early-spike-raises-the-threshold",
    ),
    "always-clipped": Advice(
        "{clip_rate:.1%} of the steps are clipped; the rule's target is {target}.",
        "clipx.suggest_threshold(history, clip_rate=0.1).value",
        "clip-rate-is-100",
    ),
    "never-clipped": Advice(
        "No step is clipped: the threshold is {threshold}, and 99% of the norms are"
        " below {high_norm}.",
        "clipx.suggest_threshold(history, clip_rate=0.1).value",
        "clip-rate-is-0",
    ),
    "dominant-leaf": Advice(
        "{leaf} has {share:.1%} of the squared norm.",
        'clipx.auto_clip(scope="leaf")',
        "one-layer-dominates-the-gradient-norm",
    ),
    "starved-leaves": Advice(
        "The steps of all other leaves are {factor} times smaller than without"
        " {starved_by}.",
        'clipx.auto_clip(scope="leaf")',
        "one-layer-dominates-the-gradient-norm",
    ),
    "dead-leaf": Advice(
        "There is no gradient in {leaves}.",
        "jax.tree.map(jnp.any, grads)  # False: the loss does not depend on it",
        "a-layer-has-no-gradient",
    ),
    "vanishing-by-depth": Advice(
        "The norm of {first} is {first_over_last} times that of {last}.",
        "x = x + layer(norm(x))  # a residual connection and a normalization",
        "gradients-vanish-or-explode-with-depth",
    ),
    "exploding-by-depth": Advice(
        "The norm of {first} is {first_over_last} times that of {last}.",
        'clipx.auto_clip(scope="leaf")',
        "gradients-vanish-or-explode-with-depth",
    ),
    "restarts": Advice(
        "The steps go back {count} times: {kind}.",
        "clipx.History(path, resume=True)",
        "the-steps-of-a-log-go-back",
    ),
}
