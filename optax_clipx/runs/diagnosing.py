"""`diagnose`: what is wrong with a run, from what was recorded of it."""

import os
from collections.abc import Mapping
from typing import Any

from . import signals
from .diagnosis import Diagnosis
from .history import History
from .judging import judge
from .signals import Names


def diagnose(
    run: str | os.PathLike[str] | History | Mapping[str, Any],
    *,
    loss: str | None = None,
    norm: str | None = None,
    threshold: str | float | int | None = None,
    update_norm: str | None = None,
    schedule: str | None = None,
    target: float | int | None = None,
    step: str | None = None,
) -> Diagnosis:
    r"""Finds faults in a run, and says at which steps they are and what to do.

    The function looks for each fault in the recorded columns, such as the loss, the
    gradient norm and the norms of leaves. It compares logarithms of norms. For example,
    a norm :math:`n_k` is a spike if

    .. math:: \log n_k > \max(m^-_k, m^+_k) + \max(\log 3, \mu_k).

    Here :math:`m^-_k` is the median of :math:`\log n` over the 25 steps before step
    :math:`k`, and :math:`m^+_k` the median over the 25 steps after it. The margin
    :math:`\mu_k` depends on the noise of the norms: in a run without faults, the
    probability that any norm exceeds it is at most about 0.1. The margin is estimated
    twice: from the noise of the whole run, and from the noise in about 100 steps around
    step :math:`k`. The smaller estimate is used. So a spike in a part of the run with
    little noise is found, even if the norms are noisy in other parts.

    If nothing is found, the run can still have faults that its columns do not show.
    ``not_judged`` lists the faults that could not be checked.

    Args:
        run: a :class:`History`, or the path of a run in a format that
            :meth:`History.load` reads, or a dict from names of columns to lists. A
            list has one number for each step, or ``None`` in a step in which nothing
            was recorded.
        loss: the name of the column with the loss. You need this and the other names
            only if a column has an unusual name.
        norm: the name of the column with the gradient norm before clipping.
        threshold: the name of the column with the threshold, or the threshold itself.
        update_norm: the name of the column with the norm of the optimizer's updates.
        schedule: the name of the column with the learning rate.
        target: the fraction of steps that the clipping method is meant to clip. For
            :func:`quantile_clip` with ``quantile=0.1`` it is 0.9, because 90% of the
            norms are above the quantile.
        step: the name of the column with the step.

    Returns:
        A :class:`Diagnosis` with the ``findings``. The worst finding comes first.
        ``print`` shows the diagnosis as text. A notebook shows it with pictures.

    Raises:
        ValueError: if the run cannot be read, if it has neither a gradient norm nor a
            loss, if a named column does not exist, or if ``target`` is not between 0
            and 1.
        TypeError: if ``run`` has another type.

    Example:
        >>> import optax_clipx as clipx
        >>> norms = [1.0 + 0.01 * (i % 7) for i in range(100)]
        >>> norms[60] = 40.0
        >>> found = clipx.diagnose({"grad_norm": norms})
        >>> found.codes, found.findings[0].steps
        (('spikes',), (60,))

    References:
        Exploding and vanishing gradients: Pascanu et al., On the difficulty of training
        recurrent neural networks, 2013, arXiv 1211.5063. Spikes of the loss: Chowdhery
        et al., PaLM, 2022, arXiv 2204.02311.
    """
    if target is not None and not 0 <= target <= 1:
        raise ValueError(f"Expected 0 <= target <= 1, got target={target}.")
    names = Names(loss, norm, threshold, update_norm, schedule, target)
    return judge(signals.read(run, step, names))
