"""The judge behind an endpoint: what is sent, and how often it is tried."""

import math
from collections.abc import Iterator
from typing import Any

import pytest

from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.corebench import CoReBench
from tbac.evaluation.benchmarks.gedit import GEdit
from tbac.evaluation.benchmarks.geneval2 import GenEval2
from tbac.evaluation.benchmarks.imgedit import ImgEdit
from tbac.evaluation.benchmarks.longtext import LongText
from tbac.evaluation.benchmarks.tiif import TIIF
from tbac.evaluation.benchmarks.unigenbench import UniGenBench
from tbac.evaluation.benchmarks.wise import WISE
from tbac.evaluation.judges.base import JudgeError, Manner, use_manner
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
