"""The judge behind an endpoint: what is sent, and how often it is tried."""

import logging
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.corebench import CoReBench
from tbac.evaluation.benchmarks.dpg import DPG
from tbac.evaluation.benchmarks.gedit import GEdit
from tbac.evaluation.benchmarks.geneval2 import GenEval2
from tbac.evaluation.benchmarks.imgedit import ImgEdit
from tbac.evaluation.benchmarks.longtext import LongText
from tbac.evaluation.benchmarks.tiif import TIIF
from tbac.evaluation.benchmarks.unigenbench import UniGenBench
from tbac.evaluation.benchmarks.wise import WISE
from tbac.evaluation.judges.base import JudgeError, JudgeRefusedError, Manner, use_manner
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


def make_refusal(status: int, message: str, code: str | None = None) -> tuple[int, dict]:
    return status, {"error": {"message": message, "code": code, "type": code}}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (make_refusal(401, "who are you"), r"check OPENAI_API_KEY \(AuthenticationError: .*401.*who are you"),
        (make_refusal(402, "pay"), "no credit"),
        (make_refusal(403, "not in your country"), "its key isn't allowed to"),
        (make_refusal(404, "no such model"), r"judge\.model=m; check judge\.model and OPENAI_BASE_URL"),
        (make_refusal(429, "You exceeded your current quota", "insufficient_quota"), "no credit .*current quota"),
        (make_refusal(400, "'temperature' does not support 0", "unsupported_value"), r"judge\.temperature"),
    ],
)
def test_what_fails_for_every_question_ends_all(server: Server, tmp_path: Path, answer: Any, said: str) -> None:
    """DPG-Bench asks every question about every picture, whatever became of the others."""
    server.answers = [answer]
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/a.txt").write_text("a cat")
    rows = [f"a,{number},0,entity - whole (cat),Is there a cat?" for number in range(1, 4)]
    columns = "item_id,proposition_id,dependency,tuple,question_natural_language"
    (tmp_path / "questions.csv").write_text("\n".join([columns, *rows]))
    dpg = DPG(name="dpg", file=str(tmp_path / "prompts"), questions=str(tmp_path / "questions.csv"))
    judge = dpg.prepare_judge(EndpointJudge("m", max_retries=3, timeout=2))
    with pytest.raises(JudgeRefusedError, match=said):
        list(dpg.judge_pictures(lambda target: make_noise_image(1), judge))
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 403, 422])
def test_what_is_wrong_with_one_picture_fails_it_alone(server: Server, status: int) -> None:
    server.answers = [make_refusal(status, "your input was flagged by moderation"), make_completion("yes")]
    judge = EndpointJudge("m", max_retries=2, timeout=2)
    with pytest.raises(JudgeError, match="flagged"):
        judge.ask("a cat?", [make_noise_image(1)])
    assert judge.ask("a cat?", [make_noise_image(2)]) == "yes"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "120"}, 120),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.01),  # past
        ({"Retry-After": "0.001"}, 0.01),  # not sooner than we would
        ({"Retry-After": "soon"}, 0.01),
        ({"Retry-After": "nan"}, 0.01),
        ({"Retry-After": "-1"}, 0.01),
    ],
)
def test_the_wait_that_is_asked_for_is_waited(
    monkeypatch: pytest.MonkeyPatch, server: Server, headers: dict[str, str], expected: float
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("tbac.evaluation.judges.endpoint.time.sleep", waited.append)
    server.answers, server.headers = [(429, "slow down"), make_completion("no")], headers
    assert EndpointJudge("m", max_retries=1, timeout=2).ask("a cat?", [make_noise_image(1)]) == "no"
    assert waited == [0, expected]


def test_a_date_to_wait_for_is_read_and_a_long_wait_ends_all(server: Server) -> None:
    server.answers = [(503, "busy")]
    server.headers = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)}
    with pytest.raises(JudgeRefusedError, match=r"it asks to wait 7\d\d\d seconds; go on later, all replies are kept"):
        EndpointJudge("m", max_retries=1, timeout=2).ask("a cat?", [make_noise_image(1)])


