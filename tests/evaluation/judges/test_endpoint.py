"""The judge behind an endpoint: what is sent, and how often it is tried."""

from collections.abc import Iterator
from typing import Any

import pytest

from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.judges.endpoint import EndpointJudge
from tests.helpers.endpoint import Server, make_completion, serve_endpoint
from tests.helpers.pictures import make_noise_image


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve_endpoint(monkeypatch) as running:
        yield running


def test_the_endpoint_is_asked_at_temperature_zero_with_the_pictures(server: Server) -> None:
    server.answers = [make_completion(" yes ")]
    judge = EndpointJudge("m", max_retries=1, timeout=2)
    assert judge.ask("a cat?", [make_noise_image(1), make_noise_image(2)]) == "yes"
    (request,) = server.requests
    assert request["temperature"] == 0
    assert request["key"] == "Bearer secret"
    content = request["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "secret" not in judge.identity


@pytest.mark.parametrize(
    "answer",
    [
        (429, {"error": "slow down"}),
        (500, "broken"),
        (503, ""),
        "garbage",
        {},
        make_completion(None),
        make_completion(""),
    ],
)
def test_what_fails_for_the_moment_is_tried_again(server: Server, answer: Any) -> None:
    server.answers = [answer, make_completion("no")]
    assert EndpointJudge("m", max_retries=1, timeout=2).ask("a cat?", [make_noise_image(1)]) == "no"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "answer", [(429, {"error": "slow down"}), (500, "broken"), "garbage", {}, make_completion(None), make_completion(3)]
)
def test_what_keeps_failing_ends_after_so_many_tries(server: Server, answer: Any) -> None:
    server.answers = [answer]
    with pytest.raises(JudgeError):
        EndpointJudge("m", max_retries=2, timeout=2).ask("a cat?", [make_noise_image(1)])
    assert len(server.requests) == 3


def test_all_kinds_of_failure_share_one_number_of_tries(server: Server) -> None:
    server.answers = [
        (500, "broken"),
        make_completion(""),
        (429, {"error": "slow down"}),
        make_completion(None),
        make_completion("no"),
    ]
    with pytest.raises(JudgeError, match="holds no text"):
        EndpointJudge("m", max_retries=3, timeout=2).ask("a cat?", [make_noise_image(1)])
    assert len(server.requests) == 4
    assert EndpointJudge("m", max_retries=3, timeout=2).ask("a cat?", [make_noise_image(1)]) == "no"


def test_waits_grow_and_the_endpoint_may_ask_for_its_own(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    waited: list[float] = []
    monkeypatch.setattr("tbac.evaluation.judges.endpoint.time.sleep", waited.append)
    monkeypatch.setattr("tbac.evaluation.judges.endpoint.LONGEST_WAIT", 0.04)
    server.answers = [(500, "broken")]
    with pytest.raises(JudgeError):
        EndpointJudge("m", max_retries=4, timeout=2).ask("a cat?", [make_noise_image(1)])
    assert waited == [0, 0.01, 0.02, 0.04, 0.04]
    server.headers = {"Retry-After": "7"}
    waited.clear()
    with pytest.raises(JudgeError):
        EndpointJudge("m", max_retries=1, timeout=2).ask("a cat?", [make_noise_image(1)])
    assert waited == [0, 7]


def test_a_wrong_key_is_not_tried_again(server: Server) -> None:
    server.answers = [(401, {"error": {"message": "who are you"}})]
    with pytest.raises(JudgeError, match="who are you"):
        EndpointJudge("m", max_retries=2, timeout=2).ask("a cat?", [make_noise_image(1)])
    assert len(server.requests) == 1


def test_an_endpoint_that_says_nothing_or_isnt_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = ["nothing"]
    with pytest.raises(JudgeError, match="timed out"):
        EndpointJudge("m", max_retries=1, timeout=0.2).ask("a cat?", [make_noise_image(1)])
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(JudgeError, match="Connection error"):
        EndpointJudge("m", max_retries=1, timeout=1).ask("a cat?", [make_noise_image(1)])


def test_address_and_key_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="judge=endpoint needs OPENAI_BASE_URL and OPENAI_API_KEY"):
        EndpointJudge("m")
