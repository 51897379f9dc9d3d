"""Many tiny runs at once, a process for each core; the results are those of one after another."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

import torch
from tqdm import tqdm

from gpt.config import Config
from gpt.device import physical_cores
from gpt.lr.lessons.tiny import Run, run_tiny

T = TypeVar("T")
MAX_PROCESSES = 8  # each holds some 400 MB


@contextmanager
def one_thread() -> Iterator[None]:
    """Products as small as the lessons' only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def n_cores() -> int:
    """Cores to use: what OMP_NUM_THREADS says, else all."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else physical_cores()


def run_all(configs: Sequence[Config], name: str) -> list[Run]:
    """Trains each config, in a process for each core; without a second core, here.

    Shows a progress bar on a terminal. An interruption ends it once the runs under way are over.
    """
    n_processes = min(n_cores(), MAX_PROCESSES, len(configs))
    if n_processes == 1:
        return [run_tiny(config) for config in _shown(configs, name)]
    with ProcessPoolExecutor(
        n_processes, mp_context=get_context("spawn"), initializer=_prepare_process
    ) as pool:
        try:
            with _interrupts_unheard():  # a starting process would print a traceback for Ctrl-C
                futures = [pool.submit(run_tiny, config) for config in configs]
            return [future.result() for future in _shown(futures, name)]
        finally:
            pool.shutdown(cancel_futures=True)


def _shown(items: Sequence[T], name: str) -> Iterator[T]:
    yield from tqdm(items, desc=name, unit="run", leave=False, disable=None)


def _prepare_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends its processes
    torch.set_num_threads(1)


@contextmanager
def _interrupts_unheard() -> Iterator[None]:
    """Processes started within inherit that Ctrl-C is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
