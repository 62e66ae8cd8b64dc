"""Files that are replaced whole: whatever ends the writing, under the name stands the old file or the new one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO


def replace_file(path: str | Path, write: Callable[[BinaryIO], object], keep: Path | None = None) -> None:
    """Replace the file at `path` by what write(file) writes to a binary file, once that is on the disk.

    With `keep`, a path, the old file goes on under that name. Raises what write raises, and OSError; all files are as
    they were then, and nothing is left beside them.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            link_file(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


def link_file(source: Path, target: Path) -> None:
    """Make `target` a second name of `source`, replacing it whole; a copy where the file system has no links."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # a failure's, or where both were one file already: then replace does nothing


def sync_folder(folder: str | Path) -> None:
    """Wait until the folder's entries are on the disk: a new name outlives a loss of power only then."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def lock_folder(folder: str | Path) -> IO:
    """Make an out_dir and lock it for as long as the file lives that is returned.

    Raises ValueError if another run holds it, or it cannot be written.
    """
    import fcntl  # not on Windows, where the start says so

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = open(Path(folder) / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when its holder dies
    except BlockingIOError:
        raise ValueError(f"out_dir={folder!r} is in use by another live run") from None
    except OSError as error:
        raise ValueError(f"out_dir={folder!r} cannot be written: {error.strerror}") from None
    return lock
