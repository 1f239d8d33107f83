"""`--help` of a command: its own options and those of its groups, with the comments that explain them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

HIDDEN = ("defaults", "hydra", "architecture")  # blocks of a config that are of no use to whoever asks for help
WORDS = """Each line above is an option: give it as NAME=VALUE, one below a group as stage.lr=1e-4, and choose a file of
a group as taps=uniform. -m with several values (taps=uniform,final) runs every combination. --cfg job --resolve prints
what a command line comes to. Groups, presets and sweeps: conf/README.md. Powered by Hydra (https://hydra.cc)."""


def describe_options(conf: Path, name: str, script: str, arguments: Sequence[str] = ()) -> str:
    """Describe the options of a command.

    Args:
        conf: the folder of all configs.
        name: of the command's file in it.
        script: the command, as its user calls it.
        arguments: of the command line; a group that is chosen in them is shown as chosen.
    """
    file = conf / f"{name}.yaml"
    chosen = dict(argument.split("=", 1) for argument in arguments if re.match(r"[\w/@]+=", argument))
    parts = [strip_blocks(file.read_text()), f"usage: python {script} NAME=VALUE …"]
    choosable = []
    groups = list_groups(file, chosen)
    for group, choice in groups.items():
        folder = conf / group.split("@")[0]
        others = sorted(other.stem for other in folder.glob("*.yaml"))
        if choice is None:
            choosable.append(f"{group}: {', '.join(others)}")
            continue
        found = folder / f"{fill_in(choice, groups)}.yaml"
        if found.is_file():
            title = f"{group}={fill_in(choice, groups)}"
            among = f"   (of {', '.join(others)})" if len(others) > 1 else ""
            parts.append("\n".join([f"== {title}{among}", *read_with_bases(found)]))
    if choosable:
        parts.append("\n".join(["== and, if you name one", *choosable]))
    return "\n\n".join([*parts, WORDS])


def list_groups(file: Path, chosen: Mapping[str, str]) -> dict[str, str | None]:
    """List the groups of a command's defaults: group (with its package) -> file of it, or None for none."""
    groups: dict[str, str | None] = {}
    for entry in read_defaults(file):
        for group, choice in entry.items() if isinstance(entry, Mapping) else ():
            if not group.startswith(("override ", "optional ")):
                groups[group] = chosen.get(group.split("@")[0], choice) if "@" not in group else choice
    # A world chooses its model, unless one is named.
    world = file.parent / "world" / f"{groups.get('world')}.yaml"
    for entry in read_defaults(world) if world.is_file() else ():
        for group, choice in entry.items() if isinstance(entry, Mapping) else ():
            group = group.removeprefix("override /")
            if group in groups and group not in chosen:
                groups[group] = choice
    return groups


def read_defaults(file: Path) -> list[Any]:
    """Read the defaults list of a config."""
    config = yaml.safe_load(file.read_text())
    return list(config.get("defaults") or []) if isinstance(config, Mapping) else []


def read_with_bases(file: Path) -> Iterator[str]:
    """Read the text of a group's file, and before it those of its folder that it builds on."""
    for entry in read_defaults(file):
        base = file.parent / f"{str(entry).split('@')[0]}.yaml"
        if isinstance(entry, str) and entry != "_self_" and base.is_file():
            yield from read_with_bases(base)
    text = strip_blocks(file.read_text())
    if text:
        yield text


def fill_in(choice: str, groups: Mapping[str, str | None]) -> str:
    """Fill in the names of other groups' files, as in `${world}/${stage}`."""
    return re.sub(r"\$\{(\w+)\}", lambda match: str(groups.get(match[1])), choice)


def strip_blocks(text: str) -> str:
    """Strip the blocks that are of no use to whoever asks for help."""
    kept, hidden = [], False
    for line in text.splitlines():
        if re.match(r"[\w/]+:", line):
            hidden = line.split(":")[0] in HIDDEN
        elif not line.startswith((" ", "-", "#")) and line.strip():
            hidden = False
        if not hidden and not line.startswith("# @package"):
            kept.append(line)
    return "\n".join(kept).strip()
