"""How a score was reached, as data, and in what that differs from how published scores were reached.

A score may stand beside published ones only where no field differs. What isn't known counts as a difference.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
FREE = "as the model likes it"  # what the published protocol doesn't prescribe, but must be stated
OF_SERVICE = "of a service"  # weights that nobody can see


@dataclass(frozen=True)
class Protocol:
    """How a score was reached, or how published ones were.

    Of published ones, a field may hold a tuple, any of whose values is right, or `FREE`.

    Attributes:
        judge: name of the model that judged, as an endpoint reports it, or as it is called on this machine.
        judge_weights: digest of its weights; `OF_SERVICE` for a model behind an endpoint.
        judge_settings: how it was asked besides the questions: system message, temperature, longest reply.
        prompts: digest of all prompts, in order, with the names of their pictures.
        questions: digest of what is asked or looked for in the pictures, with its wording.
        rules: how replies become a score.
        num_prompts: number of prompts.
        samples: pictures of each prompt.
        missing: pictures that aren't there.
        failed: pictures without a usable verdict of the judge.
        cut: prompts that were longer than the model reads.
        sampling: steps, guidance and base seed of the pictures.
    """

    judge: Any = UNKNOWN
    judge_weights: Any = UNKNOWN
    judge_settings: Any = UNKNOWN
    prompts: Any = UNKNOWN
    questions: Any = UNKNOWN
    rules: Any = UNKNOWN
    num_prompts: Any = UNKNOWN
    samples: Any = UNKNOWN
    missing: Any = 0
    failed: Any = 0
    cut: Any = 0
    sampling: Any = FREE

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """A field in which a score's protocol isn't the published one."""

    field: str
    value: Any
    published: Any

    def __str__(self) -> str:
        return f"{self.field.replace('_', ' ')} {describe(self.value)} instead of {describe(self.published)}"


def describe(value: Any) -> str:
    """Describe a field's value for people."""
    if isinstance(value, tuple):
        return " or ".join(describe(option) for option in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def list_differences(measured: Protocol, published: Protocol) -> list[Difference]:
    """List the fields in which a score was reached in another way than published ones, or in a way that isn't known."""
    found = []
    for part in fields(Protocol):
        value, wanted = getattr(measured, part.name), getattr(published, part.name)
        if not is_followed(value, wanted):
            found.append(Difference(part.name, value, wanted))
    return found


def is_followed(value: Any, wanted: Any) -> bool:
    """Whether a field's value is what the published protocol says of it."""
    if value == UNKNOWN or wanted == UNKNOWN:
        return False
    if isinstance(wanted, tuple):
        return any(is_followed(value, option) for option in wanted)
    return bool(wanted == FREE or value == wanted)


def is_comparable(measured: Protocol, published: Protocol | None) -> bool:
    """Whether a score may stand beside published ones."""
    return published is not None and not list_differences(measured, published)


def compute_data_digest(value: Any) -> str:
    """Compute a short digest of plain data."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def compute_weights_digest(folder: Path) -> str:
    """Compute a short digest of the weights in a folder: that of the only file, or of all files' digests.

    For one file it begins as the SHA-256 that a model hub shows beside the file.
    """
    digests = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    if not digests:
        return UNKNOWN
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return f"sha256:{whole[:16]}"
