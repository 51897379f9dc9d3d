"""How a command ends: the exit code and the lines that the user sees."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import gpt.errors
from gpt.errors import Stopped, UserError, json_line, run_command, say


def test_mistakes_are_lines_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise UserError("a: 1 is too small; 2 is the least", "b: unknown")

    assert run_command(fail, []) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: a: 1 is too small; 2 is the least",
        "error: b: unknown",
    ]


@pytest.mark.parametrize(
    ("error", "code"), [(Stopped(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)]
)
def test_signals_are_128_and_more(error: BaseException, code: int) -> None:
    def fail(_: object) -> None:
        raise error

    assert run_command(fail, []) == code


@pytest.mark.parametrize(("cause", "code"), [(Stopped(15), 143), (KeyboardInterrupt(), 130)])
def test_what_others_make_of_a_signal_is_one(cause: BaseException, code: int) -> None:
    def fail(_: object) -> None:
        try:
            raise ImportError("initialization failed") from cause  # a module in C
        except ImportError as error:
            raise RuntimeError("cannot draw") from error

    assert run_command(fail, []) == code


def test_a_bug_met_while_ending_stays_one() -> None:
    def fail(_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise AssertionError("ours")

    with pytest.raises(AssertionError):
        run_command(fail, [])


@pytest.mark.parametrize("again", ["while it says so", "on the way out"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_is_no_traceback(number: int, again: str) -> None:
    program = f"""
import os, signal, sys, gpt.errors
again = lambda *_: os.kill(os.getpid(), {number})
if {again!r} == "while it says so":
    gpt.errors._let_go = again
code = gpt.errors.run_command(lambda argv: (os.kill(os.getpid(), {number}), input())[0], [])
again()
sys.exit(code)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr.count(b"Traceback")) == (128 + number, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["weakref.finalize(one, end)", "type(one).__del__ = end"])
def test_a_signal_in_code_whose_errors_are_dropped(number: int, where: str) -> None:
    body = (
        f"import weakref; end = lambda *_: os.kill(os.getpid(), {number})"
        f"; one = type('One', (), {{}})(); {where}; del one; time.sleep(20)"
    )
    start = time.monotonic()
    result = run_program(body)
    assert (result.returncode, result.stderr.count("Traceback")) == (128 + number, 0)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["torch", "<frozen importlib._bootstrap>"])
def test_a_signal_waits_while_others_run(number: int, place: str) -> None:
    """Python that torch's C++ calls, or that an import runs, is not left by an error."""
    file = f"/somewhere/{place}/code.py" if place == "torch" else place
    code = (
        f"os.kill(os.getpid(), {number}); ended = time.monotonic() + 0.3\n"
        "while time.monotonic() < ended: pass\nprint('whole')"
    )
    result = run_program(f"exec(compile({code!r}, {file!r}, 'exec')); time.sleep(20)")
    assert (result.returncode, result.stdout) == (128 + number, "whole\n"), result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_while_a_module_of_ours_is_imported(number: int) -> None:
    """What its lines call, in C, may take an error for one of its own."""
    inner = (
        f"def function():\n    os.kill(os.getpid(), {number})\n"
        "    ended = time.monotonic() + 0.3\n    while time.monotonic() < ended: pass\n"
        "class One:\n    function()\nprint('whole')"
    )
    ours = str(Path(gpt.errors.__file__).with_name("config.py"))
    outer = f"exec(compile({inner!r}, {ours!r}, 'exec'))"
    body = f"exec(compile({outer!r}, '<frozen importlib._bootstrap>', 'exec'), globals())"
    result = run_program(f"{body}; time.sleep(20)")
    assert (result.returncode, result.stdout) == (128 + number, "whole\n"), result.stderr


def test_a_signal_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal\nsignal.raise_signal(signal.SIGTERM)\nwhile True: pass"
    monkeypatch.setattr(gpt.errors, "_LONGEST_WAIT_S", 0.2)
    endless = compile(code, "/somewhere/torch/code.py", "exec")
    assert run_command(lambda _: exec(endless), []) == 143


def test_what_else_is_dropped_is_still_said() -> None:
    body = "one = type('One', (), {'__del__': lambda self: 1 / 0})(); del one"
    result = run_program(body)
    assert result.returncode == 0
    assert "ZeroDivisionError" in result.stderr


def test_our_bugs_keep_their_traceback() -> None:
    def fail(_: object) -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError):
        run_command(fail, [])


PROGRAM = """
import os, signal, sys, time
from gpt.errors import run_command

def command(argv):
    BODY

sys.exit(run_command(command, []))
"""


def run_program(body: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("BODY", body)],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **more},
    )


def test_sigterm_before_training_begins() -> None:
    result = run_program("os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)")
    assert result.returncode == 143
    assert "Traceback" not in result.stderr


def test_a_terminal_that_lacks_a_character() -> None:
    result = run_program("print('学习')", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "??\n"


def test_a_reader_that_had_enough() -> None:
    program = PROGRAM.replace("BODY", "for _ in range(100_000): print('x' * 100)")
    result = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {sys.executable} -c "$PROGRAM" | head -n 1'],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PROGRAM": program},
        timeout=30,
    )
    assert result.returncode == 0
    assert result.stderr == ""


def test_what_strangers_wrote_stays_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def body(argv: Sequence[str]) -> None:
        raise UserError("a\x1b[31mb\nc\r\x9b\u202ed", "x" * 10_000, *("y" for _ in range(100)))

    assert run_command(body, []) == 2
    err = capsys.readouterr().err.split("\n")
    assert err[0] == "error: a�[31mb c ��d"
    assert err[1].startswith("error: xxx")
    assert len(err[1]) < 1300
    assert len(err) == 22
    assert err[20] == "and 82 more"


def test_json_in_a_line_controls_no_terminal() -> None:
    value = {"text": "\x1b[31m\x9b\u202e\ud800é学\n"}
    line = json_line(value)
    assert line == '{"text": "\\u001b[31m\\u009b\\u202e\\ud800é学\\n"}'
    assert json.loads(line) == value


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_below_the_console_ends_no_command(monkeypatch: pytest.MonkeyPatch):
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert run_command(lambda argv: say("a line"), []) == 0


def test_what_a_disk_refuses_is_one_line(capsys: pytest.CaptureFixture[str]):
    def full(argv: Sequence[str]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere/page.html")

    assert run_command(full, []) == 2
    assert capsys.readouterr().err.startswith("error: somewhere/page.html: No space left on device")
