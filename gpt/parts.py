"""Work on a large tensor a part at a time."""

from collections.abc import Iterator

from torch import Tensor


def parts(tensor: Tensor, size: int) -> Iterator[slice]:
    """The rows of a tensor, at most `size` at a time.

    Of a tensor without numbers (a fake one, that tells how much memory a step takes) only the
    first: every part takes the same.
    """
    rows = len(tensor)
    for start in range(0, rows if type(tensor) is Tensor else min(rows, 1), size):
        yield slice(start, min(start + size, rows))
