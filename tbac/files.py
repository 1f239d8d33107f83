"""Writing files that are either complete or not there at all."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Write a file under a temporary name and then rename it.

    Args:
        path: the file.
        content: its bytes.
        scratch: folder on the same disk for the temporary file, so that none is left beside `path` when the process is
            killed; None = the folder of `path`.
    """
    folder = scratch or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{path.name}.{uuid.uuid4().hex}"  # not the process's number, which repeats on other machines
    temporary.write_bytes(content)
    os.replace(temporary, path)
