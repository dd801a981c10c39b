"""ggml's own C functions out of the xllamacpp wheel: how llama.cpp itself quantizes a matrix and reads it back."""

import ctypes
from functools import cache
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quant_shape_to_byte_shape


@cache
def _library() -> Any:
    wheel = pytest.importorskip("xllamacpp.xllamacpp")
    library = ctypes.CDLL(wheel.__file__)
    if not hasattr(library, "ggml_quantize_chunk"):
        pytest.skip("this wheel does not export ggml's functions")
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize(x: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """float32 [N, K] -> uint8 [N, bytes], as `llama-quantize` does without an importance matrix."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.zeros(quant_shape_to_byte_shape(x.shape, kind), np.uint8)
    rows, columns = (ctypes.c_int64(n) for n in x.shape)
    size = _library().ggml_quantize_chunk(
        int(kind), x.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0), rows,
        columns, None,
    )  # fmt: skip
    assert size == out.nbytes
    return out


def dequantize(data: np.ndarray, kind: GGMLQuantizationType, columns: int) -> np.ndarray:
    """uint8 [N, bytes] -> float32 [N, columns], by ggml's `dequantize_row_*`."""
    data = np.ascontiguousarray(data)
    out = np.zeros((len(data), columns), np.float32)
    read = getattr(_library(), f"dequantize_row_{kind.name.lower().replace('_k', '_K')}")
    read.restype = None
    read(data.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size))
    return out