def test_models_that_call_the_limit_otherwise_are_asked_their_way(server: Server) -> None:
    """As newer models refuse it; the first refusal teaches all judges at this endpoint."""
    refusal = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    server.answers = [make_refusal(400, refusal, "unsupported_parameter"), make_completion("yes")]
    judge = EndpointJudge("m", max_retries=0, timeout=2)
    manner = judge.in_manner(Manner(max_tokens=7))
    assert manner.ask("a cat?", [make_noise_image(1)]) == "yes"
    assert judge.ask("a cat?", [make_noise_image(1)]) == "yes"
    limits = [(row.get("max_tokens"), row.get("max_completion_tokens")) for row in server.requests]
    assert limits == [(7, None), (None, 7), (None, 1024)]
    server.answers = [make_refusal(400, refusal, "unsupported_parameter")]
    with pytest.raises(JudgeRefusedError, match="max_completion_tokens"):
        judge.ask("a cat?", [make_noise_image(1)])


def test_what_the_user_sets_holds_against_a_benchmark_s_manner_and_is_stated(server: Server) -> None:
    server.answers = [make_completion("yes", {"Yes": -0.1})]
    judge = EndpointJudge("m", max_retries=0, timeout=2, max_tokens=9000, temperature=1).in_manner(
        Manner(temperature=0, max_tokens=500)
    )
    judge.ask("a cat?", [make_noise_image(1)])
    assert (server.requests[-1]["max_tokens"], server.requests[-1]["temperature"]) == (9000, 1)
    assert judge.describe_facts().settings == "no system message, temperature 1, at most 9000 tokens"
    judge.compute_probability("a cat?", [make_noise_image(1)], ["yes"])
    assert server.requests[-1]["max_tokens"] == 1  # only the first token is of use


def test_replies_in_parts_are_joined_and_show_no_key(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    parts = [
        {"type": "thinking", "thinking": "no?"},
        {"type": "text", "text": "yes, "},
        {"type": "text", "text": "it is"},
    ]
    server.answers = [make_completion(parts), make_completion("yes (sk-secret-123)")]
    judge = EndpointJudge("m", max_retries=0, timeout=2)
    with caplog.at_level(logging.INFO):
        assert judge.ask("a cat?", [make_noise_image(1)]) == "yes, it is"
        assert judge.ask("a cat?", [make_noise_image(1)]) == "yes (***)"
    assert not caplog.records  # not a line for each of thousands of requests


def test_an_endpoint_that_says_nothing_or_isnt_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = ["nothing"]
    with pytest.raises(JudgeError, match="timed out"):
        EndpointJudge("m", max_retries=1, timeout=0.2).ask("a cat?", [make_noise_image(1)])
    # One that was never reached won't be for the next question; one that was may come back.
    server.answers = [make_completion("yes")]
    reached = EndpointJudge("m", max_retries=0, timeout=2)
    assert reached.ask("a cat?", [make_noise_image(1)]) == "yes"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    absent = EndpointJudge("m", max_retries=1, timeout=1)
    with pytest.raises(JudgeRefusedError, match=r"check OPENAI_BASE_URL=http://127.0.0.1:9/v1/ .*Connection error"):
        absent.ask("a cat?", [make_noise_image(1)])
    reached._client = absent._client
    with pytest.raises(JudgeError, match="Connection error"):
        reached.ask("a cat?", [make_noise_image(1)])


def test_address_and_key_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="judge=endpoint needs OPENAI_BASE_URL and OPENAI_API_KEY"):
        EndpointJudge("m")


SEVEN = ["seven", "Seven", " seven", " Seven", "7", " 7"]


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ({"seven": 0.5, " seven": 0.2, "7": 0.1, "six": 0.2}, 0.8),
        ({"se": 0.6, "six": 0.3, "s": 0.1}, 0.6),  # as tokenizers cut words; one letter could be any
        ({"six": 1.0}, 0.0),
        ({"seven": 1.0}, 1.0),
    ],
)
def test_probabilities_of_answers_add_up(server: Server, probabilities: dict, expected: float) -> None:
    logs = {token: math.log(value) for token, value in probabilities.items()}
    server.answers = [make_completion("seven", logs, "other-name")]
    judge = EndpointJudge("m", max_retries=0, timeout=2).in_manner(Manner(temperature=0, max_tokens=1))
    assert judge.compute_probability("how many?", [make_noise_image(1)], SEVEN) == pytest.approx(expected)
    (request,) = server.requests
    assert (request["logprobs"], request["top_logprobs"], request["max_tokens"]) == (True, 20, 1)
    assert judge.describe_facts().name == "other-name"


