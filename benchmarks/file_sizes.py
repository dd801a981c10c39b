"""What the bytes of an exported folder are: quantized weights, floats, the rest; and bits for each weight."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qat.frozen import Frozen

WEIGHT_FILES = (".safetensors", ".gguf", ".onnx", ".data", ".pte")
FLOAT32 = 4  # bytes


def tensors(path: Path, config: dict[str, object]) -> dict[str, int] | None:
    """Tensor name -> bytes in the folder's weight file, names as Hugging Face has them; None if it is compiled."""
    if found := sorted(path.glob("*.safetensors")):
        from safetensors import safe_open

        sizes: dict[str, int] = {}
        for file in found:
            with safe_open(file, "pt") as f:
                sizes |= {name: f.get_tensor(name).nbytes for name in f.keys()}  # noqa: SIM118
        return sizes
    if (path / "model.gguf").is_file():
        from gguf import GGUFReader

        from qat.exporters.gguf_models import FAMILIES, names

        kind = str(config["model_type"])
        theirs = {to: name for name, to in names(kind, FAMILIES[kind].n_layers(config)).items()}
        return {theirs.get(t.name, t.name): int(t.n_bytes) for t in GGUFReader(path / "model.gguf").tensors}
    if (path / "model.onnx").is_file():
        import onnx

        graph = onnx.load(str(path / "model.onnx"), load_external_data=False).graph
        width = onnx.helper.tensor_dtype_to_np_dtype
        return {i.name: math.prod(i.dims) * width(i.data_type).itemsize for i in graph.initializer}
    return None


@dataclass(frozen=True)
class Size:
    """Bytes: `file` of the weight files, `folder` of everything; of the file, `codes` at their nominal width, `grid`
    what else belongs to quantized weights (scales, zero points, padding), `floats` the unquantized parameters; the
    last three None for a compiled file. weights, quantized: how many numbers."""

    file: int
    folder: int
    weights: int
    quantized: int
    codes: int
    grid: int | None = None
    floats: int | None = None

    @property
    def smaller(self) -> float:
        """How many times smaller the file is than its weights in float32."""
        return FLOAT32 * self.weights / self.file

    @property
    def bits(self) -> float:
        """Of the file for each weight of the model."""
        return 8 * self.file / self.weights

    @property
    def bits_quantized(self) -> float | None:
        """For each quantized weight, scales and all."""
        return None if self.grid is None else 8 * (self.codes + self.grid) / self.quantized

    @property
    def other(self) -> int | None:
        """Of the file: headers, metadata, graph, a tokenizer that is part of it."""
        if self.grid is None or self.floats is None:
            return None
        return self.file - self.codes - self.grid - self.floats


def split(sizes: dict[str, int], quantized: Iterable[str], floats: Iterable[str]) -> tuple[int, int]:
    """(bytes of quantized weights and what belongs to them, bytes of float parameters), by parameter name.

    What belongs to MODULE.weight is named MODULE.something, in every format here.
    """
    modules = {name.removesuffix(".weight") for name in quantized}
    plain = set(floats)
    of_weights = sum(n for name, n in sizes.items() if name not in plain and _owner(name, modules))
    return of_weights, sum(n for name, n in sizes.items() if name in plain)


def _owner(name: str, modules: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))


def measure(path: Path, frozen: Frozen) -> Size:
    """The sizes of `frozen` as it was exported to the folder `path`."""
    files = [f for f in path.iterdir() if f.is_file()]
    quantized = sum(w.tensor.codes.numel() for w in frozen.weights.values())
    codes = sum(w.tensor.codes.numel() * w.tensor.spec.type.bits for w in frozen.weights.values()) // 8
    size = Size(
        file=sum(f.stat().st_size for f in files if f.suffix in WEIGHT_FILES),
        folder=sum(f.stat().st_size for f in files),
        weights=quantized + sum(t.numel() for t in frozen.floats.values()),
        quantized=quantized,
        codes=codes,
    )
    sizes = tensors(path, frozen.config)
    if sizes is None:
        return size
    mine, floats = split(sizes, frozen.weights, frozen.floats)
    return replace(size, grid=mine - codes, floats=floats)
