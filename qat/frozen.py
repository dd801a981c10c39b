"""Frozen: the codes, scales and floats that were decided once, and all that an exporter or `verify` may read.

On disk: `tensors.safetensors` (`NAME.words`, codes that filed.py packs, or `NAME.codes`; `NAME.scale`, `NAME.offset`;
floats under their own name), `frozen.json`
(specs, kinds, shapes, inputs, ties, model config), `tokenizer/`, and `manifest.json` (a digest of every tensor, and
SHA-256 of every other file).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.affine import QTensor, dequantize
from qat.errors import UserError, VerifyError, understood
from qat.filed import filed, packed, part
from qat.files import TENSORS, atomic_folder, read_manifest, write_manifest
from qat.meanwhile import flushed_meanwhile
from qat.scheme import QuantSpec, Scheme, bits_per_weight, check_block, matrix, stored_dtype
from qat.streams import Behind, Later, Writer, info, raw, stored

_PARTS = ("words", "codes", "scale", "offset")


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

    def tensors(self, name: str) -> list[tuple[str, Tensor]]:
        """`Frozen.tensors` of this weight."""
        q = self.tensor
        return _flat(name, {part(q.spec): packed(q), "scale": q.scale, "offset": q.offset})


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

    Of a loaded one the tensors are in the file until they are asked for, and are read each time.
    ties: alias parameter name -> the name that holds the tensor. config: the Hugging Face config.json, or for other
    graphs a dict with "architecture". tokenizer: file name -> contents.
    """

    weights: Mapping[str, FrozenWeight]
    floats: Mapping[str, Tensor]
    inputs: dict[str, FrozenInput] = field(default_factory=dict[str, FrozenInput])
    ties: dict[str, str] = field(default_factory=dict[str, str])
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    tokenizer: dict[str, bytes] = field(default_factory=dict[str, bytes])
    _checked: tuple[Mapping[str, str], object, object] = field(
        default=({}, None, None), repr=False, compare=False
    )  # digests that `load` has checked, or `write_frozen` made, and the weights and floats that they are of

    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every layer with a quantized input, by module path."""
        out: dict[str, Scheme] = {}
        for module, i in self.inputs.items():
            name = f"{module}.weight" if module else "weight"
            held = self.weights.get(self.ties.get(name, name))
            out[module] = Scheme(weight=held and held.tensor.spec, input=i.spec, static=i.static)
        return out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as the file has it, one at a time: floats, `NAME.words|codes|scale|offset`, and
        `MODULE.input.scale|offset`."""
        yield from self.floats.items()
        for name, w in self.weights.items():
            yield from w.tensors(name)
        for name, i in self.inputs.items():
            yield from _flat(f"{name}.input", {"scale": i.scale, "offset": i.offset})

    def blank(self) -> "Frozen":
        """The same with codes and floats that have no storage (on the "meta" device): their dtypes and shapes. Scales
        and offsets have: the first arithmetic without storage makes torch import its compiler, for two seconds."""

        def weight(name: str) -> FrozenWeight:
            held = self.weights[name]
            return replace(held, tensor=held.tensor.blank())

        floats = {n: t.to("meta") for n, t in self.floats.items()}
        return replace(self, weights=Later(self.weights, weight), floats=floats)

    def digests(self, like: Iterable[str] = ()) -> dict[str, str]:
        """SHA-256 of every tensor's dtype, shape and bytes, as the file has it; those that are known are not computed
        again. like: the names in a manifest. An earlier version's has `codes` of a byte for `words`; so then do these.
        """
        known, weights, floats = self._checked
        still = set(self.floats) if floats is self.floats else set[str]()
        still |= {f"{n}.{p}" for n in self.weights for p in _PARTS} if weights is self.weights else set()
        still &= known.keys()
        out = {name: known[name] if name in still else digest(t) for name, t in self.tensors()}
        for name in like:
            weight, _, last = name.rpartition(".")
            if last == "codes" and out.pop(f"{weight}.words", None):
                out[name] = known[name] if name in still else digest(self.weights[weight].tensor.codes)
        return out

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The float model's parameters, quantized ones dequantized; aliases included."""
        out = {**self.floats, **{n: w.dequantize(dtype) for n, w in self.weights.items()}}
        return {**out, **{alias: out[name] for alias, name in self.ties.items()}}

    def nbytes(self) -> int:
        """Bytes that the tensors need when codes, and scales of two levels, are packed densely: the smallest file."""
        shapes = ((w.tensor.spec, w.tensor.shape) for w in self.weights.values())
        bits = sum(bits_per_weight(spec, (r, c)) * r * c for spec, (r, c) in shapes)
        inputs = [t for i in self.inputs.values() for t in (i.scale, i.offset) if t is not None]
        return int(bits) // 8 + sum(t.nbytes for t in (*self.floats.values(), *inputs))

    def save(self, path: Path) -> None:
        """Write the folder atomically. Raises OSError if the disk does."""
        write_frozen(path, self.blank(), self.tensors())

    @classmethod
    def load(cls, path: Path) -> "Frozen":
        """Read a folder that `save` wrote. Raises UserError if it is not one, VerifyError if a digest differs."""
        path = Path(path)
        if not (path / "frozen.json").is_file():
            raise UserError(f"{path} is not a frozen folder: it has no frozen.json; give RUN/frozen or RUN")
        manifest = read_manifest(path)
        with understood(path):
            found = _digests(stored(path / TENSORS).items(), threads=2)
        for name in [*found, *manifest["tensors"]]:
            if name not in found:
                raise VerifyError(f"{path / TENSORS}: {name} is missing, and the manifest has it")
            if manifest["tensors"].get(name) != found[name]:
                raise VerifyError(f"{path / TENSORS}: {name} is not the tensor in the manifest")
        with understood(path):
            _refuse_others(path)
            return _opened(path, found)


