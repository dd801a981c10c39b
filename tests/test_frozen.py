"""Frozen: the round trip through a folder, digests, and every flipped byte found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_conversion import GPT2_RULES, STATIC, cnn, gpt2
from torch import nn

from qat.conversion import calibrate, convert, prepare
from qat.errors import UserError, VerifyError
from qat.frozen import Frozen, digest
from qat.scheme import QuantSpec, Rule, Scheme

ZERO = Scheme(weight=QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point"))


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    rules = [Rule(path=".*c_fc", scheme=ZERO), *GPT2_RULES]
    return convert(prepare(gpt2(), rules), tokenizer={"tokenizer.json": b"{}", "merges.txt": "é".encode()})


@pytest.fixture
def folder(frozen: Frozen, tmp_path: Path) -> Path:
    frozen.save(tmp_path / "frozen")
    return tmp_path / "frozen"


def test_round_trip(frozen: Frozen, folder: Path) -> None:
    back = Frozen.load(folder)
    assert back.digests() == frozen.digests()
    assert back.ties == frozen.ties
    assert back.config == json.loads(json.dumps(frozen.config))
    assert back.tokenizer == frozen.tokenizer
    for name, w in frozen.weights.items():
        other = back.weights[name]
        assert (other.tensor.spec, other.kind, other.shape) == (w.tensor.spec, w.kind, w.shape)
        assert torch.equal(other.dequantize(), w.dequantize())
    assert [p.name for p in folder.parent.iterdir()] == ["frozen"]


def test_static_inputs_round_trip(tmp_path: Path) -> None:
    model = prepare(cnn(), [Rule(scheme=STATIC)])
    calibrate(model, [torch.rand(2, 3, 8, 8)], lambda m, b: m(b))
    frozen = convert(model)
    frozen.save(tmp_path / "f")
    back = Frozen.load(tmp_path / "f")
    for name, i in frozen.inputs.items():
        other = back.inputs[name]
        assert (other.spec, other.static) == (i.spec, i.static)
        assert torch.equal(other.scale, i.scale)
        assert torch.equal(other.offset, i.offset)


def test_digests_that_load_has_checked_are_used_for_the_same_tensors_alone(frozen: Frozen, folder: Path) -> None:
    loaded = Frozen.load(folder)
    wide = {n: t.double() for n, t in loaded.floats.items()}
    some = dict(list(loaded.weights.items())[1:])
    for changed in ({"floats": wide}, {"weights": some}, {"floats": wide, "weights": some}):
        assert replace(loaded, **changed).digests() == replace(frozen, **changed).digests()


def test_a_loaded_tensor_may_be_written_to_without_changing_the_file(folder: Path) -> None:
    next(iter(Frozen.load(folder).weights.values())).tensor.codes.fill_(0)
    Frozen.load(folder)


def test_saving_again_replaces_the_folder(frozen: Frozen, folder: Path) -> None:
    (folder / "stray").write_text("x")
    frozen.save(folder)
    assert not (folder / "stray").exists()
    assert Frozen.load(folder).digests() == frozen.digests()


@pytest.mark.parametrize("name", ["tensors.safetensors", "frozen.json", "tokenizer/merges.txt"])
def test_a_flipped_bit_is_found(name: str, folder: Path) -> None:
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(VerifyError, match=Path(name).name):
        Frozen.load(folder)


def test_missing_and_truncated_files_are_found(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(VerifyError):
        Frozen.load(folder)
    file.unlink()
    with pytest.raises(VerifyError, match="missing"):
        Frozen.load(folder)


def test_tensors_that_are_not_the_manifests_are_found(folder: Path) -> None:
    content = bytearray((folder / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(content)
    with pytest.raises(VerifyError, match="is not the tensor in the manifest"):
        Frozen.load(folder)


def test_no_byte_of_the_tensors_may_change(tmp_path: Path) -> None:
    """Of a model with every optional tensor: zero points, and a static input's scale and offset."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    weight = QuantSpec(qtype="uint4", block=(1, 4), range="minmax", offset="zero_point")
    taken = QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", offset="zero_point")
    prepare(model, [Rule(scheme=Scheme(weight=weight, input=taken, static=True))])
    calibrate(model, [torch.randn(3, 8)], lambda m, x: m(x))
    convert(model, config={"architecture": "x"}, path=tmp_path / "frozen")
    file = tmp_path / "frozen" / "tensors.safetensors"
    whole = file.read_bytes()
    names = {n.rpartition(".")[2] for n in Frozen.load(tmp_path / "frozen").digests()}
    assert names == {"bias", "words", "scale", "offset"}
    padding = 8 + int.from_bytes(whole[:8], "little")
    padding = range(len(whole[:padding].rstrip(b" ")), padding)  # the header's, which says nothing
    for at in range(len(whole)):
        for bit in (0, 5):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            if at in padding:
                continue
            file.write_bytes(changed)
            with pytest.raises(VerifyError):
                Frozen.load(tmp_path / "frozen")
    file.write_bytes(whole)
    Frozen.load(tmp_path / "frozen")


def test_a_folder_that_is_not_frozen_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a frozen folder"):
        Frozen.load(tmp_path)


def test_digests_see_dtype_shape_and_bytes() -> None:
    x = torch.arange(6, dtype=torch.int8)
    others = [x.to(torch.uint8), x.view(2, 3), x.flip(0), x.to(torch.int16)]
    assert len({digest(t) for t in [x, *others]}) == 5
    assert digest(x.view(2, 3).t()) == digest(x.view(2, 3).t().contiguous())


def test_nbytes_is_that_of_dense_packing(frozen: Frozen) -> None:
    codes = sum(w.tensor.codes.numel() * w.tensor.spec.type.bits for w in frozen.weights.values()) // 8
    assert frozen.nbytes() > codes
    assert frozen.nbytes() < sum(t.numel() * 4 for t in frozen.state_dict().values()) / 3


def test_what_the_manifest_does_not_cover_is_refused(folder: Path) -> None:
    """A file of nobody's, a digest that is not there, a tensor that is not."""
    (folder / "tokenizer" / "chat_template.jinja").write_text("stray")
    with pytest.raises(VerifyError, match=r"chat_template\.jinja is not in the manifest"):
        Frozen.load(folder)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("frozen.json", "tokenizer/merges.txt"):
        files = {**manifest["files"], name: {"bytes": manifest["files"][name]["bytes"]}}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(VerifyError, match=r"manifest\.json"):
            Frozen.load(folder)
    ghost = {**manifest["tensors"], "ghost": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tensors": ghost}))
    with pytest.raises(VerifyError, match="ghost is missing"):
        Frozen.load(folder)
