"""ggml's own C functions out of the xllamacpp wheel: llama.cpp's own quantizers, norms and activations."""

import ctypes
from collections.abc import Callable
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


class _Parameters(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _call(name: str, *arguments: Any, gives: Any = ctypes.c_void_p) -> Any:
    function = getattr(_library(), name)
    function.restype = gives
    return function(*arguments)


def _computed(x: np.ndarray, build: Callable[[Any, Callable[[np.ndarray], Any]], Any]) -> np.ndarray:
    """What `build(context, tensor)` makes, of the shape of x, on ggml's CPU backend with one thread; tensor(values)
    makes a float32 tensor."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    context = pointer(_call("ggml_init", _Parameters(8 * x.nbytes + 2**22, None, False)))

    def tensor(values: np.ndarray) -> Any:
        rows, columns = values.reshape(-1, values.shape[-1]).shape
        made = pointer(_call("ggml_new_tensor_2d", context, 0, size(columns), size(rows)))
        ctypes.memmove(_call("ggml_get_data", made), np.ascontiguousarray(values).ctypes.data, values.nbytes)
        return made

    made = build(context, tensor)
    graph = pointer(_call("ggml_new_graph", context))
    _call("ggml_build_forward_expand", graph, made, gives=None)
    assert _call("ggml_graph_compute_with_ctx", context, graph, 1, gives=ctypes.c_int) == 0
    out = np.empty_like(x)
    ctypes.memmove(out.ctypes.data, _call("ggml_get_data", made), out.nbytes)
    _call("ggml_free", context, gives=None)
    return out


def norm(name: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> np.ndarray:
    """ggml_norm or ggml_rms_norm of float32 [N, C] times weight [C], plus bias."""

    def build(context: Any, tensor: Callable[[np.ndarray], Any]) -> Any:
        made = ctypes.c_void_p(_call(name, context, tensor(x), ctypes.c_float(eps)))
        made = ctypes.c_void_p(_call("ggml_mul", context, made, tensor(weight)))
        return made if bias is None else ctypes.c_void_p(_call("ggml_add", context, made, tensor(bias)))

    return _computed(x, build)


def unary(name: str, x: np.ndarray) -> np.ndarray:
    """A function of one tensor, such as ggml_silu, of float32 [N, C]."""
    return _computed(x, lambda context, tensor: ctypes.c_void_p(_call(name, context, tensor(x))))
