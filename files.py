"""Files that are whole at every moment, and folders that one process at a time writes to."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TextIO

from config import UserError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write path by write(file), so that at every moment path is a whole file, the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def lock(path: Path) -> TextIO:
    """Lock the file at path until this process ends, however it ends. Raises UserError if another process has it."""
    file = path.open("a")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"another process is writing to {path.parent}: wait for it, or write elsewhere") from error
    except OSError:  # a file system without locks
        pass
    return file