def _opened(path: Path, digests: Mapping[str, str]) -> Frozen:
    """What `Frozen.load` returns, unchecked. digests: of its tensors."""
    tensors = stored(path / TENSORS)
    meta = json.loads((path / "frozen.json").read_text())
    specs = {n: QuantSpec.from_dict(m["spec"]) for n, m in meta["weights"].items()}

    def weight(name: str) -> FrozenWeight:
        entry = meta["weights"][name]
        kind, shape = entry["kind"], tuple(entry["shape"])
        codes = tensors[f"{name}.{'codes' if f'{name}.codes' in tensors else 'words'}"]
        scale, offset = tensors[f"{name}.scale"], tensors.get(f"{name}.offset")
        return FrozenWeight(filed(codes, scale, offset, specs[name], matrix(kind, shape)), kind, shape)

    def held(name: str) -> Tensor | None:
        return tensors[name].clone() if name in tensors else None  # mapped, each would keep the file open

    inputs = {
        n: FrozenInput(QuantSpec.from_dict(m["spec"]), m["static"], held(f"{n}.input.scale"), held(f"{n}.input.offset"))
        for n, m in meta["inputs"].items()
    }
    folder = path / "tokenizer"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    tokenizer = {f.name: f.read_bytes() for f in files}
    weights, floats = Later(specs, weight), Later(meta["floats"], tensors.__getitem__)
    checked = digests, weights, floats
    return Frozen(weights, floats, inputs, meta["ties"], meta["config"], tokenizer, checked)


