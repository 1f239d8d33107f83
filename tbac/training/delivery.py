"""Delivers what a run logs in a thread, so that training neither waits for a logger nor ends with it.

Records are plain data. One that can't be delivered now is tried again later, and meanwhile stands in a file of the run
folder, which the next start of the run delivers. What can never be delivered is named.
"""

import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tbac.files import append_lines, describe_error, read_json_lines
from tbac.redaction import hide_in_text

log = logging.getLogger(__name__)
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds between tries; each wait is twice the one before
PATIENCE = 10.0  # seconds that the end of a run waits for a logger that fails
SLOWEST = 60.0  # seconds that it waits for a single record that doesn't fail
LONGEST_END = 180.0  # seconds that it waits in all
OF_FILES = ("file", "picture")  # kinds of records that need room on a disk

Record = Mapping[str, Any]


class UndeliverableError(Exception):
    """A record that will never be taken, however often it is tried."""


class Delivery:
    """A queue of records and the thread that delivers them in order.

    Args:
        send: delivers one record; raises `UndeliverableError` for one that will never be taken, and any other error
            for one that should be tried again.
        name: of the receiver, for messages.
        spool: file that keeps what isn't delivered yet while the receiver fails; what an earlier start left in it is
            delivered first. None keeps it in memory alone.
    """

    def __init__(self, send: Callable[[Record], None], name: str, spool: Path | None = None) -> None:
        self.send, self.name, self.spool = send, name, spool
        self._failing: dict[bool, str] = {}  # whether it was a file -> what the last try said, while such records fail
        self._changed = threading.Condition()
        self._closing = self._closed = False
        self._queue: deque[Record] = deque()
        self._spooled = 0  # how many records at the head of the queue are in the file
        self._read_spool()
        self._thread = threading.Thread(target=self._run, name=f"delivery to {name}", daemon=True)
        self._thread.start()

    def _read_spool(self) -> None:
        """Take what an earlier start of the run couldn't deliver."""
        if self.spool is None or not self.spool.is_file():
            return
        try:
            rows = list(read_json_lines(self.spool))
        except OSError as error:
            log.warning("%s can't be read (%s); what is in it isn't delivered", self.spool, error)
            return
        kept = [row for row in rows if isinstance(row, dict) and isinstance(row.get("kind"), str)]
        log.info("delivering %d records of %s, which %s didn't take before", len(kept), self.spool, self.name)
        self._queue.extend(kept)
        self._spooled = len(kept)

    @property
    def failing(self) -> str:
        """What the last tries said, while they fail; empty otherwise."""
        return "; ".join(self._failing.values())

    def put(self, record: Record) -> None:
        """Queue a record; returns at once."""
        with self._changed:
            self._queue.append(record)
            self._changed.notify_all()

    def flush(self, patience: float | None = None) -> bool:
        """Wait until everything is delivered; returns whether it is.

        Args:
            patience: seconds that a receiver may fail; None = `PATIENCE`.
        """
        patience = PATIENCE if patience is None else patience
        start = moved = time.monotonic()
        left = -1
        with self._changed:
            while self._queue:
                now = time.monotonic()
                if len(self._queue) != left:
                    left, moved = len(self._queue), now
                # A receiver that doesn't fail may take its time: a new store makes its tables first.
                allowed = patience if self._failing else SLOWEST
                if now - start > LONGEST_END or now - moved > allowed:
                    return False
                self._changed.wait(0.1)
        return True

    def close(self) -> None:
        """Deliver what is left, as long as that goes on; then keep it for the next start, or say that it is lost."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.flush()
        with self._changed:
            left = len(self._queue)
            if left:
                reason = self.failing or "it was too slow"
                where = f"they are in {self.spool}, and the next start of this run sends them"
                kept = self._keep()
                log.warning(
                    "%s didn't take %d records (%s); %s", self.name, left, reason, where if kept else "they are lost"
                )
            self._queue.clear()
            self._closed = True
            self._changed.notify_all()
        self._thread.join(1.0)  # one that hangs in a request ends with the process

    def _keep(self) -> bool:
        """Append what isn't in the file yet; returns whether all is in it."""
        if self.spool is None:
            return False
        unkept = list(self._queue)[self._spooled :]
        try:
            append_lines(self.spool, [json.dumps(record, default=str) for record in unkept])
        except OSError:
            return False
        self._spooled = len(self._queue)
        return True

    def _run(self) -> None:
        wait = FIRST_WAIT
        while True:
            record = self._wait_for_record()
            if record is None:
                return
            if self._try(record):
                wait = FIRST_WAIT
                continue
            with self._changed:
                self._keep()
                self._changed.wait_for(lambda: self._closing, wait)
                if self._closing:
                    self._changed.wait(0.5)
            wait = min(2 * wait, LONGEST_WAIT)

    def _wait_for_record(self) -> Record | None:
        """Wait for the next record, without taking it out of the queue; None when the run is over."""
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                # What was kept for later has been delivered now.
                if self.spool is not None:
                    with contextlib.suppress(OSError):
                        self.spool.unlink(missing_ok=True)
                self._spooled = 0
                self._changed.wait()
            return self._queue[0]

    def _try(self, record: Record) -> bool:
        """Deliver the first record; returns whether the next one may be tried at once."""
        # Whatever a logger raises, from a full disk to a broken library, it must not reach training.
        error: Exception | None = None
        try:
            self.send(record)
        except Exception as caught:  # noqa: BLE001
            error = caught
        with self._changed:
            self._changed.notify_all()
            if not self._queue or self._queue[0] is not record:  # the run was closed meanwhile
                return True
            is_file = record["kind"] in OF_FILES
            if error is None or isinstance(error, UndeliverableError):
                self._queue.popleft()
                self._spooled = max(0, self._spooled - 1)
                if error is not None:
                    log.warning("%s won't take %s: %s", self.name, describe_record(record), hide_in_text(str(error)))
                elif self._failing.pop(is_file, None) and not self._failing:
                    log.info("%s takes what is logged again", self.name)
                return True
            if is_file not in self._failing:
                message = "%s doesn't take %s (%s); training goes on, and it is sent later"
                log.warning(message, self.name, "files" if is_file else "what is logged", describe_safely(error))
            self._failing[is_file] = describe_safely(error)
            # A file that finds no room mustn't keep the numbers behind it.
            if is_file and any(other["kind"] not in OF_FILES for other in self._queue):
                self._queue.rotate(-1)
                self._spooled = max(0, self._spooled - 1)
                return self._queue[0]["kind"] not in OF_FILES
            return False


def describe_safely(error: Exception) -> str:
    """Describe an error in one line, without secrets."""
    return hide_in_text(describe_error(error))


def describe_record(record: Record) -> str:
    """Describe a record for a message."""
    if record["kind"] == "metrics":
        return f"the metrics {', '.join(record.get('metrics', {}))} of step {record.get('step')}"
    return f"the {record['kind']} {record.get('path', '')}".strip()
