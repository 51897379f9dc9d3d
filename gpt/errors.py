"""Failures that a user can fix, and how a command ends; no other module decides exit codes."""

import _thread
import atexit
import errno
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

EXIT_USER = 2
EXIT_FINDINGS = 3
# How a disk, or a quota on it, says that it takes no more.
DISK_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
DISK_REFUSES |= {errno.EACCES, errno.EPERM}
MOST_LINES = 20
LONGEST_LINE = 1200
# What no terminal should be given: control characters, halves of a surrogate pair, signs that turn
# the direction of what follows. They come with names and texts of strangers.
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
# What a signal waits for, and how long at most.
_OURS, _TORCH = f"{Path(__file__).parent}{os.sep}", f"{os.sep}torch{os.sep}"
_LONGEST_WAIT_S = 10.0
_asked: float | None = None
_only_warnings = False


class UserError(Exception):
    """A mistake that the user can fix: each line names the value, the limit and the fix."""

    def __init__(self, *lines: str) -> None:
        """Takes one line for each mistake."""
        super().__init__("\n".join(lines))
        self.lines = lines


class Stopped(BaseException):
    """The command was asked by a signal to end, and has saved what it had.

    Like KeyboardInterrupt no Exception: nobody who handles errors should take it for one.
    """

    def __init__(self, signal_number: int) -> None:
        """Takes the number of the signal, which decides the exit code: 128 + number."""
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


def shown(text: object) -> str:
    """A text from outside, with `�` for what would control the page or terminal that shows it."""
    return _UNSHOWABLE.sub("�", str(text).replace("\r\n", "\n"))


def json_line(value: object) -> str:
    """The value as JSON in a line, readable in any language, and nothing that controls a terminal.

    Raises ValueError for numbers that are not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _UNSHOWABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(line: str = "", *, urgent: bool = False) -> None:
    """Prints a line for people (stderr); stdout stays free for text that is piped on."""
    if urgent or not _only_warnings or line.startswith("warning:"):
        put(shown(line), sys.stderr)


def put(line: str, stream: TextIO) -> None:
    """Prints a line; one that a full disk does not take is dropped: no line is worth a run."""
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        if error.errno not in DISK_REFUSES:
            raise


def say_errors(lines: Sequence[str]) -> None:
    """Says what a user did wrong, a line each; of a flood the first, and of a long line its ends.

    Names and values of a stranger's file stand in them: whatever it holds, they stay lines.
    """
    for line in lines[:MOST_LINES]:
        line = " ".join(line.splitlines())
        if len(line) > LONGEST_LINE:
            line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"
        say(f"error: {line}")
    if len(lines) > MOST_LINES:
        say(f"and {len(lines) - MOST_LINES:,} more")


@contextmanager
def only_warnings() -> Iterator[None]:
    """While entered, `say` prints warnings and urgent lines alone: for one run out of many."""
    global _only_warnings
    before, _only_warnings = _only_warnings, True
    try:
        yield
    finally:
        _only_warnings = before


def _refused(error: OSError) -> str:
    place = error.filename or "the output"
    return f"{place}: {error.strerror}; make room there, make it writable, or choose another place"


def _let_go(stream: TextIO) -> None:
    """Drops what a full disk did not take, on which Python would fail once more at its end."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _ask(number: int, frame: FrameType | None) -> None:
    """Ends the command by an error, but not in the middle of an import or of torch's own code.

    C++ that calls Python there takes the error for one of its own, or ends the process at once. The
    signal comes again until other code runs, or until it has waited long enough.
    """
    global _asked
    now = time.monotonic()
    _asked = now if _asked is None else _asked
    if _is_within_others(frame) and now - _asked < _LONGEST_WAIT_S:
        _send_again(number)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise Stopped(number)


def _is_within_others(frame: FrameType | None) -> bool:
    """Whether the command imports something, or runs torch and in it no code of ours."""
    in_ours = False
    while frame is not None and frame.f_code is not run_command.__code__:
        file = frame.f_code.co_filename
        if file.startswith("<frozen importlib") or (_TORCH in file and not in_ours):
            return True
        in_ours = in_ours or file.startswith(_OURS)
        frame = frame.f_back
    return False


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _notice(
    others: Callable[["sys.UnraisableHookArgs"], object], dropped: "sys.UnraisableHookArgs"
) -> None:
    """A signal that met code whose errors Python drops (`__del__`, a weak reference) comes again.

    What is no signal is for `others`.
    """
    asked = dropped.exc_value
    if isinstance(asked, Stopped):
        _send_again(asked.exit_code - 128)
    elif isinstance(asked, KeyboardInterrupt):
        _send_again(signal.SIGINT)
    else:
        others(dropped)


def _send_again(number: int) -> None:
    """Has a signal come again in a moment. Takes no lock: what it interrupted may hold any."""

    def send() -> None:
        time.sleep(0.01)
        if hasattr(signal, "pthread_kill"):  # wakes it, too
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        else:
            signal.raise_signal(number)

    _thread.start_new_thread(send, ())


def run_command(
    command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None
) -> int:
    """Runs a command's body and turns its end into the exit code that the shell sees.

    A body that ends well is 0, unless it returns another code.
    """
    code = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows `?`
    in_main = threading.current_thread() is threading.main_thread()
    before = _listen() if in_main else {}
    drops = sys.unraisablehook
    sys.unraisablehook = partial(_notice, drops)
    try:
        code = command(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()
    except BaseException as error:
        ended = _code_of(error, in_main)
        if ended is None:
            raise
        code = ended
    finally:
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)
        sys.unraisablehook = drops
        for number, handler in before.items():
            if signal.getsignal(number) == _ask:
                signal.signal(number, handler)
    return code


def _listen() -> dict[int, Any]:
    """Has signals ask for the end, but one that is ignored; gives the handlers that were there."""
    global _asked
    _asked = None
    numbers = (signal.SIGINT, signal.SIGTERM)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, _ask) for number in heard}


def _code_of(error: BaseException, in_main: bool) -> int | None:
    """The exit code of a command that an error ended, once it is said; None for a bug of ours."""
    if asked := _signal_behind(error):
        _listen_no_more(in_main)
        if isinstance(asked, Stopped):
            return asked.exit_code
        say("interrupted")
        return 130
    if isinstance(error, BrokenPipeError):  # the reader of a pipe (`| head`) had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno in DISK_REFUSES:
        say_errors([_refused(error)])
        return EXIT_USER
    if isinstance(error, UserError):
        say_errors(error.lines)
        return EXIT_USER
    return None


def _signal_behind(error: BaseException | None) -> Stopped | KeyboardInterrupt | None:
    """What asked for the end: the error, or what it was made of.

    A module in C that a signal meets while it is imported says that it failed to initialise.
    """
    if error is None or isinstance(error, Stopped | KeyboardInterrupt):
        return error
    return _signal_behind(error.__cause__)


def _listen_no_more(in_main: bool) -> None:
    """From here on a signal ends the process at once: it is ending, and would end in a traceback.

    For good, since the interpreter's own end is part of it. The last of that, where no handler runs
    any more, hears none: the exit code is settled.
    """
    if in_main:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end_at_once)
            atexit.register(signal.signal, number, signal.SIG_IGN)
