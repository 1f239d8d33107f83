"""What is said of a run's progress: on a terminal, and in a log file."""

import io
import logging
import re
from typing import Any

import pytest
from rich.progress import Progress

from tbac.models import UniImage
from tbac.training.callbacks.progress import LiveLine, ProgressLine
from tests.helpers.training import make_data, make_module, make_trainer

LINE = re.compile(
    r"t2i_pretrain (\d+)/8 \((\d+)%\), (at most )?0:00:\d\d left: "
    r"loss \d\.\d{4}, lr [\d.e-]+, norm [\d.e-]+, [\d.e+]+ samples/s"
)


def train(model: UniImage, callback: ProgressLine, **options: Any) -> None:
    make_trainer(8, callbacks=[callback], log_every_n_steps=1).fit(
        make_module(model, steps=8, **options), datamodule=make_data(model)
    )


def test_plain_lines_say_how_far_training_is(model: UniImage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(model, ProgressLine(seconds=1e-9))
    found = [match for message in caplog.messages if (match := LINE.fullmatch(message))]
    assert [int(match[1]) for match in found] == list(range(2, 9))  # the first step warms up
    assert found[-1][2] == "100"
    assert not any(match[3] for match in found)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(model, ProgressLine(seconds=3600))
    assert not [message for message in caplog.messages if LINE.fullmatch(message)]


def test_a_stage_that_may_end_earlier_says_so(model: UniImage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(model, ProgressLine(seconds=1e-9), patience=5)
    assert all(match[3] for message in caplog.messages if (match := LINE.fullmatch(message)))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_live_line_and_what_is_logged_scrolls_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    handler, gone = logging.StreamHandler(stream), logging.StreamHandler(io.StringIO())
    gone.stream.close()  # as that of a pipe whose reader has gone
    for one in (gone, handler):
        logging.getLogger().addHandler(one)
    try:
        line = LiveLine(stream)
        logging.getLogger().removeHandler(gone)
        assert isinstance(line.progress, Progress)
        line.show("finetune", 3, 12, ["0:01:00 left", "loss 0.1"])
        line.progress.refresh()
        logging.getLogger().warning("something happened")
        line.stop()
        assert handler.stream is stream
    finally:
        for one in (gone, handler):
            logging.getLogger().removeHandler(one)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "finetune" in shown
    assert "3/12  0:01:00 left  loss 0.1" in shown
    assert "something happened\n" in shown
