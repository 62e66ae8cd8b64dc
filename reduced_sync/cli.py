"""What commands share: the one line of an error, signals that ask for a stop, output to any terminal or pipe."""

import contextlib
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator


def one_line(error: BaseException) -> str:
    """The first line of an error's text, without the middle of a long one; the error's type where it has no text."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    line = text.strip().split("\n")[0] or type(error).__name__
    return line if len(line) <= 2000 else f"{line[:500]} ... {line[-1400:]}"


@contextlib.contextmanager
def one_line_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """End a command of one process with one line on stderr for what users and their machines do wrong, with status 1.

    For Ctrl-C the line is `interrupted`, and the status 130. For commands with ranks: distributed.report_errors.
    """
    silent = signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # as set_up leaves it
    try:
        if silent:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        print(end="", flush=True)  # whose error, as of a full disk, is one line, too
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        if silent:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_figure(path: str) -> None:
    """Raise ValueError unless the name of a figure says its format, by which it is written."""
    if os.path.splitext(path)[1] not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{path!r}: a figure's file name must end in .png, .pdf or .svg")


def check_distinct(targets: dict[str, str | None], read: Iterable[str | os.PathLike] = ()) -> None:
    """Raise ValueError where two of the files to write, {option: path}, are one file, or one is among those `read`."""
    known = dict.fromkeys(map(os.path.realpath, read))
    for option, path in targets.items():
        if not path:
            continue
        first = known.setdefault(os.path.realpath(path), (option, path))
        if first is None:
            raise ValueError(f"{path} is read: choose another file to write")
        if first[0] != option:
            raise ValueError(f"--{first[0]} and --{option} are one file: {first[1]}")


def check_target(path: str) -> None:
    """Raise OSError unless a file can be written at `path`: before the work whose result it is to have."""
    there = os.path.exists(path)
    open(path, "ab").close()
    if not there:
        os.remove(path)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask for a stop: a kill, Ctrl-C, a scheduler's warning, and a closed terminal unless ignored.

    nohup has SIGHUP ignored.
    """
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    return numbers if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*numbers, signal.SIGHUP]


@contextlib.contextmanager
def sigint_blocked() -> Iterator[None]:
    """Processes that start inside never hear Ctrl-C, whose traceback they would print: who started them ends them."""
    from multiprocessing import resource_tracker  # here: what a command imports first should take no time

    resource_tracker.ensure_running()  # a process's start does, and would let go what is held here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignal:
    """A stop signal asks for a stop after the step or batch; a second one, a second or more later, ends at once.

    Rank 0 says on stderr that it was heard: a step may be long. torchrun passes a Ctrl-C on to workers that the
    terminal has already told: that echo is not a second one. `agreed`: distributed.until_stopped has told all ranks.
    """

    def __init__(self):
        self.asked, self.agreed = None, False
        for number in stop_signals():
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.asked is None:
            self.asked = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):  # a terminal that is closed; and print() is not reentrant
                    os.write(2, b"stopping after this step; signal again to stop immediately\n")
        elif time.monotonic() - self.asked > 1:
            os._exit(128 + number)


class Output(io.FileIO):
    """stdout or stderr of a command, which ends once nobody reads it, as in `| head`, unless it `keeps_running`."""

    def __init__(self, number, keeps_running):
        super().__init__(number, "w", closefd=False)
        self.unheard, self.failed = keeps_running, False

    def write(self, data: bytes) -> int:
        """Bytes written; all of them where nobody reads. Raises OSError, as of a full disk, once."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # of a pipe, of a closed terminal
                if not self.unheard:
                    self.unheard = True  # what is flushed at the end
                    raise SystemExit(141) from None  # 128 + SIGPIPE, as of any tool
            elif not self.failed:
                self.failed = True  # likewise
                raise
            return len(data)


def set_up(keeps_running: bool = False) -> None:
    """Let output work on every terminal, where a character that it does not have is a `?`, and in a broken pipe.

    A command that `keeps_running` does its work without a reader, too. Ctrl-C ends the process at once, as it ends
    other programs: while Python imports or waits in C++ it would be a traceback, or unheard. one_line_errors and
    StopSignal make more of it. Ends with one line on systems that are not supported.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.name != "posix":
        sys.exit("error: Linux and macOS are supported; on Windows use WSL")
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        if (old := getattr(sys, name)) is not None:  # not closed
            raw = io.BufferedWriter(Output(old.fileno(), keeps_running))
            setattr(sys, name, io.TextIOWrapper(raw, old.encoding, errors, line_buffering=old.line_buffering))