def _refuse_others(path: Path) -> None:
    """Raise VerifyError unless the file has the tensors that frozen.json says, in these shapes."""
    meta = json.loads((path / "frozen.json").read_text())
    there = {n: tuple(t.shape) for n, t in stored(path / TENSORS).items()}
    want: dict[str, tuple[int, ...] | None] = dict.fromkeys(meta["floats"])
    for name, entry in meta["weights"].items():
        kind, shape = entry["kind"], tuple(entry["shape"])
        like = blank(matrix(kind, shape), QuantSpec.from_dict(entry["spec"]))
        parts = {n: tuple(t.shape) for n, t in FrozenWeight(like, kind, shape).tensors(name)}
        if f"{name}.codes" in there:  # in the place of words: an earlier version's
            parts.pop(f"{name}.words", None)
            parts[f"{name}.codes"] = tuple(like.shape)
        want |= parts
    for name, entry in meta["inputs"].items():
        taken = (f"{name}.input.scale", f"{name}.input.offset")
        want |= {n: None for n in taken if n in there or (entry["static"] and n == taken[0])}
    for name in [*want, *there]:
        if name not in there or name not in want:
            raise VerifyError(f"{path / TENSORS}: {name} is not in {'the file' if name in want else 'frozen.json'}")
        if want[name] not in (None, there[name]):
            raise VerifyError(f"{path / TENSORS}: {name} has shape {there[name]}, and by frozen.json {want[name]}")


def read_config(path: Path) -> dict[str, Any]:
    """The `config` of a frozen folder alone, unchecked. Raises VerifyError if frozen.json cannot be read."""
    try:
        return json.loads((path / "frozen.json").read_text())["config"]
    except (OSError, ValueError, KeyError) as e:
        raise VerifyError(f"{path / 'frozen.json'} cannot be read: {e}") from e


def digest(t: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    made = hashlib.sha256(f"{t.dtype} {tuple(t.shape)} ".encode())
    made.update(raw(t))
    return made.hexdigest()


def _digests(tensors: Iterable[tuple[str, Tensor]], threads: int = 1, put: Behind | None = None) -> dict[str, str]:
    """`digest` of each, by so many threads; `put` is given each as well."""
    found: dict[str, str] = {}

    def work(name: str, tensor: Tensor) -> None:
        found[name] = digest(tensor)

    with Behind(work, threads) as behind:
        for name, tensor in tensors:
            found[name] = ""  # keeps their order
            behind(name, tensor)
            if put is not None:
                put(name, tensor)
    return found


def write_frozen(path: Path, blank: Frozen, tensors: Iterable[tuple[str, Tensor]]) -> Frozen:
    """Write the folder of `blank` (`Frozen.blank`) atomically from its tensors, which come one at a time; returns what
    reads from it."""
    meta = {
        "weights": {
            n: {"spec": w.tensor.spec.to_dict(), "kind": w.kind, "shape": list(w.shape)}
            for n, w in blank.weights.items()
        },
        "inputs": {n: {"spec": i.spec.to_dict(), "static": i.static} for n, i in blank.inputs.items()},
        "floats": list(blank.floats),
        "ties": blank.ties,
        "config": blank.config,
    }
    with atomic_folder(path) as folder, flushed_meanwhile(folder):
        infos = {n: info(t) for n, t in blank.tensors()}
        with Writer(folder / TENSORS, infos) as writer, Behind(writer.put) as put:
            digests = _digests(tensors, put=put)
        (folder / "frozen.json").write_text(json.dumps(meta, indent=1))
        for name, content in blank.tokenizer.items():
            (folder / "tokenizer").mkdir(exist_ok=True)
            (folder / "tokenizer" / name).write_bytes(content)
        write_manifest(folder, {"kind": "frozen", "tensors": digests})
    return _opened(path, digests)


def blank(shape: tuple[int, int], spec: QuantSpec) -> QTensor:
    """A quantized matrix (R, C) without storage, on the "meta" device."""
    r, c = check_block(shape, spec.block)
    grid = shape[0] // r, shape[1] // c
    offset = None
    if spec.offset is not None:
        dtype = torch.int32 if spec.offset == "zero_point" else stored_dtype(spec.offset)
        offset = torch.empty(grid, dtype=dtype, device="meta")
    codes = torch.empty(shape, dtype=spec.type.storage, device="meta")
    return QTensor(codes, torch.empty(grid, dtype=stored_dtype(spec.scale), device="meta"), offset, spec)


def _flat(name: str, parts: dict[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{k}", t) for k, t in parts.items() if t is not None]
