"""Long series made short enough to draw: what stood out in them still does."""

import numpy as np

from gpt.history import Column, finite

MOST_POINTS = 1600


def thin(steps: Column, values: Column, most: int = MOST_POINTS) -> tuple[Column, Column]:
    """At most about `most` of the finite points: the lowest and the highest of each bucket.

    Half of the buckets are even in the step and half in its logarithm, so that either axis shows
    as much; the first point and the last are kept.
    """
    steps, values = finite(steps, values)
    if len(steps) <= most:
        return steps, values
    kept = _extremes(values, _edges(len(values), max(1, most // 2)))
    return steps[kept], values[kept]


def _edges(count: int, buckets: int) -> Column:
    """Where buckets of `count` points begin, the first at 0."""
    even = np.linspace(0, count, buckets // 2 + 1)[:-1]
    growing = np.geomspace(1, count, buckets // 2 + 1)[:-1]
    return np.unique(np.concatenate([even, growing]).astype(int)).astype(float)


def _extremes(values: Column, edges: Column) -> list[int]:
    """Indices of the lowest and highest value of each bucket, and of both ends, in order."""
    starts = [int(edge) for edge in edges]
    kept = {0, len(values) - 1}
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        bucket = values[start:end]
        kept |= {start + int(bucket.argmin()), start + int(bucket.argmax())}
    return sorted(kept)


def rounded(values: Column, digits: int = 6) -> list[float | None]:
    """The values for JSON, to so many significant digits; None where there is no number."""
    return [
        float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()
    ]
