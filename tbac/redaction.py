"""Secrets stay out of what is written: passwords and keys in addresses, in commands and under telling names.

Whoever writes a config, a message or a report passes it through `hide_secrets` first.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
WORDS = r"pass(?:word|wd|phrase)?|pwd|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?|credentials?|signature|sig"

# `scheme://user:password@host`. The first form ends where the address of a host must begin; the second one allows for
# passwords that weren't escaped, but takes no port for a password.
# A path that was made of an address has one slash.
USER = re.compile(r"(\w:/{1,2})(?:(?:[^\s/?#'\"@]*@)+|[^\s/?#'\":@]*:(?!\d+(?:[/?#]|$))[^\s'\"]*@)")
# `?token=…&X-Amz-Signature=…`, and the same as `--password …` or `Authorization: …` in a command.
QUERY = re.compile(rf"([?&;][\w.-]*?(?:{WORDS}|[_-]key|^key)=)[^\s&;'\"]+", re.IGNORECASE)
OPTION = re.compile(rf"(--[\w-]*?(?:{WORDS})(?:=|\s+))[^\s'\"]+", re.IGNORECASE)
HEADER = re.compile(
    r"((?:authorization|x-[\w-]*(?:token|key|signature))\s*:\s*(?:bearer|basic|token)?\s*)[^\s'\"]+", re.IGNORECASE
)
# Keys of a config whose values are secret whatever they look like.
KEY = re.compile(rf"(?:.*[_-])?(?:{WORDS})", re.IGNORECASE)


def hide_in_text(text: str) -> str:
    """Replace the secrets in a text by `***`; a text without any is returned as it is."""
    if ":/" in text:
        text = USER.sub(rf"\g<1>{HIDDEN}@", text)
        text = QUERY.sub(rf"\g<1>{HIDDEN}", text)
    text = OPTION.sub(rf"\g<1>{HIDDEN}", text)
    return HEADER.sub(rf"\g<1>{HIDDEN}", text)


def hide_secrets(value: Any) -> Any:
    """Copy plain data (mappings, lists, texts, numbers) with all secrets in it replaced by `***`."""
    if isinstance(value, str):
        return hide_in_text(value)
    if isinstance(value, Mapping):
        hidden = {}
        for name, inner in value.items():
            is_secret = isinstance(inner, str) and inner and KEY.fullmatch(str(name))
            hidden[hide_in_text(name) if isinstance(name, str) else name] = HIDDEN if is_secret else hide_secrets(inner)
        return hidden
    if isinstance(value, list | tuple):
        return [hide_secrets(inner) for inner in value]
    return value


def hide_in_record(record: logging.LogRecord) -> logging.LogRecord:
    """Hide secrets in the message of a log record."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # a message that doesn't fit its arguments; its handler reports it
        return record
    hidden = hide_in_text(message)
    if hidden != message:
        record.msg, record.args = hidden, None
    return record


def hide_secrets_in_logs() -> None:
    """Let every log message of this process hide secrets; calling it again changes nothing."""
    before = logging.getLogRecordFactory()
    if getattr(before, "hides_secrets", False):
        return

    def make_record(*args: Any, **options: Any) -> logging.LogRecord:
        return hide_in_record(before(*args, **options))

    make_record.hides_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_record)
