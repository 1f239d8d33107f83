"""One run in MLflow: it is begun, goes on after an interruption or a deletion, and is sent its records one by one."""

import contextlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tbac.files import write_whole
from tbac.pictures import open_picture
from tbac.redaction import hide_in_text
from tbac.training.delivery import Record, UndeliverableError, describe_safely
from tbac.training.tracking.store import (
    create_run,
    find_experiment,
    get_error_code,
    log_datasets,
    log_metrics,
    log_params,
    make_tag_name,
    open_store,
)

log = logging.getLogger(__name__)

RUN_ID = "mlflow_run_id"  # the file of a run folder, and of an export, that holds the id of the run
# What MLflow says of a request that it will refuse the next time too.
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")


class MlflowRun:
    """One run in MLflow, which is begun when the first record is sent, or goes on if it was begun before.

    Args:
        tracking_uri: where runs are stored.
        experiment_name: MLflow experiment.
        run_name: shown in the UI.
        parent_run_id: run that this one belongs to.
        run_id_file: file that holds the id of the run to go on with, and gets the id of a new one.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        run_name: str | None,
        parent_run_id: str | None = None,
        run_id_file: Path | None = None,
    ) -> None:
        self.tracking_uri, self.experiment_name, self.run_name = tracking_uri, experiment_name, run_name
        self.parent_run_id, self.run_id_file = parent_run_id, run_id_file
        self.run_id: str | None = None
        self._client: Any = None
        self._described: list[Record] = []  # what describes it, for a run that has to take the place of this one

    @property
    def _begun_id(self) -> str:
        """Its id, once it is begun."""
        assert self.run_id is not None, "the run isn't begun"
        return self.run_id

    def send(self, record: Record) -> None:
        """Send one record.

        Raises:
            UndeliverableError: for a record that MLflow refuses.
            Exception: whatever MLflow raises otherwise; the record may be sent again.
        """
        if record["kind"] in ("config", "tags", "inputs") and record not in self._described:
            self._described.append(record)
        try:
            self._open()
            self._send(record)
        except Exception as error:
            if self.run_id is not None and get_error_code(error) in REFUSED:
                if not self._is_gone():
                    raise UndeliverableError(str(error).splitlines()[0]) from error
                log.warning("MLflow run %s was deleted; a new one is begun", self.run_id)
                self._forget_run()
            self._client = None
            raise

    def _open(self) -> None:
        """Connect, and find or begin the run."""
        if self._client is None:
            self._client = open_store(self.tracking_uri)
        if self.run_id is None:
            self.run_id = self._find_run() or self._begin_run()

    def _find_run(self) -> str | None:
        """Find the run that was begun before; None when there was none, or it isn't there any more."""
        run_id = read_run_id(self.run_id_file)
        if run_id is None:
            return None
        self.run_id = run_id
        gone, self.run_id = self._is_gone(), None
        if not gone:
            self._client.update_run(run_id, status="RUNNING")  # it may have been interrupted before
            return run_id
        where = hide_in_text(self.tracking_uri)
        log.warning("MLflow run %s isn't in %s any more; a new one is begun", run_id, where)
        return None

    def _is_gone(self) -> bool:
        """Whether the run, or its experiment, was deleted."""
        try:
            run = self._client.get_run(self.run_id)
            experiment = self._client.get_experiment(run.info.experiment_id)
        except Exception as error:
            if get_error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return True
            raise
        return "deleted" in (run.info.lifecycle_stage, experiment.lifecycle_stage)

    def _begin_run(self) -> str:
        """Begin a run with the config and tags that are known, and note its id."""
        experiment_id = find_experiment(self._client, self.experiment_name, self.tracking_uri)
        self.run_id = create_run(self._client, experiment_id, self.run_name, self.parent_run_id)
        for record in self._described:
            self._send(record)
        if self.run_id_file is not None:
            try:
                write_whole(self.run_id_file, f"{self.run_id}\n".encode())
            except OSError as error:
                log.warning("%s can't be written (%s); a restart begins a new MLflow run", self.run_id_file, error)
        return self.run_id

    def _forget_run(self) -> None:
        """Let the next record begin a new run."""
        self.run_id = None
        if self.run_id_file is not None:
            with contextlib.suppress(OSError):
                self.run_id_file.unlink(missing_ok=True)

    def _send(self, record: Record) -> None:
        senders: Mapping[str, Callable[[Record], None]] = {
            "metrics": self._send_metrics,
            "config": self._send_config,
            "tags": self._send_tags,
            "inputs": self._send_inputs,
            "file": self._send_file,
            "picture": self._send_picture,
            "end": self._send_end,
        }
        try:
            senders[record["kind"]](record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # of a record from a damaged file
            raise UndeliverableError(describe_safely(error)) from error

    def _send_metrics(self, record: Record) -> None:
        log_metrics(self._client, self._begun_id, record["metrics"], int(record["step"]), int(record["time"]))

    def _send_config(self, record: Record) -> None:
        """MLflow lets no parameter change, so a run that goes on keeps those of its start; the file is the newest."""
        if record.get("params") and not self._client.get_run(self.run_id).data.params:
            log_params(self._client, self._begun_id, record["params"])
        self._client.log_dict(self.run_id, dict(record["config"]), "config.yaml")

    def _send_tags(self, record: Record) -> None:
        for name, value in record["tags"].items():
            self._client.set_tag(self.run_id, make_tag_name(name), value)

    def _send_file(self, record: Record) -> None:
        path = Path(record["path"])
        if not path.is_file():
            raise UndeliverableError("it isn't there any more")
        self._client.log_artifact(self.run_id, str(path), record["folder"])

    def _send_inputs(self, record: Record) -> None:
        log_datasets(self._client, self._begun_id, record["sources"])

    def _send_picture(self, record: Record) -> None:
        path = Path(record["path"])
        if not path.is_file():
            raise UndeliverableError("it isn't there any more")
        place = {"key": record["name"], "step": int(record["step"]), "timestamp": int(record["time"])}
        self._client.log_image(self.run_id, open_picture(path), **place, synchronous=True)

    def _send_end(self, record: Record) -> None:
        self._client.set_terminated(self.run_id, record["status"])


def read_run_id(file: Path | None) -> str | None:
    """Read the id of an MLflow run from a file; None where there is none, with a warning if it isn't an id."""
    if file is None or not file.is_file():
        return None
    try:
        text = file.read_bytes()[:200].decode(errors="replace").strip()
    except OSError as error:
        log.warning("%s can't be read (%s); a new MLflow run is begun", file, error)
        return None
    if re.fullmatch(r"[0-9A-Za-z_-]{8,64}", text):
        return text
    log.warning("%s holds no id of an MLflow run, but %r; a new run is begun", file, text[:40])
    return None


def find_run_id(checkpoint: Path) -> str | None:
    """Find the id of the MLflow run that made a checkpoint, a run folder or an export; None if none is noted.

    The id lies in the run folder, which is the checkpoint's or up to two folders above it, and in an export.
    """
    folder = checkpoint.expanduser().absolute()
    for place in (folder, *folder.parents[:2]):
        run_id = read_run_id(place / RUN_ID)
        if run_id is not None:
            return run_id
    return None


def describe_end(end: BaseException) -> str:
    """Describe how a run ends that raises: killed by a signal, or failed."""
    by_signal = isinstance(end, SystemExit) and isinstance(end.code, int) and end.code >= 128
    return "killed" if by_signal or isinstance(end, KeyboardInterrupt) else "failed"
