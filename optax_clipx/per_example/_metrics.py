"""What clipping the examples of a batch did, as metrics with names."""

import jax
from jaxtyping import PyTree

from .._trees.leaves import path_of
from ._gradients import ClippedExamples


def metrics(found: PyTree, prefix: str = "examples") -> dict[str, jax.Array]:
    r"""Names what :func:`clipped_grad` found, for a history or a dashboard.

    ============================  ====================================================
    name                          value
    ============================  ====================================================
    ``"examples/clipped"``        the fraction of examples above the threshold; one
                                  for each leaf or label, with its name at the end, if
                                  these are clipped by themselves
    ``"examples/num_nonfinite"``  how many examples were not finite
    ``"examples/num_examples"``   how many examples there were, without padding
    ``"examples/noise_scale"``    :math:`\mathrm{tr}\,\Sigma/|G|^2`; this and the next
                                  two with ``clipped_grad(..., noise_scale=True)``
    ``"examples/signal"``         the estimate of :math:`|G|^2`
    ``"examples/noise"``          the estimate of :math:`\mathrm{tr}\,\Sigma`
    ============================  ====================================================

    Args:
        found: the second result of a function that :func:`clipped_grad` made.
        prefix: replaces ``"examples"``.

    Returns:
        A dict from names to scalars, under ``jit`` as well. Add it to
        :func:`optax_clipx.metrics` of the optimizer state.

    Raises:
        TypeError: if ``found`` is no :class:`ClippedExamples`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> loss = lambda w, x: w * x
        >>> grad_fn = clipx.per_example.clipped_grad(loss, jnp.inf, noise_scale=True)
        >>> history = clipx.History()
        >>> for step in range(3):
        ...     _, found = grad_fn(1.0, jnp.array([1.0, 2.0, 3.0]) + step)
        ...     history.append(step, clipx.per_example.metrics(found))
        >>> signal, noise = history["examples/signal"], history["examples/noise"]
        >>> print(f"{noise.mean() / signal.mean():.3f} examples")
        0.107 examples

    References:
        :func:`optax_clipx.metrics` does the same for an optimizer state.
    """
    if not isinstance(found, ClippedExamples):
        raise TypeError(
            "Expected the ClippedExamples that clipped_grad returns beside the"
            f" gradients, got {type(found).__name__}: grads, found = grad_fn(...)."
        )
    fractions, _ = jax.tree_util.tree_flatten_with_path(found.clipped)
    read = {("clipped", *path_of(keys)): x for keys, x in fractions}
    read[("num_nonfinite",)] = found.num_nonfinite
    read[("num_examples",)] = found.num_examples
    if found.noise_scale is not None:
        noise = found.noise_scale
        read[("noise_scale",)] = noise.scale
        read[("signal",)] = noise.signal
        read[("noise",)] = noise.noise
    return {"/".join((prefix, *name)): x for name, x in read.items()}
