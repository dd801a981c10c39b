"""Against the compressed-tensors library: its packing, its decompressor, its own save of the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.model_compressors.model_compressor import ModelCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from prepared_models import LINEAR, ZERO, prepared, rule, tiny
from safetensors.torch import load_file

from qat.affine import choose_qparams, dequantize, quantize
from qat.errors import UserError
from qat.exporters import compressed_tensors, export, hf
from qat.exporters.hf_layout import encode, to_codes, to_words
from qat.frozen import Frozen, FrozenWeight
from qat.scheme import QuantSpec


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("cols", [64, 37, 1])
def test_words_are_theirs(bits: int, cols: int) -> None:
    torch.manual_seed(bits)
    spec = QuantSpec(qtype=f"int{bits}")
    codes = torch.randint(spec.type.qmin, spec.type.qmax + 1, (24, cols), dtype=torch.int8)
    words = to_words(codes, spec)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(to_codes(words, spec, cols), codes)
    assert torch.equal(unpack_from_int32(words, bits, torch.Size(codes.shape)), codes)
    assert torch.equal(to_words(codes.t(), spec), pack_to_int32(codes.t().contiguous(), bits))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_zero_points_lie_as_theirs(bits: int) -> None:
    spec = QuantSpec(qtype=f"int{bits}", block=(1, 16), range="minmax", offset="zero_point")
    torch.manual_seed(0)
    x = torch.randn(20, 64) + 0.3
    q = quantize(x, choose_qparams(x, spec), spec)
    stored = {k: make() for k, make in encode("weight", q).items()}
    args = QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=16)
    state = {
        "weight_packed": stored["weight"],
        "weight_scale": stored["weight_scale"].float(),
        "weight_zero_point": stored["weight_offset"],
        "weight_shape": torch.tensor(x.shape),
    }
    back = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))
    assert torch.equal(back["weight"], dequantize(q))


def test_their_decompressor_gives_our_weights(tmp_path: Path) -> None:
    _, frozen = prepared("llama", LINEAR)
    path = export(frozen, "hf", tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    for name, w in frozen.weights.items():
        parts = {k: tensors[f"{name}_{k.removeprefix('weight_')}"] for k in ("weight_packed", "weight_scale")}
        parts = {**parts, "weight_scale": parts["weight_scale"].float(), "weight_shape": tensors[f"{name}_shape"]}
        back = PackedQuantizationCompressor.decompress(parts, scheme)
        assert torch.equal(back["weight"], w.dequantize())


def theirs(path: Path, args: QuantizationArgs, dtype: torch.dtype = torch.float32) -> tuple[Any, Frozen]:
    """A tiny Llama quantized, compressed and saved by compressed-tensors alone, and the same as we would freeze it."""
    model = tiny("llama", tie_word_embeddings=False).to(dtype)
    model.config.architectures = [type(model).__name__]
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config, show_progress=False)
    block = (1, args.group_size) if args.group_size else (1, -1)
    kind = {"range": "absmax_half"} if args.symmetric else {"range": "minmax", "offset": "zero_point"}
    spec = QuantSpec(qtype=f"int{args.num_bits}", block=block, scale=str(dtype).removeprefix("torch."), **kind)
    weights: dict[str, FrozenWeight] = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        q = choose_qparams(module.weight.detach(), spec)
        module.weight_scale.data = q.scale.clone()
        if q.offset is not None:
            module.weight_zero_point.data = q.offset.to(torch.int8)
        weights[f"{name}.weight"] = FrozenWeight(
            quantize(module.weight.detach(), q, spec), "Linear", module.weight.shape
        )
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))
    parts = ("_packed", "_scale", "_shape", "_zero_point")
    floats = {n: p for n, p in model.state_dict().items() if not n.endswith(tuple(f"weight{e}" for e in parts))}
    return model, Frozen(weights, floats, config=model.config.to_dict())


SCHEMES = {
    "int4 group": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int8 channel": {"num_bits": 8, "strategy": "channel"},
    "int4 asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_of_another_writer_is_read(scheme: str, tmp_path: Path) -> None:
    """Codes equal to theirs: their quantizer, given our scales, decided every one of them itself."""
    _, want = theirs(tmp_path, QuantizationArgs(**SCHEMES[scheme]))
    back = hf.read(tmp_path)
    assert back.weights.keys() == want.weights.keys()
    assert back.digests() == want.digests()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_size_is_theirs(dtype: torch.dtype, tmp_path: Path) -> None:
    """The same tensors under the same names in the same dtypes, so the same bytes of data.

    (Codes may differ: their quantizer divides in the half precision of the weights.)
    """
    _, frozen = theirs(tmp_path / "theirs", QuantizationArgs(num_bits=4, strategy="group", group_size=32), dtype)
    ours = load_file(export(frozen, "hf", tmp_path / "ours") / "model.safetensors")
    other = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in other.items()}
    assert all(torch.equal(t, other[n]) for n, t in ours.items() if not n.endswith("_packed"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scale": "float32"}, "cannot hold"),
        ({"qtype": "uint4", "range": "minmax", "offset": "zero_point"}, "int4 is what fits"),
        ({"range": "minmax", "offset": "float16"}, "floating offset"),
        ({"block": (2, 32)}, "several rows"),
    ],
)
def test_what_their_loader_would_change_is_not_given_to_it(change: dict[str, Any], why: str) -> None:
    spec = QuantSpec(**{"qtype": "int4", "block": (1, 32), **change})
    model, frozen = prepared("llama", [rule(None, "lm_head"), rule(spec)])
    del model
    assert why in str(compressed_tensors.why_not(frozen, torch.bfloat16))
    assert (compressed_tensors.why_not(frozen, torch.float32) is None) == (why == "cannot hold")


def test_tied_and_other_layers_are_not_given_to_it() -> None:
    from prepared_models import ALL

    assert "Embedding" in str(compressed_tensors.why_not(prepared("gpt2", ALL)[1], torch.float32))
    conv = prepared("gpt2", [rule(ZERO, kind="Conv1D")])[1]
    assert "Conv1D" in str(compressed_tensors.why_not(conv, torch.float32))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    _, frozen = prepared("llama", LINEAR)
    path = export(frozen, "hf", tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["format"] = "float-quantized"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="float-quantized"):
        hf.read(path)
