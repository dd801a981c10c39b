"""Real damage to real files: the kind of difference is named, and its effect is that of the damaged weights."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from prepared_models import ALL, prepared
from safetensors.torch import load_file, save_file
from tiny_text_models import INT4, byte_level_tokenizer, freeze, tiny, tokenizer_files

from qat import diagnosis
from qat.affine import choose_qparams, quantize
from qat.exporters import export
from qat.frozen import FrozenWeight
from qat.scheme import QuantSpec
from qat.verification import verify

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(frozen folder, its GGUF file without a manifest) of a tiny Llama."""
    end = "<|endoftext|>"
    words = tokenizer_files(byte_level_tokenizer("gpt-2"), bos_token=end, eos_token=end, unk_token=end)
    frozen = freeze(tiny("llama", intermediate_size=128), words, replace(INT4, scale="float16"))
    frozen.save(tmp_path / "frozen")
    path = export(frozen, "gguf", tmp_path / "gguf")
    (path / "manifest.json").unlink()
    return tmp_path / "frozen", path / "model.gguf"


def blocks(file: Path, name: str) -> np.ndarray:
    """The bytes of a tensor, writable in place: (rows, bytes)."""
    return next(t for t in gguf.GGUFReader(file, "r+").tensors if t.name == name).data


def differences(file: Path, frozen: Path) -> list[str]:
    return verify(file, against=frozen, runtime=False).differences


def test_swapped_nibbles_in_a_gguf_file(files: tuple[Path, Path]) -> None:
    data = blocks(files[1], "blk.0.ffn_up.weight")
    body = data.reshape(len(data), -1, 18)[..., 2:]
    body[:] = body >> 4 | body << 4
    data.flush()
    said = differences(files[1], files[0])
    assert said[0].startswith("model.layers.0.mlp.up_proj.weight: low and high nibbles are swapped")
    assert "dB SQNR" in said[0]


def test_rows_that_were_not_put_in_llama_cpps_rotary_order(files: tuple[Path, Path]) -> None:
    data = blocks(files[1], "blk.0.attn_q.weight")
    order = torch.arange(64).reshape(4, 2, 8).transpose(1, 2).flatten().argsort().numpy()
    data[:] = data[order]
    data.flush()
    said = differences(files[1], files[0])
    assert said[0].startswith(f"{Q_PROJ}: the rows are in another rotary order (heads of 16)")


def test_a_scale_moved_by_one_ulp(files: tuple[Path, Path]) -> None:
    data = blocks(files[1], "blk.1.ffn_down.weight")
    data.reshape(len(data), -1, 18)[3, 1, 0] ^= 1
    data.flush()
    (said,) = differences(files[1], files[0])
    assert "the codes are equal but the stored scales differ: 32 of 8192 weights" in said
    assert "one unit in the last place of float16" in said


def test_scales_stored_as_bfloat16(files: tuple[Path, Path]) -> None:
    data = blocks(files[1], "blk.1.ffn_gate.weight")
    halves = data.reshape(len(data), -1, 18)[..., :2]
    scales = torch.from_numpy(np.ascontiguousarray(halves).view(np.float16)).bfloat16().half()
    halves[:] = scales.numpy().view(np.uint8)
    data.flush()
    frozen = files[0]
    (said,) = differences(files[1], frozen)
    assert "the stored scales differ: they are rounded to bfloat16" in said


def test_a_transposed_conv1d(tmp_path: Path) -> None:
    _, frozen = prepared("gpt2", ALL)
    w = next(w for n, w in frozen.weights.items() if n.endswith("attn.c_proj.weight"))
    found = diagnosis.weights(replace(w, tensor=replace(w.tensor, codes=w.tensor.codes.t().contiguous())), w)
    assert found is not None
    assert found.kind == "transposition"
    floats = torch.randn(8, 8)
    assert diagnosis.floats(floats.t(), floats).kind == "transposition"  # type: ignore[union-attr]
    frozen.save(tmp_path / "frozen")
    path = export(frozen, "hf", tmp_path / "hf")
    (path / "manifest.json").unlink()
    stored = load_file(path / "model.safetensors")
    stored["transformer.wpe.weight"] = stored["transformer.wpe.weight"].t().contiguous()
    save_file(stored, path / "model.safetensors")
    assert "wpe.weight: the matrix is transposed" in differences(path, tmp_path / "frozen")[0]


def weight(spec: QuantSpec, rows: int = 32, cols: int = 64) -> FrozenWeight:
    torch.manual_seed(0)
    x = torch.randn(rows, cols) + 0.2
    return FrozenWeight(quantize(x, choose_qparams(x, spec), spec), "Linear", (rows, cols))


def test_the_kinds_of_another_codes_order() -> None:
    w = weight(INT4)
    codes = w.tensor.codes
    made = {
        "the two nibbles of every byte": codes.reshape(32, 32, 2).flip(-1).reshape(32, 64),
        "in AWQ's order": codes.reshape(32, 8, 8)[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(32, 64),
        "signed codes read as unsigned": codes + 8,
        "the other sign": -codes,
        "rows are in another order": codes[torch.randperm(32)],
        "act-order": codes[:, torch.randperm(64)],
        "1 of 2048 codes differ, by": codes.index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(9).char()),
    }
    for said, damaged in made.items():
        found = diagnosis.weights(replace(w, tensor=replace(w.tensor, codes=damaged)), w)
        assert found is not None
        assert said in found.text, found
        assert "dB SQNR" in found.text
    assert diagnosis.weights(w, w) is None


def test_zero_points_of_the_other_version_of_gptq() -> None:
    spec = QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point", scale="float16")
    w = weight(spec)
    assert w.tensor.offset is not None
    found = diagnosis.weights(replace(w, tensor=replace(w.tensor, offset=w.tensor.offset - 1)), w)
    assert found is not None
    assert "versions 1 and 2 of GPTQ" in found.text


def test_the_same_weights_on_another_grid_are_no_difference() -> None:
    w = weight(replace(INT4, block=(1, 64)))
    scale = w.tensor.scale.repeat_interleave(2, 1)
    split = replace(w, tensor=replace(w.tensor, scale=scale, spec=replace(INT4, block=(1, 32))))
    assert diagnosis.weights(split, w) is None
    found = diagnosis.weights(replace(split, tensor=replace(split.tensor, scale=scale * 1.5)), w)
    assert found is not None
    assert "by a factor of 1.5" in found.text


def test_the_effect_is_signal_over_noise() -> None:
    want = torch.tensor([3.0, 4.0])
    assert diagnosis.sqnr(want + torch.tensor([0.3, -0.4]), want) == pytest.approx(20.0, abs=1e-5)
    assert diagnosis.sqnr(want, want) == float("inf")
