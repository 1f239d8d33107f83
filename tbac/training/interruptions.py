"""Signals that end a run, noted whenever they come and obeyed as soon as nothing is lost by it; and closed terminals.

Handlers of signals belong to the process, so there is one `INTERRUPTION` for all stages of a run: a signal that comes
while one stage ends is obeyed by the next one.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, TextIO

SAME_SIGNAL = 1.0  # seconds in which a signal that comes again is the same one: sent to the process and to its group


class Interruption:
    """Notes the first signal that ends a run.

    While `may_end` is true nothing is unsaved, so the run ends at once. Otherwise it ends after the step in hand, which
    `Preemption` sees to. A second signal of the same kind has its usual effect, unless it follows the first one so soon
    that both are one: a signal to a group of processes often comes twice.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.may_end = True
        self._since = 0.0
        self._numbers: set[signal.Signals] = set()

    def take(self, numbers: Sequence[signal.Signals]) -> None:
        """Handle these signals; one that the process ignores, as `nohup` makes it ignore SIGHUP, stays ignored."""
        if threading.current_thread() is not threading.main_thread():  # Python allows it in no other thread
            return
        self._numbers |= {number for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
        for number in self._numbers:
            signal.signal(number, self._note)

    @contextlib.contextmanager
    def watch(self, numbers: Sequence[signal.Signals]) -> Iterator[None]:
        """Handle these signals within the block, and give them back afterwards."""
        before = {number: signal.getsignal(number) for number in numbers}
        self.received, self.may_end, self._numbers = None, True, set()
        self.take(numbers)
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        if self.received is None:
            self.received, self._since = received, now
            if self.may_end:
                raise InterruptedRun(received)
            # No print: it could wait for the very stream that the signal has interrupted.
            say = f"{received.name}: the step in hand is finished and saved; the signal again ends the run at once\n"
            with contextlib.suppress(OSError):
                os.write(2, say.encode())
        elif now - self._since > SAME_SIGNAL:
            usual = signal.default_int_handler if received == signal.SIGINT else signal.SIG_DFL
            signal.signal(received, usual)
            os.kill(os.getpid(), received)


class InterruptedRun(SystemExit):
    """A signal has ended the run; its exit status is the one of a process that the signal has killed."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(128 + received)
        self.received = received


INTERRUPTION = Interruption()


class LastingStream:
    """A text stream that is written to as long as that works; what comes later is dropped.

    A run whose output goes to `head`, to a terminal that is closed, or to a full disk, goes on.

    Args:
        stream: where the text goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written, or drop it."""
        self._try(self.stream.flush)

    def _try(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except ValueError:  # the stream is closed
            self._give_up()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EFBIG):
                raise
            self._give_up()

    def _give_up(self) -> None:
        """Write to nowhere from now on; what the stream still holds would fail again when the process ends."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def outlast_terminal() -> Iterator[None]:
    """Within the block, no closed or full output ends the run."""
    before = sys.stdout, sys.stderr
    raising = logging.raiseExceptions
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    logging.raiseExceptions = False  # a log file on a full disk prints no traceback for each line
    try:
        yield
    finally:
        # What couldn't be written would fail once more when the process ends, and change its exit status.
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        logging.raiseExceptions = raising
