"""Files that are there whole or not at all."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Make a file in one move.

    Args:
        path: the file; its folder must be there.
        content: of the file.
        scratch: folder on the same disk where it is made before, so that nothing half-made lies beside it even when the
            process is killed; None = the file's own.
    """
    folder = scratch or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{path.name}.{uuid.uuid4().hex}"  # process numbers repeat on other machines
    temporary.write_bytes(content)
    os.replace(temporary, path)
