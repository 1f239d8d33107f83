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
USER = re.compile(r"(?<=://)(?:[^\s/?#'\"@]*@)+|(?<=://)[^\s/?#'\":@]*:(?!\d+(?:[/?#]|$))[^\s'\"]*@")
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
    if "://" in text:
        text = USER.sub(f"{HIDDEN}@", text)
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


class HideSecrets(logging.Filter):
    """Hides secrets in every message of a log handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # a message that doesn't fit its arguments; the handler reports it
            return True
        record.msg, record.args = hide_in_text(message), None
        return True


def hide_secrets_in_logs() -> None:
    """Let the handlers of the root logger hide secrets; calling it again changes nothing."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, HideSecrets) for known in handler.filters):
            handler.addFilter(HideSecrets())
