"""Files that are replaced whole: whatever ends the writing, under the name stands the old file or the new one."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
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
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # a failure's, or where both were one file already: then replace does nothing


def set_aside(path: Path) -> None:
    """Rename the file at `path`, if there is one, to NAME_previous.SUFFIX, in the place of one that is called so."""
    if path.exists():
        path.replace(path.with_stem(f"{path.stem}_previous"))


def fsync_folder(folder: str | Path) -> None:
    """Wait until the folder's entries are on the disk: a new name outlives a loss of power only then."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, which may be renamed to it; it is removed at the end if it is still there.

    Those that killed processes left beside `target` are removed first: unlike a live one's they are not locked. Raises
    OSError.
    """
    for old in target.parent.iterdir():
        if re.fullmatch(re.escape(f".{target.name}.") + r"\d+\.tmp", old.name):
            with contextlib.suppress(ValueError):  # of a live one
                lock_folder(old).close()
                shutil.rmtree(old, ignore_errors=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        with lock_folder(folder):
            yield folder
            if not folder.exists():
                (target / ".lock").unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lock_folder(folder: str | Path) -> IO:
    """Make an out_dir and lock it for as long as the file lives that is returned.

    The temporary files that a killed run left there are removed. Raises ValueError if another run holds it, or it
    cannot be written.
    """
    import fcntl  # not on Windows, where the start says so

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = open(Path(folder) / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when its holder dies
        for old in [*Path(folder).glob("*.pt.tmp"), *Path(folder).glob("log.txt.tmp")]:
            old.unlink()
    except BlockingIOError:
        raise ValueError(f"out_dir={folder!r} is in use by another live run") from None
    except OSError as error:
        raise ValueError(f"out_dir={folder!r} cannot be written: {error.strerror}") from None
    return lock
