"""Reports on their way to a sink: put in order, queued, and handed over by a thread."""

import atexit
import contextlib
import os
import sys
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple

from .._devices.host import wait_for_programs

ROOM = 4096  # reports that wait for a sink; further ones are dropped
EARLY = 32  # reports that wait for one of an earlier step
PATIENCE = 0.5  # seconds that they wait, and after which an idle thread ends

PAUSE = 0.02  # seconds in which a thread that was woken lets reports come together

Read = Callable[[], dict[str, Any]]  # gives the metrics of a report, as numbers


class TapCounts(NamedTuple):
    """The number of reports of all taps since the program started.

    Attributes:
        delivered: the number of reports that a sink has received.
        dropped: the number of reports that were dropped because the queue was full.
        failed: the number of reports for which the sink raised an exception.

    Raises:
        Nothing.

    Example:
        >>> import optax_clipx as clipx
        >>> clipx.TapCounts(delivered=7, dropped=0, failed=0).delivered
        7

    References:
        :func:`flush_taps` returns them.
    """

    delivered: int
    dropped: int
    failed: int


def flush_taps() -> TapCounts:
    """Waits until the sinks have received all reports of the steps that were started.

    Call it before you read or close a sink, such as a ``History``. At the end of the
    program it is called automatically.

    Returns:
        The number of reports that were delivered, dropped and failed, over all taps
        since the program started.

    Raises:
        RuntimeError: if a sink calls this function. The sink would wait for itself.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> seen = []
        >>> clipper = clipx.clip_by_global_norm(1.0)
        >>> tx = clipx.tap(clipper, lambda step, metrics: seen.append(step))
        >>> state = tx.init(jnp.ones(2))
        >>> for _ in range(3):
        ...     _, state = tx.update(jnp.ones(2), state)
        >>> counts = clipx.flush_taps()
        >>> seen
        [0, 1, 2]

    References:
        :func:`jax.effects_barrier` also waits for callbacks.
    """
    if getattr(_in_sink, "now", False):
        raise RuntimeError(
            "Expected flush_taps() outside of a sink, got a call by a sink, which would"
            " wait for itself. Call it where the training ends."
        )
    taps = _of_this_process()
    try:
        if taps:
            wait_for_programs()
    finally:
        for reports in taps:
            reports.flush()
    with _counting:
        return TapCounts(*(_counts[name] for name in TapCounts._fields))


class Reports:
    """The reports of one tap.

    Callbacks come on threads of the JAX runtime, where nothing may wait or raise: they
    only queue a report. A thread that lives while there is something to do hands the
    reports to the sink, one at a time.
    """

    def __init__(self, sink: Callable[[int, Any], object], name: str, every: int):
        self.sink, self.name, self.every = sink, name, every
        self.process = os.getpid()
        self.warned: set[str] = set()
        self.start_anew()
        _all.add(self)
        # What is registered last runs first, so before the sink's own closing.
        atexit.unregister(_deliver_at_exit)
        atexit.register(_deliver_at_exit)

    def start_anew(self) -> None:
        """Forgets what has come: in a forked process it belongs to the parent."""
        self.delivering = threading.Lock()  # held while the sink has a report
        self.changed = threading.Condition()  # held while what follows changes
        self.expected = 0
        self.early: dict[int, Read] = {}
        self.queue: deque[tuple[int, Read]] = deque()
        self.dropped = 0
        self.thread: threading.Thread | None = None

    def put(self, step: int, read: Read) -> None:
        """Queues a report in the order of the steps, and never waits for the sink."""
        with self.changed:
            # Training that was begun again, or restored, comes to a step once more.
            again = step < self.expected or step in self.early
            if again or len(self.early) == EARLY:
                self._wait_no_longer()
            if step > self.expected and not again:
                self.early[step] = read
            else:
                self._append(step, read)
            while self.expected in self.early:
                self._append(self.expected, self.early.pop(self.expected))
            self._wake()

    def _wait_no_longer(self) -> None:
        """Queues the reports that wait for those of earlier steps."""
        for step in sorted(self.early):
            self._append(step, self.early.pop(step))

    def _append(self, step: int, read: Read) -> None:
        self.expected = step + self.every
        if len(self.queue) < ROOM:
            self.queue.append((step, read))
        else:
            self.dropped += 1
            _count("dropped")

    def _wake(self) -> None:
        if self.thread is not None and self.thread.is_alive():
            self.changed.notify()
            return
        self.thread = threading.Thread(target=self._work, name="tap", daemon=True)
        # At the end of the program no thread can start; all is delivered without one.
        with contextlib.suppress(RuntimeError):
            self.thread.start()

    def _work(self) -> None:
        while self._has_work():
            time.sleep(PAUSE)  # rather than to wake up for each report
            while self.deliver_one():
                pass

    def _has_work(self) -> bool:
        with self.changed:
            if self.changed.wait_for(lambda: self.queue, PATIENCE):
                return True
            if self.early:
                self._wait_no_longer()
                return True
            self.thread = None
            return False

    def deliver_one(self) -> bool:
        """Hands the next report to the sink; whether there was one."""
        with self.delivering:
            with self.changed:
                if not self.queue:
                    return False
                step, read = self.queue.popleft()
            if self.dropped:
                self._warn_once("drops", _TOO_SLOW.format(self.name, step, ROOM))
            _in_sink.now = True
            try:
                self.sink(step, read())
                _count("delivered")
            except Exception as error:
                _count("failed")
                self._warn_once("raises", _RAISED.format(self.name, error, step))
            finally:
                _in_sink.now = False
            return True

    def flush(self, seconds: float = float("inf")) -> None:
        """Hands over all that has come; says so if it takes longer than that."""
        with self.changed:
            self._wait_no_longer()
        start = time.monotonic()
        while self.deliver_one():
            if time.monotonic() - start > seconds and self.queue:
                print(_AT_EXIT.format(self.name, len(self.queue)), file=sys.stderr)
                seconds = float("inf")

    def _warn_once(self, what: str, message: str) -> None:
        if what in self.warned:
            return
        self.warned.add(what)
        try:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        except Exception:  # warnings are errors here, but nobody could catch this one
            print(message, file=sys.stderr)


_TOO_SLOW = (
    "The sink {} of optax_clipx.tap is slower than the training: at step {} more than"
    " {} reports were waiting for it, and further ones are dropped. Pass a larger"
    " every= to tap. flush_taps() returns how many were dropped."
)
_RAISED = (
    "The sink {} of optax_clipx.tap raised {!r} at step {}. Training goes on, and the"
    " sink gets the reports of later steps. flush_taps() returns how many failed."
)
_AT_EXIT = (
    "optax_clipx.tap: the program ends when the sink {} has taken {} more reports."
    " Ctrl-C drops them."
)

_all: "weakref.WeakSet[Reports]" = weakref.WeakSet()
_in_sink = threading.local()
_counting = threading.Lock()
_counts: Counter[str] = Counter()


def _count(name: str) -> None:
    with _counting:
        _counts[name] += 1


def _of_this_process() -> list[Reports]:
    return [reports for reports in _all if reports.process == os.getpid()]


def _deliver_at_exit() -> None:
    taps = _of_this_process()
    if not taps:  # a fork, whose parent delivers
        return
    with contextlib.suppress(Exception):  # of somebody else's callback
        wait_for_programs()
    for reports in taps:
        reports.flush(seconds=5.0)


def _after_fork() -> None:
    global _counting
    _counting = threading.Lock()
    _counts.clear()
    _in_sink.now = False
    for reports in list(_all):
        reports.start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
