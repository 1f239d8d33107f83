"""A local stand-in for an OpenAI-compatible endpoint."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def make_completion(content: Any, probabilities: Any = None, model: str = "m", finish: str = "stop") -> dict:
    """Make the reply of an endpoint; `probabilities` maps tokens to their natural logarithms, or is anything else."""
    message = {"role": "assistant", "content": content}
    logprobs = probabilities
    if isinstance(probabilities, dict):
        listed = [{"token": token, "logprob": value, "bytes": None} for token, value in probabilities.items()]
        logprobs = {"content": [{**listed[0], "top_logprobs": listed}]}
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}],
    }  # fmt: skip


class Server(http.server.ThreadingHTTPServer):
    """Answers requests with `answers`, one after the other; the last one is repeated.

    An answer is the body of a reply (a text, or what is written as JSON), a pair of HTTP status and body, or the word
    "nothing", at which the client waits in vain.
    """

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.requests: list[dict] = []
        self.headers: dict[str, str] = {}
        self.gone = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body | {"key": self.headers["Authorization"]})
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer == "nothing":
            self.server.gone.wait(5)
            return
        status, content = answer if isinstance(answer, tuple) else (200, answer)
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serve_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a server, point the environment's variables to it, and let clients try again almost at once."""
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr("tbac.evaluation.judges.endpoint.FIRST_WAIT", 0.01)
    monkeypatch.setattr("tbac.evaluation.judges.endpoint.LONGEST_WAIT", 0.02)
    yield server
    server.gone.set()
    server.shutdown()
