"""Trying the chat template of an MLLM's folder in a process of its own, before it is used.

A chat template is a program in Jinja, and one from elsewhere may run without end or fill the memory. The library's
sandbox forbids neither. So it is rendered once in a process that the system ends after some seconds or some memory.
"""

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

from tbac.files import ForeignFileError

SECONDS, BYTES, MAX_CHARACTERS = 2, 2**29, 2**20
PROGRAM = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
from jinja2.sandbox import ImmutableSandboxedEnvironment
template, conversations = json.load(sys.stdin)
options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
environment = ImmutableSandboxedEnvironment(**options)
environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
environment.globals.update(raise_exception=lambda message: 1 / 0, strftime_now=lambda form: "")
compiled = environment.from_string(template)
for messages in conversations:
    written = 0
    for piece in compiled.generate(messages=messages, add_generation_prompt=True):
        written += len(piece)
        assert written <= int(sys.argv[3]), "it writes too much"
"""


def make_conversation(images: int, system: str, text: str) -> list[dict[str, Any]]:
    """Make the messages of a prompt: a system message, and the user's images and text."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
    content.append({"type": "text", "text": text})
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


@lru_cache
def check_chat_template(template: str, system: str, place: str) -> None:
    """Raise ForeignFileError for a chat template that can't be rendered within seconds and megabytes.

    Args:
        template: Jinja's text.
        system: the system message of the prompts that it will be used for.
        place: the folder, for messages.
    """
    if len(template) > MAX_CHARACTERS:
        raise ForeignFileError(f"{place}: its chat template has {len(template)} characters, at most {MAX_CHARACTERS}")
    conversations = [make_conversation(images, system, "a text") for images in (0, 1, 3)]
    command = [sys.executable, "-I", "-c", PROGRAM, str(SECONDS), str(BYTES), str(MAX_CHARACTERS)]
    try:
        # More than the time of the processor, since others may use it too.
        done = subprocess.run(
            command,
            input=json.dumps([template, conversations]),
            capture_output=True,
            text=True,
            timeout=4 * SECONDS,
            check=False,
        )
        failed, reason = done.returncode != 0, done.stderr
    except subprocess.TimeoutExpired:
        failed, reason = True, ""
    if failed:
        lines = reason.strip().splitlines() or [f"it took more than {SECONDS} s"]
        raise ForeignFileError(f"{place}: its chat template can't be rendered ({lines[-1][:200]})")
