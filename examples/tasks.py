"""The tasks of exploding_gradients.py: networks, data and settings."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from image_sequences import Images, as_sequences
from jaxtyping import Array, Float
from sklearn.datasets import make_regression

# The threshold of each method for the recurrent networks. All but the last are in the
# unit of the gradients; the last is relative to the norm of the parameters.
RECURRENT_LIMITS = {"value": 0.01, "leaf": 0.3, "global": 0.3, "adaptive": 0.01}
REGRESSION_LIMITS = {"value": 1.0, "leaf": 10.0, "global": 10.0, "adaptive": 0.5}

# Chosen by trial, where clipping matters: row by row, 0.03 and 0.6 train both networks
# on scikit-learn's digits without clipping, too.
LEARNING_RATES = {
    ("rows", "rnn"): 0.1,
    ("pixels", "rnn"): 0.03,
    ("rows", "lstm"): 1.5,
    ("pixels", "lstm"): 0.6,
}


@dataclass(frozen=True)
class Task:
    """What is learned, by which network, and with which settings.

    Attributes:
        name: of the task, such as ``"rows"``.
        model: the network's short name, such as ``"lstm"``.
        title: what a picture says above it.
        build: makes the network.
        example_losses: from outputs and targets to one loss per example.
        score: from outputs and targets to one number, 1 if all is right.
        score_name: what that number is.
        train: inputs and targets.
        test: inputs and targets for the final loss and score.
        learning_rate: of stochastic gradient descent.
        momentum: of the same.
        batch_size: examples per step; the whole training data if it has no more.
        steps: how many updates.
        limits: the threshold of each method of clipping.
    """

    name: str
    model: str
    title: str
    build: Callable[[nnx.Rngs], nnx.Module]
    example_losses: Callable[[Array, Array], Array]
    score: Callable[[Array, Array], Array]
    score_name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    learning_rate: float
    momentum: float
    batch_size: int
    steps: int
    limits: dict[str, float]


class SequenceClassifier(nnx.Module):
    """A recurrent layer that reads a sequence, then a linear layer with ten outputs."""

    def __init__(self, cell: type, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(cell(inputs, hidden, rngs=rngs))
        self.head = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(
        self, sequences: Float[Array, "batch step value"]
    ) -> Float[Array, "batch 10"]:
        """Logits from the hidden state after the last step."""
        # The first hidden state is zero, whatever the random numbers.
        hidden = self.rnn.cell.initialize_carry(sequences[:, 0].shape, nnx.Rngs(0))
        return self.head(self.rnn(sequences, initial_carry=hidden)[:, -1])


def regression(batch_size: int, epochs: int) -> Task:
    """A small network on a linear problem, whose targets are in the hundreds.

    The gradients are about as large as the targets squared, so that a learning rate of
    ordinary size explodes at once.
    """
    inputs, targets = make_regression(
        n_samples=1000, n_features=20, noise=0.1, random_state=1
    )
    data = inputs.astype(np.float32), targets.astype(np.float32)[:, None]

    def build(rngs: nnx.Rngs) -> nnx.Module:
        init = {
            "kernel_init": nnx.initializers.glorot_uniform(),
            "bias_init": nnx.initializers.constant(0.01),
        }
        return nnx.Sequential(
            nnx.Linear(20, 25, rngs=rngs, **init),
            nnx.relu,
            nnx.Linear(25, 1, rngs=rngs, **init),
        )

    def squared_errors(outputs: Array, targets: Array) -> Array:
        return jnp.mean((outputs - targets) ** 2, axis=-1)

    def explained_variance(outputs: Array, targets: Array) -> Array:
        return 1 - jnp.mean((outputs - targets) ** 2) / jnp.var(targets)

    return Task(
        name="regression",
        model="mlp",
        title="Regression, a network of two layers",
        build=build,
        example_losses=squared_errors,
        score=explained_variance,
        score_name="R² (training data)",
        train=data,
        test=data,
        learning_rate=0.07,
        momentum=0.8,
        batch_size=batch_size,
        steps=epochs * max(1, len(targets) // batch_size),
        limits=REGRESSION_LIMITS,
    )


def images(order: str, model: str, data: Images, batch_size: int, steps: int) -> Task:
    """A recurrent network that reads images row by row or pixel by pixel."""
    train = as_sequences(data.train_images, order), data.train_labels
    test = as_sequences(data.test_images, order), data.test_labels
    length, values = train[0].shape[1:]
    cell = {"rnn": nnx.SimpleCell, "lstm": nnx.OptimizedLSTMCell}[model]
    network = {"rnn": "plain recurrent network", "lstm": "LSTM"}[model]

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return SequenceClassifier(cell, values, hidden=32, rngs=rngs)

    def accuracy(outputs: Array, labels: Array) -> Array:
        return jnp.mean(outputs.argmax(-1) == labels)

    return Task(
        name=order,
        model=model,
        title=f"Images as {length} steps, {network}",
        build=build,
        example_losses=optax.softmax_cross_entropy_with_integer_labels,
        score=accuracy,
        score_name="accuracy (test data)",
        train=train,
        test=test,
        learning_rate=LEARNING_RATES[order, model],
        momentum=0.9,
        batch_size=batch_size,
        steps=steps,
        limits=RECURRENT_LIMITS,
    )
