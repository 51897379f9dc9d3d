"""Attention of the newest tokens of many rows on the CPU, in C: fills a structure of decode.c.

A row reads its own keys and values and no more, where torch's kernel reads those of the longest row
for all, and takes three times as long.
"""

import ctypes

import torch
from torch import Tensor

from gpt.clibrary import c_library

# As decode.c numbers them.
FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "lengths", "y", "scratch")),
        *((name, ctypes.c_int64) for name in ("rows", "n_head", "n_kv_head", "head_dim", "room")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("cache_format", "threads")),
    ]


def attends_in_c(heads: Tensor) -> bool:
    """Whether `attend_rows` is there for q, k, v like these: on a CPU, in fp32, a C compiler."""
    known = heads.device.type == "cpu" and heads.dtype == torch.float32
    return known and isinstance(c_library("decode"), ctypes.CDLL)


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float | None,
) -> Tensor:
    """Stores k and v (B, kv H, T = 1, D) behind what rows hold, and gives what q (B, H, 1, D) sees.

    Those are in fp32. `keys` and `values` (B, kv H, room, D), in fp32 or bf16, hold as many tokens
    of each row as `lengths` (B,) int64 says. What a row gives depends neither on the others nor on
    the threads.
    """
    library = c_library("decode")
    assert isinstance(library, ctypes.CDLL), library
    assert {each.dtype for each in (q, k, v)} == {torch.float32}
    assert keys.dtype == values.dtype
    assert keys.dtype in (torch.float32, torch.bfloat16)
    assert lengths.dtype == torch.int64
    heads, y = [_side_by_side(each) for each in (q, k, v)], torch.empty(q.shape)
    threads, size = torch.get_num_threads(), q.size(-1)
    assert keys.is_contiguous()
    assert values.is_contiguous()
    scratch = torch.empty(threads, keys.size(2))
    rows = _Rows(
        *(each.data_ptr() for each in heads),
        *(each.stride(0) for each in heads),
        *(each.data_ptr() for each in (keys, values, lengths, y, scratch)),
        *(q.size(0), q.size(1), k.size(1), size, keys.size(2)),
        size**-0.5 if scale is None else scale,
        FORMATS.index(keys.dtype),
        threads,
    )
    library.attend_rows(ctypes.byref(rows))
    return y


def _side_by_side(heads: Tensor) -> Tensor:
    """Heads (B, H, 1, D) such that those of a row follow each other; most do already."""
    size = heads.size(-1)
    return heads if heads.stride(1) == size and heads.stride(3) == 1 else heads.contiguous()
