"""A small text becomes shards while torch is imported: each takes a second or two of one core.

Only where nothing can refuse the run in between: what a refused run leaves behind stays nothing.
"""

import os
from pathlib import Path
from threading import Thread
from types import TracebackType

from gpt.config import Config
from gpt.corpus import source_files
from gpt.data import TokenData, open_data
from gpt.errors import UserError
from gpt.files import check_writable
from gpt.sources import file_stat

MOST_BYTES = 16_000_000  # of text; whoever stops the command waits for what the thread has begun


class DataAhead:
    """Opens a config's data in a thread, if it may, as a context; `open` gives it, or why not."""

    def __init__(self, config: Config, *, may: bool) -> None:
        """`may`: whether the command line leaves nothing that could refuse the run."""
        self._config = config
        self._data: TokenData | None = None
        self._error: BaseException | None = None
        self._thread = None
        if may and is_certain(config):
            self._thread = Thread(target=self._open, name="data-ahead")

    def _open(self) -> None:
        try:
            self._data = open_data(self._config)
        except BaseException as error:  # raised where the data is asked for
            self._error = error

    def open(self, config: Config) -> TokenData:
        """The data of the config; raises what opening it raised."""
        if self._thread is None or config != self._config:
            return open_data(config)
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._data is not None
        return self._data

    def __enter__(self) -> "DataAhead":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.join()


def is_certain(config: Config) -> bool:
    """Whether a run of the config is new, its text small, and its device there for certain."""
    run = Path(config.run.dir) / config.run.name
    if os.path.lexists(run) or config.train.device not in ("auto", "cpu"):
        return False
    try:
        check_writable("run.dir", run.parent)
        files = source_files(config.data)
        return sum(file_stat(path).st_size for path in files) <= MOST_BYTES
    except UserError:  # the run says so in its own time
        return False
