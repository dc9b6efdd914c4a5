"""`Rewind`: back to the last good checkpoint, and past the data that broke the run."""

import logging
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .divergence import NONFINITE, SKIPPED, BadStretch, bad_stretch
from .history import History
from .missing import missing
from .rewind_decisions import RewindDecision, batch_of, decide, target, told, what
from .rewind_log import RewindLog

_NEEDED = ("all_steps", "delete", "restore", "wait_until_finished")
_logger = logging.getLogger(__name__)


class Rewind:
    r"""Goes back to a good checkpoint after a divergence, and passes over its batches.

    Clipping and :func:`skip_spikes` handle single bad steps. If a long block of the
    data is bad, or the loss has blown up and stays up, neither repairs the run. Then
    the state of an earlier checkpoint is restored, and the run goes on from there with
    batches that come later in the data.

    A step is bad if its loss is not finite, if :func:`skip_spikes` skipped it, if the
    clipper saw non-finite gradients, or if its loss is above

    .. math:: m + \max(\text{band} \cdot s, |m| / 10)

    where :math:`m` is the median of the ``window`` finite losses before the last
    ``patience``, and :math:`s` is 1.4826 times their median absolute deviation, which
    estimates a standard deviation. There is no such limit before 20 losses. After
    ``patience`` bad steps in a row the run goes back:

    * **To** the newest checkpoint from at least ``margin`` steps before the first bad
      step. No checkpoint is gone back to twice while there is an earlier one. If none
      is that early, the oldest from before the first bad step is used.
    * **Data**: all batches from that checkpoint's on until ``margin`` after the last
      one that was seen are passed over. If the run breaks again before it has got past
      where it broke before, ``margin`` is doubled with each rewind, at most 10 times.
    * **Checkpoints** from later steps are deleted, because they are of the abandoned
      run, and Orbax saves no step before its latest.

    A checkpoint called ``s`` has to hold the state **before** step ``s``. The decision
    at a step follows from the records before it, the steps of the checkpoints and the
    decisions before. It is written to a file before anything is done about it, so a
    run that was killed at any moment takes the same decisions when it is resumed.

    With several processes give each a ``History`` with a file of its own, the same
    ``path``, and ``primary=jax.process_index() == 0``. All decide alike if they record
    the same numbers.

    Attributes:
        decisions: the decisions so far, those of the file included. Each has the
            fields ``rewind`` (its number), ``step``, ``onset`` (the first bad step),
            ``to``, ``first_batch``, ``next_batch``, ``reason`` (``"loss"``,
            ``"nonfinite"`` or ``"skipped"``), ``loss`` and ``limit``.
        path: of the file with the decisions.

    Args:
        manager: an ``orbax.checkpoint.CheckpointManager``. It should keep checkpoints
            of more than ``patience + margin`` steps (``max_to_keep``), and delete them
            at once (no ``enable_background_delete``).
        history: a :class:`History` with ``resume=True``, to which the loop appends the
            loss of every step. The first step after a rewind gets three columns:
            ``rewind/number``, ``rewind/step`` and ``rewind/next_batch``.
        path: of the file with the decisions; by default ``run.jsonl.rewinds`` for a
            history ``run.jsonl``.
        loss: the column of the loss.
        patience: how many bad steps in a row it takes; less than the ``patience`` of
            :func:`skip_spikes`, which takes up the level of the tenth.
        window: how many losses the limit comes from.
        band: how many standard deviations above the median the limit is.
        margin: how many steps before the first bad one, and how many batches after
            the last one, are given up, too.
        max_rewinds: how many rewinds the run may take in all; the next one is an error.
        primary: whether this process writes the file with the decisions.

    Raises:
        TypeError: if ``manager`` or ``history`` is something else.
        ValueError: for a ``History`` without ``resume=True``, numbers out of range,
            and a file of decisions that is broken, or of another run.

    Example:
        The batches 25 to 31 are bad. The run goes back to step 20 and on with batch 32.

        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import orbax.checkpoint as ocp
        >>> import optax_clipx as clipx
        >>> folder = tempfile.mkdtemp()
        >>> manager = ocp.CheckpointManager(f"{folder}/states")
        >>> history = clipx.History(f"{folder}/run.jsonl", resume=True)
        >>> rewind = clipx.Rewind(manager, history, patience=3, margin=4)
        >>> state, step = rewind.restore({"w": jnp.zeros(2)})
        >>> while step < 40:
        ...     loss = 9.0 if 25 <= rewind.batch(step) < 32 else 1.0
        ...     history.append(step, loss=loss)
        ...     if rewind.step(step):
        ...         state, step = rewind.restore(state)
        ...         continue
        ...     step += 1
        ...     if step % 10 == 0:
        ...         history.flush()
        ...         saved = manager.save(step, args=ocp.args.StandardSave(state))
        >>> decision = rewind.decisions[0]
        >>> decision.onset, decision.step, decision.to, decision.next_batch
        (25, 28, 20, 33)
        >>> manager.close()
        >>> history.close()

    References:
        Chowdhery et al., PaLM, 2022, arXiv 2204.02311, section 5.1: restarts from a
        checkpoint about 100 steps before a spike, without the 200 to 500 batches
        around it.
    """

    def __init__(
        self,
        manager: Any,
        history: History,
        path: str | os.PathLike[str] | None = None,
        *,
        loss: str = "loss",
        patience: int = 8,
        window: int = 200,
        band: float = 6.0,
        margin: int = 20,
        max_rewinds: int = 5,
        primary: bool = True,
    ) -> None:
        _check_manager(manager)
        _check_history(history)
        _check_count("patience", patience, 1)
        _check_count("window", window, 20)
        _check_count("margin", margin, 1)
        _check_count("max_rewinds", max_rewinds, 0)
        if not band > 0:
            raise ValueError(f"Expected band > 0, got band={band}.")
        if path is None:
            if history.path is None:
                raise ValueError(
                    "Expected the path of a file for the decisions, because the history"
                    ' has none. Pass Rewind(manager, history, "rewinds.jsonl").'
                )
            path = f"{history.path}.rewinds"
        self.path = Path(path)
        self._manager = manager
        self._history = history
        self._loss = loss
        self._patience = patience
        self._window = window
        self._band = band
        self._margin = margin
        self._max_rewinds = max_rewinds
        self._log = RewindLog(self.path, primary)
        self._marked = False
        if self.decisions and not manager.all_steps():
            raise ValueError(
                f"Expected the checkpoints of the run whose rewinds are in {self.path},"
                " got a manager without any. Delete this file to start a new run, or"
                " correct the manager's folder."
            )

    @property
    def decisions(self) -> tuple[RewindDecision, ...]:
        """The decisions so far, those of the file included."""
        return tuple(self._log.decisions)

    def batch(self, step: int) -> int:
        """The number of the batch for a step, which is the step before any rewind.

        Batch numbers only rise, also across a rewind, so an iterator over the data
        never has to go back.

        Args:
            step: the number of the step.

        Returns:
            The number of the batch.

        Raises:
            RuntimeError: if ``restore`` has to be called first.
        """
        self._check_restored()
        return batch_of(operator.index(step), self.decisions)

    def step(self, step: int) -> RewindDecision | None:
        """Judges the run; call it once in each step, after ``history.append``.

        It reads the records before this step, so it does not wait for the device.

        Args:
            step: the number of the step that was just recorded.

        Returns:
            ``None`` to go on; or the decision to go back, on which the loop has to
            call ``restore``.

        Raises:
            RuntimeError: if the run has to go back but ``max_rewinds`` are used up or
                there is no checkpoint from before the bad steps, and if ``restore``
                has to be called first.
            ValueError: if the history has no losses.
        """
        self._check_restored()
        step = operator.index(step)
        self._mark(step)
        rows = self._history._newest_before(
            step, (self._loss, SKIPPED, NONFINITE), self._window + self._patience
        )
        stretch = bad_stretch(rows, self._loss, self._patience, self._band)
        if stretch is None:
            if len(rows["step"]) >= self._patience:
                self._check_columns()
            return None
        decision = self._decide(step, stretch)
        self._log.decide(decision)
        if self._log.writes:
            _logger.warning("%s The account is in %s.", told(decision), self.path)
        return decision

    def restore(self, fresh: Any, *, args: Any = None) -> tuple[Any, int]:
        """The state to go on with, and its step: at the start, and after a rewind.

        After a decision to go back, this deletes the checkpoints from later steps.
        Otherwise it restores the latest checkpoint.

        Args:
            fresh: a state as training begins with, which is returned if there is no
                checkpoint. It also says the structure, as for
                ``orbax.checkpoint.args.StandardRestore``.
            args: what ``manager.restore`` takes, for states that were saved otherwise
                than with ``StandardSave``.

        Returns:
            The state, and the number of the step to do next.

        Raises:
            ImportError: if Orbax is not installed and ``args`` is not given.
            RuntimeError: if the checkpoint to go back to is gone.
        """
        steps = sorted(self._manager.all_steps())
        if self._waits:
            step = self._go_back(steps)
        elif steps:
            step = steps[-1]
        else:
            return fresh, 0
        self._marked = False
        args = _standard(fresh) if args is None else args
        return self._manager.restore(step, args=args), step

    @property
    def _waits(self) -> bool:
        """Whether a decision was made and not carried out."""
        return self._log.done < len(self._log.decisions)

    def _go_back(self, steps: Sequence[int]) -> int:
        """Carries out the last decision, of which a part may be done already."""
        to = self.decisions[-1].to
        if to not in steps:
            raise RuntimeError(
                f"Expected the checkpoint of step {to}, to which the run has to go back"
                f" by {self.path}, got those of {list(steps)}. Bring it back, or start"
                " the run anew without this file."
            )
        for step in reversed(steps):
            if step > to:
                self._manager.delete(step)
        self._log.finish()
        return to

    def _decide(self, step: int, stretch: BadStretch) -> RewindDecision:
        decisions = self.decisions
        bad = what(stretch, step)
        if len(decisions) >= self._max_rewinds:
            raise RuntimeError(
                f"Gave up: {bad}, after {len(decisions)} rewinds, which are in"
                f" {self.path}. Look at the data and the learning rate there, or allow"
                f" more than max_rewinds={self._max_rewinds}."
            )
        # The end of a save may delete the oldest checkpoint.
        self._manager.wait_until_finished()
        steps = list(self._manager.all_steps())
        to = target(stretch.onset, steps, decisions, self._margin)
        if to is None:
            raise RuntimeError(
                f"Cannot go back: {bad}, and the only checkpoints are of the steps"
                f" {sorted(steps)}. Save one before the first step, and keep those of"
                f" more than {self._patience + self._margin} steps (max_to_keep of"
                " CheckpointManagerOptions)."
            )
        return decide(step, stretch, to, decisions, self._margin)

    def _mark(self, step: int) -> None:
        """Records the rewind with the first step after it."""
        decisions = self.decisions
        if self._marked or not decisions or step != decisions[-1].to:
            return
        last = decisions[-1]
        marks = {
            "number": last.rewind,
            "step": last.step,
            "next_batch": last.next_batch,
        }
        self._history.append(step, {f"rewind/{k}": x for k, x in marks.items()})
        self._marked = True

    def _check_restored(self) -> None:
        if self._waits:
            raise RuntimeError(
                f"Expected a call of restore first: {self.path} has the decision to go"
                f" back to step {self.decisions[-1].to}, which is not carried out yet."
                " Write: state, step = rewind.restore(state)."
            )

    def _check_columns(self) -> None:
        columns = self._history._writer.table
        if self._loss not in columns and SKIPPED not in columns:
            raise ValueError(
                f"Expected a history with the column {self._loss!r}, got one without."
                " Record it: history.append(step, metrics, loss=loss), or name"
                " another column with loss=."
            )


def _standard(fresh: Any) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ImportError(missing("orbax-checkpoint")) from None
    return ocp.args.StandardRestore(fresh)


def _check_manager(manager: Any) -> None:
    if not all(callable(getattr(manager, name, None)) for name in _NEEDED):
        raise TypeError(
            "Expected manager to be an orbax.checkpoint.CheckpointManager, got"
            f" {type(manager).__name__}. Make one with CheckpointManager(folder)."
            " If Orbax is missing, run: pip install orbax-checkpoint."
        )


def _check_history(history: Any) -> None:
    if not isinstance(history, History):
        raise TypeError(
            f"Expected history to be a History, got {type(history).__name__}."
        )
    if not history._writer.resume:
        raise ValueError(
            "Expected a history that may record a step again, got one without"
            " resume=True. Write: History(path, resume=True)."
        )


def _check_count(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"Expected {name} to be {least} or more, got {name}={value}.")