@pytest.mark.parametrize(
    "logprobs",
    [None, {}, [], "x", {"content": []}, {"content": None}, {"content": [{"token": "a", "logprob": 0.0}]}, 7],
)
def test_no_probabilities_and_garbage_are_told(server: Server, logprobs: Any) -> None:
    server.answers = [make_completion("seven", logprobs if not isinstance(logprobs, dict) else None)]
    if isinstance(logprobs, dict):
        server.answers[0]["choices"][0]["logprobs"] = logprobs
    with pytest.raises(JudgeError, match=r"no probabilities|isn't a chat completion"):
        EndpointJudge("m", max_retries=1, timeout=2).compute_probability("how many?", [make_noise_image(1)], SEVEN)
    assert len(server.requests) == 2


@pytest.mark.parametrize("value", [math.nan, "high", None, 5.0])
def test_probabilities_that_are_none_are_refused_or_bounded(server: Server, value: Any) -> None:
    server.answers = [make_completion("seven", {"seven": value})]
    judge = EndpointJudge("m", max_retries=0, timeout=2)
    if value == 5.0:  # a logarithm above 0 can only be a rounding
        assert judge.compute_probability("how many?", [make_noise_image(1)], SEVEN) == 1
    else:
        with pytest.raises(JudgeError):
            judge.compute_probability("how many?", [make_noise_image(1)], SEVEN)


def test_a_manner_is_sent_and_what_isn_t_in_it_isn_t(server: Server) -> None:
    server.answers = [make_completion("<think>well, yes</think>\nno")]
    judge = EndpointJudge("m", max_retries=0, timeout=2)
    strict = judge.in_manner(Manner(system="be strict", extra={"chat_template_kwargs": {"enable_thinking": False}}))
    assert strict.ask("a cat?", [make_noise_image(1)]) == "no"
    (request,) = server.requests
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert not {"temperature", "max_tokens"} & set(request)
    assert strict.identity != judge.identity


@pytest.mark.parametrize("benchmark", [GenEval2, CoReBench, LongText, UniGenBench, GEdit, ImgEdit, TIIF, WISE])
def test_pictures_stand_where_the_published_script_has_them(server: Server, benchmark: type[PictureBenchmark]) -> None:
    """In the scripts of GenEval 2, T2I-CoReBench and LongText-Bench before the question, in the others after it."""
    server.answers = [make_completion("yes", {"yes": -0.1})]
    judge = use_manner(EndpointJudge("m", max_retries=0, timeout=2), benchmark.published_manner)
    for ask in (judge.ask, lambda *asked: judge.compute_probability(*asked, ["yes"])):
        ask("a cat?", [make_noise_image(1), make_noise_image(2)])
        parts = [part["type"] for part in server.requests[-1]["messages"][-1]["content"]]
        is_first = benchmark in (GenEval2, CoReBench, LongText)
        assert parts == (["image_url", "image_url", "text"] if is_first else ["text", "image_url", "image_url"])
    assert judge.identity.endswith("pictures first)") == is_first  # replies that were kept aren't mixed up


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>well, yes</think>\n\nno", "no"),
        ("well, yes</think>\n\nno", "no"),  # a template may begin the thoughts
        ("The answer is yes only if there is a cat.\n</think>\n\nno", "no"),
        ("<think>a</think>\n<think>b</think>yes", "yes"),
        ("<think>a</think>\n<think>yes, since", None),
        ("<think>yes, since", None),  # the length ended them
        ("<thinking>yes?</thinking>no", "no"),
        ("<THINK>yes?</THINK>no", "no"),
        ("[THINK]yes?[/THINK]no", "no"),
        ("◁think▷yes?◁/think▷no", "no"),
        ("<thinking>yes", None),
        ("</think>", None),
    ],
)
def test_thoughts_are_no_reply(server: Server, reply: str, expected: str | None) -> None:
    """As T2I-CoReBench reads models that think (KlingTeam/T2I-CoReBench, ebf7b7a0)."""
    server.answers = [make_completion(reply)]
    judge = EndpointJudge("m", max_retries=0, timeout=2)
    if expected is not None:
        assert judge.ask("a cat?", [make_noise_image(1)]) == expected
    else:
        with pytest.raises(JudgeError, match=r"holds no text|within its thoughts"):
            judge.ask("a cat?", [make_noise_image(1)])


