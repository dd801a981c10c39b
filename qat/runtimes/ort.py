"""Run an exported ONNX file in ONNX Runtime on the CPU: logits, its version, and which kernels it chose.

Language models are scored and generate by the functions of ort_text.py.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.progress import told
from qat.runtimes import main

FILE = "model.onnx"


def open_session(path: Path, optimized: Path | None = None, threads: int = 1):
    """A session on the file (or folder with model.onnx). Raises UserError if onnxruntime is missing."""
    try:
        import onnxruntime
    except ImportError as e:
        raise UserError("onnxruntime is not installed: pip install onnx onnxruntime") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors: saving the optimized graph warns that it fits this machine only
    # x86 processors without VNNI add pairs of uint8 * int8 in 16 bits and saturate; this asks for exact kernels there
    options.add_session_config_entry("session.x64quantprecision", "1")
    # a blocked DequantizeLinear and its MatMul become one MatMulNBits, whose inputs are int8 unless this says otherwise
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    file = path / FILE if path.is_dir() else path
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's own exceptions share no base class
        raise VerifyError(f"onnxruntime cannot load {file}: {str(e)[:300]}") from e


def predict(path: Path, x: Tensor) -> Tensor:
    """Logits float32 [n, C] for float32 inputs [n, ...], in batches of 256."""
    session = open_session(path)
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: part.numpy()})[0]) for part in told(x.split(256))])


def operators(path: Path, _: object = None) -> list[str]:
    """The operators of the graph as ONNX Runtime runs it, in order: QLinearConv and QGemm are integer kernels."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        open_session(path, optimized)
        return [node.op_type for node in onnx.load(str(optimized)).graph.node]


def version(path: Path, _: object = None) -> str:
    """The runtime's name and version."""
    from importlib.metadata import version as installed

    return f"onnxruntime {installed('onnxruntime')}"


if __name__ == "__main__":
    from qat.runtimes.ort_text import complete, encode, logprobs, score, tokenize

    main(predict, operators, version, score, logprobs, tokenize, complete, encode)
