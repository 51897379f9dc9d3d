"""The first signal is a wish, the second an order; handlers are put back."""

import signal
import subprocess
import sys

import pytest

from gpt.errors import Stopped
from gpt.signals import StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_only_sets_the_flag(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        stop.raise_if_requested()
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(Stopped) as stopped:
            stop.raise_if_requested()
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) == before


def test_second_signal_ends_at_once() -> None:
    program = (
        "import signal, time; from gpt.signals import StopRequest\n"
        "with StopRequest():\n"
        "    signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGINT)\n"
        "    time.sleep(60)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], check=False, timeout=30).returncode == 130
    )
