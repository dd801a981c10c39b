"""Packed codes of a frozen folder: the same codes again for every grid, and none that looks like another."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from tiny_text_models import VOCAB, byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from qat.affine import QTensor, choose_qparams, quantize
from qat.conversion import convert, prepare
from qat.exporters import export
from qat.filed import filed, packed, words
from qat.files import sha256
from qat.frozen import CODES, Frozen, digest
from qat.scheme import QuantSpec, Rule, Scheme
from qat.verification import verify

ROWS, COLS = 6, 40  # 40 codes of 2 bits do not fill their last word
SPECS = {
    "int2": 2,
    "uint2": 2,
    "ternary": 2,
    "int3": 4,
    "uint3": 4,
    "int4": 4,
    "uint4": 4,
    "int5": 8,
    "uint5": 8,
    "int6": 8,
    "int8": 8,
    "uint8": 8,
}


def tensor(qtype: str) -> QTensor:
    kind = {"range": "minmax", "offset": "zero_point"} if qtype.startswith("u") else {}
    spec = QuantSpec(qtype=qtype, block=(1, 8), **kind)  # pyright: ignore[reportArgumentType]
    x = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
    return quantize(x, choose_qparams(x, spec), spec)


@pytest.mark.parametrize("qtype", SPECS)
def test_every_grid_comes_back(qtype: str) -> None:
    q = tensor(qtype)
    stored = packed(q)
    assert stored.nbytes * 8 >= q.codes.numel() * SPECS[qtype]
    assert stored.shape == ((ROWS, -(-COLS * SPECS[qtype] // 32)) if SPECS[qtype] < 8 else (ROWS, COLS))
    back = filed(stored, q.scale, q.offset, q.spec, (ROWS, COLS))
    assert torch.equal(back.codes, q.codes)
    assert back.codes.dtype == q.codes.dtype
    assert back.shape == q.shape == (ROWS, COLS)
    assert torch.equal(packed(back), stored)
    assert torch.equal(words(back), words(q))
    bits, low = q.spec.type.bits, q.spec.type.qmin
    theirs = unpack_from_int32(words(back), bits, torch.Size((ROWS, COLS)))  # whose codes count from the middle
    assert torch.equal(theirs.int() + 2 ** (bits - 1) + low, q.codes.int())
    blank = back.blank()
    assert blank.codes.is_meta
    assert (blank.codes.shape, blank.codes.dtype) == (q.codes.shape, q.codes.dtype)
    assert packed(blank).shape == stored.shape
    assert packed(blank).dtype == stored.dtype


def test_what_replace_makes_of_one() -> None:
    q = tensor("int4")
    back = filed(packed(q), q.scale, q.offset, q.spec, (ROWS, COLS))
    other = replace(back, codes=-q.codes.clamp(min=-7))
    assert torch.equal(other.codes, -q.codes.clamp(min=-7))
    assert not torch.equal(packed(other), packed(back))
    assert torch.equal(replace(back, scale=q.scale * 2).codes, q.codes)


@pytest.mark.parametrize(("qtype", "code"), [("int4", 8), ("int4", -9), ("ternary", 3), ("uint4", 16), ("int2", -3)])
def test_a_code_outside_of_its_grid_is_kept_as_it_is(qtype: str, code: int) -> None:
    """As a nibble it would change its neighbour, and look like another file's code."""
    q = tensor(qtype)
    codes = q.codes.clone()
    codes[2, 4] = code
    damaged = replace(q, codes=codes)
    assert packed(damaged) is codes
    assert digest(packed(damaged)) != digest(packed(q))


def test_a_folder_of_a_byte_a_code_is_still_read(tmp_path: Path) -> None:
    """As earlier versions wrote it; its digests, of other bytes, are not those of an export."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = prepare(LlamaForCausalLM(config), [Rule(path="lm_head", scheme=Scheme(weight=tensor("int4").spec))])
    tokenizer = {"tokenizer.json": byte_level_tokenizer().to_str().encode()}
    frozen = convert(model, tokenizer=tokenizer, path=tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "tensors.safetensors")
    tensors["lm_head.weight.codes"] = frozen.weights["lm_head.weight"].tensor.codes
    save_file(tensors, tmp_path / "old" / "tensors.safetensors")
    meta = json.loads((tmp_path / "old" / "frozen.json").read_text())
    assert meta.pop("codes") == CODES
    (tmp_path / "old" / "frozen.json").write_text(json.dumps(meta))
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    manifest["tensors"]["lm_head.weight.codes"] = digest(tensors["lm_head.weight.codes"])
    for name, entry in manifest["files"].items():
        file = tmp_path / "old" / name
        entry["bytes"] = file.stat().st_size
        if "sha256" in entry:
            entry["sha256"] = sha256(file)
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    old = Frozen.load(tmp_path / "old")
    assert old.digests() == frozen.digests()
    assert torch.equal(old.weights["lm_head.weight"].tensor.codes, frozen.weights["lm_head.weight"].tensor.codes)
    for source in (old, frozen):
        path = export(source, "hf", tmp_path / "hf")
        assert not verify(path, against=tmp_path / "old", runtime=False).differences
        assert not verify(path, against=tmp_path / "new", runtime=False).differences
