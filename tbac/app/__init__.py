"""What the commands share: options and their check, messages for users, run folders, sweeps, opening a model.

Every command imports this first. It imports neither torch nor a model library at the top, so that `--help` and a
mistake in the config are answered at once. `kinds.py` has the kinds of values, `groups.py` what a group of conf/ may
hold; `parts.py` (of training), `machine_parts.py`, `scoring_parts.py`, `dataset_parts.py` and, for each command,
`options.py` say what each option accepts.
"""

from tbac.app.arguments import quote
from tbac.app.command import (
    CONF,
    check,
    command,
    compose_as_given,
    compose_checked,
    describe_command,
    get_run_folder,
    record_config,
    to_plain,
)
from tbac.app.errors import report_user_errors
from tbac.app.folders import claim_folder, name_point
from tbac.app.making import check_members, check_target, make_part
from tbac.app.multirun import FAILED, note_failure, read_varied_overrides
from tbac.app.opening import keep_freed_memory, open_model, pick_device, read_opening_options

__all__ = [
    "CONF",
    "FAILED",
    "check",
    "check_members",
    "check_target",
    "claim_folder",
    "command",
    "compose_as_given",
    "compose_checked",
    "describe_command",
    "get_run_folder",
    "keep_freed_memory",
    "make_part",
    "name_point",
    "note_failure",
    "open_model",
    "pick_device",
    "quote",
    "read_opening_options",
    "read_varied_overrides",
    "record_config",
    "report_user_errors",
    "to_plain",
]
