"""Folders that are not quite a model: each is refused by name, where transformers would go on with random weights."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qat.errors import UserError
from qat.models import load as source
from qat.models.load import Pretrained, load

sys.path.append(str(Path(__file__).parents[1]))
from tiny_models import tiny_gpt2, tiny_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "a model, (é)=1"))


def configure(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def shard(folder: Path) -> None:
    """An index that lists a shard which is not there."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights: model.safetensors"),
    "cut weights": (cut, "model.safetensors is damaged or cut short .*incomplete metadata"),
    "not weights": (lambda f: (f / "model.safetensors").write_text("x" * 99), "model.safetensors is damaged"),
    "lost shard": (shard, "lacks model-00002-of-00002.safetensors, which its index lists"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing or not valid JSON"),
    "bad config": (lambda f: (f / "config.json").write_text("{x"), "config.json is missing or not valid JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer: tokenizer.json is missing"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{x"), "the tokenizer cannot be loaded"),
    "unknown": (configure(model_type="frobnicate"), r"model type frobnicate\) cannot be loaded: .*does not recognize"),
    "own code": (
        configure(model_type="frobnicate", auto_map={"AutoModelForCausalLM": "m.M"}),
        "runs its own Python code; .*model.trust_remote_code=true",
    ),
    "more layers": (configure(n_layer=3), r"the weights lack transformer\.h\.2\.attn\.c_attn\.bias and 11 more"),
    "other width": (configure(n_embd=64), r"the weights lack transformer.* have another shape than config.json"),
    "small vocabulary": (
        lambda f: tiny_tokenizer(additional_special_tokens=["<a>", "<b>"]).save_pretrained(f),
        "the tokenizer knows .* ids but the model embeds",
    ),
    "quantized": (configure(quantization_config={"quant_method": "gptq"}), r"is already quantized \(gptq\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_by_name(name: str, folder: Path):
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load(str(folder))
    assert str(folder) in str(error.value)
    assert error.value.exit_code == 2


def test_a_folder_loads_as_transformers_loads_it(folder: Path):
    from transformers import AutoModelForCausalLM

    loaded = load(str(folder), name="hf", explicit=True)
    assert (loaded.source, loaded.fallback) == (str(folder), None)
    ids = torch.tensor([loaded.tokenizer("the quick brown fox")["input_ids"]])
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.model(ids).logits, reference(ids).logits)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32


def test_dtype_reaches_transformers_and_tied_weights_stay_tied(folder: Path):
    model = Pretrained(path=str(folder), dtype="bfloat16").load().model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_home_folder_and_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load(f"~/{folder.name}").source == str(folder)
    with pytest.raises(UserError, match=r"is a file; model\.path needs the folder"):
        load(str(folder / "config.json"))


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "a/b/c", "~/nowhere", "with space"])
def test_what_can_be_no_hub_id_is_a_missing_folder(path: str):
    with pytest.raises(UserError, match="there is no such folder"):
        load(path)


def test_options_are_checked_before_anything_else():
    with pytest.raises(UserError, match=r"model\.dtype=int7 is not possible; choose one of float32, bfloat16"):
        load("x", dtype="int7")
    with pytest.raises(UserError, match=r"model\.offline=maybe is not possible; choose error, gpt2_mini or llama_mini"):
        load("x", offline="maybe")
    with pytest.raises(UserError, match=r"model=hf needs model\.path"):
        load(None, name="hf")


def test_the_embedded_model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(source.EMBEDDED, "gpt2_mini", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"the embedded model .* is missing from this installation"):
        load(None, name="gpt2_mini")
    monkeypatch.setitem(source.EMBEDDED, "gpt2_mini", whole)
    loaded = load(None, name="gpt2_mini")
    assert (loaded.source, loaded.name, loaded.fallback) == ("gpt2_mini", "gpt2_mini", None)
