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
    r"""Says what is wrong with a run: which fault, at which steps, and what to do.

    Each rule looks for one fault in the recorded columns, such as the loss, the
    gradient norm and the norms of leaves. The rules compare logarithms of norms. For
    example, a norm :math:`n_k` is a spike if

    .. math:: \log n_k > \max(m^-_k, m^+_k) + \max(\log 3, \mu),

    where :math:`m^-_k` and :math:`m^+_k` are the medians of :math:`\log n` over the 25
    steps before and after it. The margin :math:`\mu` excludes large norms that are
    noise: it is so large that noise alone has a norm above it in less than one of ten
    such runs. The largest norms that are no spikes, in the whole run and around the
    step, tell how large norms noise can cause. If nothing is found, the run can still
    have faults that its columns do not show: see ``not_judged``.

    Args:
        run: a :class:`History`; the path of a run, in any format that
            :meth:`History.load` reads; or columns by name, with one number for each
            step and ``None`` where nothing was recorded.
        loss: the column with the loss, if it has an unusual name.
        norm: the column with the gradient norm before clipping.
        threshold: the column with the threshold, or the threshold itself.
        update_norm: the column with the norm of the optimizer's updates.
        schedule: the column with the learning rate.
        target: the fraction of steps that the clipping method should clip: 0.9 for
            AutoClip with its default quantile of 0.1.
        step: the column with the step.

    Returns:
        A :class:`Diagnosis` with the ``findings``, the worst first. ``print`` shows it
        as text, and a notebook as a page with pictures.

    Raises:
        ValueError: if the run cannot be read, if there is neither a gradient norm nor a
            loss in it, if there is no column of a name that is given, or if ``target``
            is not between 0 and 1.
        TypeError: if ``run`` is something else.

    Example:
        >>> import optax_clipx as clipx
        >>> norms = [1.0 + 0.01 * (i % 7) for i in range(100)]
        >>> norms[60] = 40.0
        >>> found = clipx.diagnose({"grad_norm": norms})
        >>> found.codes, found.findings[0].steps
        (('spikes',), (60,))

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, 2013,
        arXiv 1211.5063, on exploding and vanishing gradients; Chowdhery et al., PaLM,
        2022, arXiv 2204.02311, on spikes of the loss.
    """
    if target is not None and not 0 <= target <= 1:
        raise ValueError(f"Expected 0 <= target <= 1, got target={target}.")
    names = Names(loss, norm, threshold, update_norm, schedule, target)
    return judge(signals.read(run, step, names))
