"""The embedded Llama: a trained model that every target takes, and what stands in for Llamas without a hub."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import LlamaForCausalLM

from qat import hub
from qat.auditing import audit
from qat.data.stdlib import StdlibData
from qat.evaluation import answer, figures
from qat.exporters import refuse_tokenizers
from qat.models.load import EMBEDDED, Loaded, load
from qat.recipes import CONFIGS
from qat.shipping import tokenizer_files

TARGETS = [path.stem for path in sorted((CONFIGS / "target").glob("*.yaml"))]


@pytest.fixture(scope="module")
def embedded() -> Loaded:
    return load(None, name="llama_mini")


def test_it_is_a_trained_llama(embedded: Loaded) -> None:
    model = embedded.model
    assert isinstance(model, LlamaForCausalLM)
    assert (embedded.source, embedded.fallback) == ("llama_mini", None)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert all(p.std() > 0.01 for name, p in model.named_parameters() if "norm" in name)
    data = StdlibData(block_size=256, batch_size=4)
    data.attach(embedded.tokenizer)
    assert figures(answer(model, data.evaluation("test", 4), 4))["perplexity"] < 60


def test_its_tokenizer_is_that_of_the_other_embedded_model() -> None:
    files = [(folder / "tokenizer.json").read_bytes() for folder in EMBEDDED.values()]
    assert files[0] == files[1]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_it(target: str, embedded: Loaded) -> None:
    sets: Any = OmegaConf.load(CONFIGS / "target" / f"{target}.yaml")
    name = next(entry["override /scheme"] for entry in sets.defaults if "override /scheme" in entry)
    rules = instantiate(OmegaConf.load(CONFIGS / "scheme" / f"{name}.yaml"), _convert_="all")["rules"]
    config = {**embedded.model.config.to_dict(), "architectures": [type(embedded.model).__name__]}
    found = audit(embedded.model, rules, targets=list(sets.export), config=config)
    refuse_tokenizers(list(sets.export), tokenizer_files(embedded.tokenizer), config)
    assert sum(row.spec is not None and ".layers." in row.name for row in found.rows) == 4 * 7  # every projection


def test_it_stands_in_for_the_llama_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise hub.Unreachable("no network")

    monkeypatch.setattr(hub, "fetch", unreachable)
    recipe: Any = OmegaConf.load(CONFIGS.parent / "recipes/llama_int4.yaml")
    source = instantiate(OmegaConf.merge(OmegaConf.load(CONFIGS / "model/hf.yaml"), recipe.model))
    loaded = source.load()
    assert (loaded.source, loaded.fallback.used) == ("llama_mini", "llama_mini")
    assert isinstance(loaded.model, LlamaForCausalLM)


def test_from_scratch_the_seed_decides_and_the_shape_is_the_embedded_ones(embedded: Loaded) -> None:
    source = instantiate(OmegaConf.load(CONFIGS / "model/llama_scratch.yaml"))
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(source.load().model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (models[0], embedded.model)]
    assert shapes[0] == shapes[1]


def test_the_folders_are_small() -> None:
    assert all(sum(f.stat().st_size for f in Path(folder).iterdir()) < 10e6 for folder in EMBEDDED.values())
