"""Frozen: the codes, scales and floats that were decided once, and all that an exporter or `verify` may read.

On disk: `tensors.safetensors` (`NAME.codes`, `NAME.scale`, `NAME.offset`; floats under their own name), `frozen.json`
(specs, kinds, shapes, inputs, ties, model config), `tokenizer/`, and `manifest.json` (SHA-256 of every file and a
digest of every tensor).
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from qat.affine import QTensor, dequantize
from qat.errors import UserError, VerifyError
from qat.files import atomic_folder, read_manifest, write_manifest
from qat.scheme import QuantSpec, Scheme, bits_per_weight


@dataclass(frozen=True)
class FrozenWeight:
    """One quantized parameter. tensor: codes (out, in), whatever the layer's storage order; Conv2d is
    (out, in * kh * kw). kind: the float layer's class name. shape: the float parameter's own shape."""

    tensor: QTensor
    kind: str
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The parameter as its float layer stores it (Conv1D: (in, out))."""
        value = dequantize(self.tensor, dtype)
        return value.t().contiguous() if self.kind == "Conv1D" else value.reshape(self.shape)


@dataclass(frozen=True)
class FrozenInput:
    """How a layer's input is quantized. scale, offset: (1, 1) if static, absent if taken from each batch."""

    spec: QuantSpec
    static: bool
    scale: Tensor | None = None
    offset: Tensor | None = None


@dataclass
class Frozen:
    """weights and floats are keyed by the float model's parameter (and buffer) names; inputs by module path.

    ties: alias parameter name -> the name that holds the tensor. config: the Hugging Face config.json, or for other
    graphs a dict with "architecture". tokenizer: file name -> contents.
    """

    weights: dict[str, FrozenWeight]
    floats: dict[str, Tensor]
    inputs: dict[str, FrozenInput] = field(default_factory=dict[str, FrozenInput])
    ties: dict[str, str] = field(default_factory=dict[str, str])
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    tokenizer: dict[str, bytes] = field(default_factory=dict[str, bytes])

    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every layer with a quantized input, by module path."""
        out: dict[str, Scheme] = {}
        for module, i in self.inputs.items():
            name = f"{module}.weight" if module else "weight"
            held = self.weights.get(self.ties.get(name, name))
            out[module] = Scheme(weight=held and held.tensor.spec, input=i.spec, static=i.static)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, flat: `NAME.codes`, `NAME.scale`, `NAME.offset`, floats, and `MODULE.input.scale|offset`."""
        out = dict(self.floats)
        for name, w in self.weights.items():
            out |= _flat(name, {"codes": w.tensor.codes, "scale": w.tensor.scale, "offset": w.tensor.offset})
        for name, i in self.inputs.items():
            out |= _flat(f"{name}.input", {"scale": i.scale, "offset": i.offset})
        return {k: out[k].detach().cpu().contiguous() for k in sorted(out)}

    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor's dtype, shape and bytes."""
        return {name: digest(t) for name, t in self.tensors().items()}

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The float model's parameters, quantized ones dequantized; aliases included."""
        out = {**self.floats, **{n: w.dequantize(dtype) for n, w in self.weights.items()}}
        return {**out, **{alias: out[name] for alias, name in self.ties.items()}}

    def nbytes(self) -> int:
        """Bytes that the tensors need when codes, and scales of two levels, are packed densely: the smallest file."""
        shapes = ((w.tensor.spec, w.tensor.codes.shape) for w in self.weights.values())
        bits = sum(bits_per_weight(spec, (r, c)) * r * c for spec, (r, c) in shapes)
        inputs = [t for i in self.inputs.values() for t in (i.scale, i.offset) if t is not None]
        return int(bits) // 8 + sum(t.nbytes for t in (*self.floats.values(), *inputs))

    def save(self, path: Path) -> None:
        """Write the folder atomically. Raises OSError if the disk does."""
        meta = {
            "weights": {
                n: {"spec": w.tensor.spec.to_dict(), "kind": w.kind, "shape": list(w.shape)}
                for n, w in self.weights.items()
            },
            "inputs": {n: {"spec": i.spec.to_dict(), "static": i.static} for n, i in self.inputs.items()},
            "floats": list(self.floats),
            "ties": self.ties,
            "config": self.config,
        }
        with atomic_folder(path) as folder:
            save_file(self.tensors(), folder / "tensors.safetensors")
            (folder / "frozen.json").write_text(json.dumps(meta, indent=1))
            for name, content in self.tokenizer.items():
                (folder / "tokenizer").mkdir(exist_ok=True)
                (folder / "tokenizer" / name).write_bytes(content)
            write_manifest(folder, {"kind": "frozen", "tensors": self.digests()})

    @classmethod
    def load(cls, path: Path) -> "Frozen":
        """Read a folder that `save` wrote. Raises UserError if it is not one, VerifyError if a digest differs."""
        path = Path(path)
        if not (path / "frozen.json").is_file():
            raise UserError(f"{path} is not a frozen folder: it has no frozen.json; give RUN/frozen or RUN")
        manifest = read_manifest(path)
        try:
            tensors = load_file(path / "tensors.safetensors")
        except (SafetensorError, OSError) as e:
            raise VerifyError(f"{path / 'tensors.safetensors'} cannot be read: {e}") from e
        meta = json.loads((path / "frozen.json").read_text())
        weights = {n: _weight(n, m, tensors) for n, m in meta["weights"].items()}
        inputs = {
            n: FrozenInput(
                QuantSpec.from_dict(m["spec"]),
                m["static"],
                tensors.get(f"{n}.input.scale"),
                tensors.get(f"{n}.input.offset"),
            )
            for n, m in meta["inputs"].items()
        }
        folder = path / "tokenizer"
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        tokenizer = {f.name: f.read_bytes() for f in files}
        floats = {n: tensors[n] for n in meta["floats"]}
        frozen = cls(weights, floats, inputs, meta["ties"], meta["config"], tokenizer)
        for name, value in frozen.digests().items():
            if manifest["tensors"].get(name) != value:
                raise VerifyError(f"{path}: tensor {name} is not the one in the manifest")
        return frozen


def read_config(path: Path) -> dict[str, Any]:
    """The `config` of a frozen folder alone, unchecked. Raises VerifyError if frozen.json cannot be read."""
    try:
        return json.loads((path / "frozen.json").read_text())["config"]
    except (OSError, ValueError, KeyError) as e:
        raise VerifyError(f"{path / 'frozen.json'} cannot be read: {e}") from e


def digest(t: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(f"{t.dtype} {tuple(t.shape)} ".encode() + flat.numpy().tobytes()).hexdigest()


def _flat(name: str, parts: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {f"{name}.{k}": t for k, t in parts.items() if t is not None}


def _weight(name: str, meta: dict[str, Any], tensors: dict[str, Tensor]) -> FrozenWeight:
    spec = QuantSpec.from_dict(meta["spec"])
    q = QTensor(tensors[f"{name}.codes"], tensors[f"{name}.scale"], tensors.get(f"{name}.offset"), spec)
    return FrozenWeight(q, meta["kind"], tuple(meta["shape"]))