@pytest.mark.parametrize("benchmark", [CoReBench, WISE, UniGenBench, GEdit, ImgEdit])
def test_a_cut_reply_is_no_verdict_where_it_may_stand_anywhere(
    server: Server, benchmark: type[PictureBenchmark]
) -> None:
    """Thoughts whose beginning was in the template, and whose end was cut off, look like a reply."""
    server.answers = [make_completion("The answer is yes only if", finish="length")]
    judge = use_manner(EndpointJudge("m", max_retries=1, timeout=2), benchmark.published_manner)
    with pytest.raises(JudgeError, match="cut at the longest length") as error:
        judge.ask("a cat?", [make_noise_image(1)])
    assert error.value.replies == ["The answer is yes only if"]
    # At temperature 0 it would be cut again.
    manner = benchmark.published_manner
    assert len(server.requests) == (1 if manner and manner.temperature == 0 else 2)
    server.answers = [make_completion("yes")]
    assert judge.ask("a cat?", [make_noise_image(1)]) == "yes"


def test_a_cut_reply_counts_where_its_beginning_says_enough(server: Server) -> None:
    """Yes or no, which DPG-Bench's questions ask for, and text that is read, as LongText-Bench's script takes it."""
    server.answers = [make_completion("Yes, the", finish="length")]
    judge = EndpointJudge("m", max_retries=0, timeout=2, max_tokens=3)
    assert judge.ask("a cat?", [make_noise_image(1)]) == "Yes, the"
    assert use_manner(judge, LongText.published_manner).ask("what?", [make_noise_image(1)]) == "Yes, the"
    server.answers = [make_completion("", finish="length")]  # as a server sends it that keeps thoughts to itself
    with pytest.raises(JudgeError, match="cut at the longest length"):
        judge.ask("a cat?", [make_noise_image(1)])
    server.answers = [make_completion(None, finish="content_filter")]
    with pytest.raises(JudgeError, match=r"holds no text \(content_filter\)"):
        judge.ask("a cat?", [make_noise_image(1)])


YES, ONE, TEN = ["Yes", "yes", " yes", " Yes"], ["one", "One", " one", "1", " 1"], ["ten", "Ten", "10", " 10"]


@pytest.mark.parametrize(
    ("probabilities", "answers", "expected"),
    [
        ({"▁Yes": 0.6, "Ġyes": 0.2, "Yes": 0.1, "No": 0.1}, YES, 0.9),  # spaces as tokenizers write them
        ({"Y": 0.9, "N": 0.1}, YES, 0.9),
        ({"YES": 0.7, "NO": 0.3}, YES, 0.7),
        ({"No": 1.0}, YES, 0.0),
        ({"The": 0.97, "Yes": 0.03}, YES, 0.03),
        ({"One": 0.5, "On": 0.4, "2": 0.1}, ONE, 0.5),  # "On the table"
        ({"Seven": 0.9, "1": 0.1}, ONE, 0.1),
        ({"1": 0.9, "10": 0.1}, TEN, 0.1),  # a one may be the whole number
    ],
)
def test_first_tokens_are_read_as_answers(server: Server, probabilities: dict, answers: list, expected: float) -> None:
    logs = {token: math.log(value) for token, value in probabilities.items()}
    server.answers = [make_completion("x", logs)]
    judge = EndpointJudge("m", max_retries=0, timeout=2)
    assert judge.compute_probability("?", [make_noise_image(1)], answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("probabilities", "answers", "said"),
    [
        ({"<think>": 1.0, "Yes": 1e-9}, YES, "begins with thoughts, '<think>'"),
        ({"token_id:9454": 0.9, "token_id:2753": 0.1}, YES, "its likeliest first tokens are 'token_id:9454', "),
        ({"The": 0.999, "Yes": 0.001}, YES, "doesn't begin with an answer"),
        ({"On": 0.8, "There": 0.2}, ONE, "doesn't begin with an answer"),
    ],
)
def test_a_reply_that_doesnt_begin_with_an_answer_is_told(
    server: Server, probabilities: dict, answers: list, said: str
) -> None:
    """A probability of 0 would say that the picture is wrong."""
    logs = {token: math.log(value) for token, value in probabilities.items()}
    server.answers = [make_completion("x", logs)]
    with pytest.raises(JudgeError, match=said):
        EndpointJudge("m", max_retries=3, timeout=2).compute_probability("?", [make_noise_image(1)], answers)
    assert len(server.requests) == 1
