"""Messages for users: a mistake ends a command with one message, and an error of ours keeps its traceback."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tbac.redaction import hide_in_text

USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException, yaml.YAMLError)
# Variable that names a folder, its usual name, and what makes it.
MADE = (
    ("TBAC_SHAPES", "outputs/shapes", "make it with: python data_prep/shapes/build.py (make demo makes it too)"),
    ("TBAC_WORDS", "outputs/words", "make it with: make words"),
    ("", "outputs/demo", "make it with: make demo"),
)
# By name, since their packages take seconds to import: what Lightning says of its options, and a cluster of a job.
OF_PACKAGES = ("MisconfigurationException", "FailedJobError", "FailedSubmissionError")


def find_cause(error: BaseException) -> BaseException:
    """Return the error that Hydra wrapped in one of its own."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_user_error(error: BaseException) -> bool:
    """Whether an error says what a user, a file or the machine got wrong; False where a traceback was asked for."""
    if os.environ.get("TBAC_TRACEBACK"):
        return False
    return isinstance(find_cause(error), USER_ERRORS) or type(error).__name__ in OF_PACKAGES


def describe_error(error: BaseException) -> str:
    """Describe a user's mistake in one message."""
    if isinstance(error, HydraException) and "Could not override" in str(error):
        return _describe_override(error)
    cause = find_cause(error)
    if "Config group override must be" in str(cause):
        return _describe_group(sys.argv)
    if isinstance(cause, OverrideParseException):
        reason = str(cause).splitlines()[0].removesuffix(cause.override).strip(" :")
        return f"{cause.override} can't be read ({reason}); put the value in quotes, as 'key=\"value\"'"
    if isinstance(cause, OmegaConfBaseException):
        # OmegaConf adds the types of its own nodes, of which only the name of the option says anything.
        words = (cause.msg or str(cause)).splitlines()[0].strip()
        option = cause.full_key or ""
        return words if not option or option in words else f"{option}: {words}"
    if isinstance(cause, HydraException):
        return _shorten_composition(str(cause))
    if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark is not None:
        mark = cause.problem_mark
        return f"{mark.name}, line {mark.line + 1}, isn't YAML: {cause.problem}"
    if isinstance(cause, UnicodeDecodeError):
        return f"a file isn't UTF-8 text: {cause}"
    return str(cause).strip() or type(cause).__name__


def _describe_override(error: BaseException) -> str:
    """Say that an option isn't there, without the advice to add it, which would be refused too."""
    named = re.search(r"Could not override '([^']+)'", str(error))
    reason = str(error.__cause__ or "").strip().splitlines()
    words = f" ({reason[0]})" if reason else ""
    option = named[1] if named else "it"
    return f"{option} isn't an option of this command{words}; --help lists them"


def _describe_group(arguments: Sequence[str]) -> str:
    """Say which group was chosen by what isn't a name; Hydra's own message doesn't."""
    for argument in arguments:
        group, _, value = argument.lstrip("+").partition("=")
        if value == "null" and "." not in group:
            return f"{group} is needed, and can't be null: choose one of the group by its name, {group}=NAME"
    return "a group is chosen by the name of one of its files, GROUP=NAME"


def _shorten_composition(text: str) -> str:
    """Put the options of a group in one line, and leave out where Hydra has looked for them."""
    text = text.split("Config search path")[0].split("\nSee https://hydra.cc")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    joined = " ".join(lines)
    head, options, names = joined.partition("Available options in ")
    if not options:
        return joined
    group, _, listed = names.partition(":")
    return f"{head}{options}{group}: {', '.join(listed.split())}"


def report_user_errors(main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorate a command: a user's mistake ends it with one message and exit status 1.

    With TBAC_TRACEBACK=1 in the environment the traceback is shown instead.
    """

    @wraps(main)
    def guarded(cfg: DictConfig) -> Any:
        try:
            return main(cfg)
        except Exception as error:
            if not is_user_error(error):
                raise
            print_error(describe_error(error))
            sys.exit(1)

    return guarded


def print_error(message: str) -> None:
    """Print the message that a command ends with, and how what is missing is made."""
    print("\n".join([f"error: {hide_in_text(message)}", *list_hints(message)]), file=sys.stderr)


def list_hints(message: str) -> list[str]:
    """List the commands that make the folders which a message names and which aren't there."""
    hints = []
    for variable, usual, made_by in MADE:
        folder = os.environ.get(variable) or usual
        if re.search(rf"(?<![\w/]){re.escape(folder)}(?![\w-])", message) and not Path(folder).expanduser().exists():
            hints.append(f"{folder} isn't there yet; {made_by}")
    return hints
