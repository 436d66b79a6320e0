"""Writes a file in one step."""

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Writes `text` to `path` so that readers never see half of it, and an error keeps the previous content.

    A symbolic link stays a link. An existing file keeps its mode; a new one gets the mode that the umask gives.

    Raises:
        OSError: the directory cannot be written to, or the disk is full.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
