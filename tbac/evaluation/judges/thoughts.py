"""The thoughts of models that think before they reply: they are no part of the reply."""

import re

# As models mark them: <think>, <thinking>, <THINK>, <thought>, <seed:think>, [THINK], ◁think▷.
_NAME = r"(?:[a-z]+:)?(?:think|thinking|thoughts?)"
OPENING = re.compile(rf"<{_NAME}>|\[think\]|◁think▷", re.IGNORECASE)
CLOSING = re.compile(rf"</{_NAME}>|\[/think\]|◁/think▷", re.IGNORECASE)


def remove_thoughts(text: str) -> str | None:
    """Return what follows the last thought, without the space around it; None when a thought has no end.

    The template of a prompt may have begun the thoughts, so that the text holds their end alone.
    """
    ends = [match.end() for match in CLOSING.finditer(text)]
    reply = text[ends[-1] :] if ends else text
    return None if OPENING.search(reply) else reply.strip()
