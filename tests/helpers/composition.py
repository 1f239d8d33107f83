"""Lets Hydra compose each choice of groups once in a session.

For every command Hydra reads some eighty files, twice. What it makes of them follows from the groups that are chosen,
and the values of a command line are put in afterwards. So both steps that read files are done once for each choice,
where all files are the repository's own; a folder that a test adds is read every time.
"""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from tests.helpers.configs import ROOT

OURS = (ROOT / "conf").resolve()


def list_places(repository: Any) -> tuple[tuple[str, str], ...]:
    """List where a repository of configs reads: the kind of each source, and its path."""
    return tuple((source.scheme(), source.path) for source in repository.get_sources())


def is_ours(places: Iterable[tuple[str, str]]) -> bool:
    """Whether no files are read but those of this repository's conf/, and what libraries bring along."""
    return all(Path(path).resolve() == OURS for kind, path in places if kind == "file")


def is_choice(override: Any, repository: Any) -> bool:
    """Whether an override of the command line chooses from a group; others set a value, or are swept over."""
    if override.is_sweep_override() or isinstance(override.value(), dict):
        return False
    return bool(repository.group_exists(override.key_or_group))


def remember_defaults(create: Callable[..., Any]) -> Callable[..., Any]:
    """Remember the list of files for each choice of groups; the values that are set are those of each call."""
    known: dict[Any, Any] = {}

    @wraps(create)
    def create_once(
        repo: Any, config_name: str | None, overrides_list: list[Any], prepend_hydra: bool, skip_missing: bool
    ) -> Any:
        places = list_places(repo)
        if not is_ours(places):
            return create(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        choices = [override for override in overrides_list if is_choice(override, repo)]
        key = (places, config_name, tuple(o.input_line for o in choices), prepend_hydra, skip_missing)
        if key not in known:
            known[key] = create(repo, config_name, choices, prepend_hydra, skip_missing)
        values = [o for o in overrides_list if o not in choices and not o.is_sweep_override()]
        return replace(known[key], config_overrides=values)

    return create_once


def remember_composed(compose: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what a list of files is composed to; each call gets a copy."""
    known: dict[Any, bytes] = {}

    @wraps(compose)
    def compose_once(self: Any, defaults: list[Any], repo: Any) -> Any:
        places = list_places(repo)
        if not is_ours(places):
            return compose(self, defaults, repo)
        key = (places, repr(defaults))
        if key not in known:
            known[key] = pickle.dumps(compose(self, defaults, repo))
        return pickle.loads(known[key])

    return compose_once


def compose_choices_once(patch: pytest.MonkeyPatch) -> None:
    """Let Hydra remember what it has composed, until the patch ends."""
    create = config_loader_impl.create_defaults_list
    compose = ConfigLoaderImpl._compose_config_from_defaults_list
    patch.setattr(config_loader_impl, "create_defaults_list", remember_defaults(create))
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", remember_composed(compose))
