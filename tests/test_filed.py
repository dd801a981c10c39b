"""Packed codes of a frozen folder: the same codes again for every grid, and none that looks like another."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from tiny_text_models import VOCAB, byte_level_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qat.affine import QTensor, choose_qparams, quantize
from qat.conversion import convert, prepare
from qat.errors import VerifyError
from qat.exporters import export, made_of_others
from qat.filed import filed, packed, words
from qat.frozen import Frozen, digest
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


def model(path: Path) -> Frozen:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    net = prepare(LlamaForCausalLM(config), [Rule(path="lm_head", scheme=Scheme(weight=tensor("int4").spec))])
    return convert(net, tokenizer={"tokenizer.json": byte_level_tokenizer().to_str().encode()}, path=path)


def rewritten(folder: Path, tensors: dict[str, Tensor], digests: dict[str, str]) -> None:
    """As a writer that believes in these tensors would leave the folder."""
    save_file(tensors, folder / "tensors.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"] = digests
    manifest["files"]["tensors.safetensors"]["bytes"] = (folder / "tensors.safetensors").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_earlier_versions_wrote_is_read_and_verified(tmp_path: Path) -> None:
    """A byte a code in frozen/, and digests of that in its manifest and in its exports'."""
    frozen = model(tmp_path / "new")
    for name in ("new", "old"):
        export(frozen, "hf", tmp_path / f"{name}_hf")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "tensors.safetensors")
    del tensors["lm_head.weight.words"]
    tensors["lm_head.weight.codes"] = frozen.weights["lm_head.weight"].tensor.codes
    digests = {n: digest(t) for n, t in tensors.items()}
    rewritten(tmp_path / "old", tensors, digests)
    manifest = json.loads((tmp_path / "old_hf" / "manifest.json").read_text())
    (tmp_path / "old_hf" / "manifest.json").write_text(json.dumps({**manifest, "tensors": digests}))
    old = Frozen.load(tmp_path / "old")
    assert old.digests() == frozen.digests()
    assert old.digests(like=digests) == frozen.digests(like=digests) == digests
    assert torch.equal(old.weights["lm_head.weight"].tensor.codes, frozen.weights["lm_head.weight"].tensor.codes)
    assert made_of_others({"tensors": digests}, frozen) == []
    for path in (tmp_path / n for n in ("old", "old_hf", "new", "new_hf")):
        alone = verify(path, runtime=False)
        assert alone.differences == []
        assert alone.figures["codes_equal"]
        assert not any("tensors" in said for said in alone.unchecked)
        for other in ("old", "new"):
            assert verify(path, against=tmp_path / other, runtime=False).differences == []
    wrong = {**digests, "lm_head.weight.codes": digest(torch.zeros(3))}
    (tmp_path / "old_hf" / "manifest.json").write_text(json.dumps({**manifest, "tensors": wrong}))
    assert "lm_head.weight.codes" in verify(tmp_path / "old_hf", runtime=False).differences[0]
    assert len(made_of_others({"tensors": wrong}, frozen)) == 1


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("lm_head.weight.words", None, "words is not in the file"),
        ("lm_head.weight.scale", None, "scale is not in the file"),
        ("model.norm.weight", None, "model.norm.weight is not in the file"),
        ("more", lambda _: torch.zeros(3), "more is not in frozen.json"),
        ("lm_head.weight.offset", lambda _: torch.zeros(3), "offset is not in frozen.json"),
        ("lm_head.weight.words", lambda t: t[:, 1:].contiguous(), "words has shape"),
        ("lm_head.weight.words", lambda t: t[1:].contiguous(), "words has shape"),
        ("lm_head.weight.scale", lambda t: t[1:].contiguous(), "scale has shape"),
    ],
)
def test_tensors_that_frozen_json_does_not_say(
    name: str, change: Callable[[Any], Tensor] | None, said: str, tmp_path: Path
) -> None:
    """Digests that match do not make them those of the model."""
    model(tmp_path / "f")
    tensors = load_file(tmp_path / "f" / "tensors.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    rewritten(tmp_path / "f", tensors, {n: digest(t) for n, t in tensors.items()})
    with pytest.raises(VerifyError, match=said):
        Frozen.load(tmp_path / "f")
