"""Products of many rows in int8: by torch where the CPU has instructions for it, else in C.

Without them torch's own product is not better than one number at a time, 30 times as slow as fp32.
"""

import ctypes

import torch
from torch import Tensor

from gpt.clibrary import c_library
from gpt.device import cpu_has_int8

# As decode.c has it.
_TILE_ROWS = 4
# Products of whole numbers up to 127 that fp32 adds up without rounding.
_EXACT_IN_FP32 = 1024


def whole_product(x: Tensor, weights: Tensor) -> Tensor:
    """X (n, width) in fp32 times weights (rows, width) in int8: (n, rows) in fp32.

    x holds whole numbers from -127 to 127, and the sums have room in 32 bits. They are exact, so
    that a row does not depend on the others, nor on which of the three ways it took.
    """
    if cpu_has_int8():
        return torch._int_mm(x.to(torch.int8), weights.mT).float()
    library = c_library("decode")
    if isinstance(library, ctypes.CDLL):
        return _in_c(library.whole_product, x, weights)
    columns = (torch.split(matrix, _EXACT_IN_FP32, 1) for matrix in (x, weights))
    sums = torch.zeros(len(x), len(weights), dtype=torch.int32)
    for some, their_weights in zip(*columns, strict=True):
        sums += (some @ their_weights.float().mT).int()
    return sums.float()


def _in_c(function: "ctypes._NamedFuncPointer", x: Tensor, weights: Tensor) -> Tensor:
    (n, width), rows, threads = x.shape, len(weights), torch.get_num_threads()
    assert weights.is_contiguous()
    y, whole = torch.empty(n, rows), x.to(torch.int16).contiguous()
    scratch = torch.empty(threads, _TILE_ROWS, width, dtype=torch.int16)
    memory = (each.data_ptr() for each in (weights, whole, y, scratch))
    sizes = (rows, width, n, threads)
    function(*map(ctypes.c_void_p, memory), *map(ctypes.c_int64, sizes))
    return y
