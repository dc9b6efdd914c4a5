"""The cliff in a recurrent network's error, and two ways to meet it.

A network of one unit, x_t = w sigmoid(x_{t-1}) + b, runs 50 steps from x_0 = 0.5, and
its error is (sigmoid(x_50) - 0.7)^2. Over w and b the error has a cliff: where a weight
is multiplied in 50 times, a small change decides between two states of rest. On the
cliff the gradient is thousands of times larger than beside it, and one step of gradient
descent throws the parameters far away. Clipping the norm keeps the direction of the
step and limits its length.

    python examples/cliff.py

Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks,
2013, arXiv 1211.5063, figure 6.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from jaxtyping import Array, Float

import optax_clipx as clipx

mpl.use("Agg")  # draws files, opens no windows

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ORANGE, BLUE = "#D55E00", "#0072B2"
WEIGHTS, BIASES = (4.0, 7.0), (-4.0, -1.0)  # what the picture shows


def error(params: Float[Array, "2"]) -> Float[Array, ""]:
    """The error of the network after 50 steps; ``params`` are w and b."""
    weight, bias = params

    def step(_: int, state: Array) -> Array:
        return weight * jax.nn.sigmoid(state) + bias

    last = jax.lax.fori_loop(0, 50, step, jnp.asarray(0.5))
    return (jax.nn.sigmoid(last) - 0.7) ** 2


class Path_(NamedTuple):
    pass
