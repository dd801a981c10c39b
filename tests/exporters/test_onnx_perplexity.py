"""The embedded model in ONNX Runtime: perplexity and greedy text, of every scheme that the ONNX targets set."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from onnx_decoders import logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.conversion import calibrate, convert, freeze_observers, prepare
from qat.data.stdlib import StdlibData
from qat.evaluation import answer_text, mean_loss
from qat.exporters import export
from qat.models.load import EMBEDDED
from qat.quantizers.bias import round_biases
from qat.recipes import CONFIGS
from qat.runtimes.ort_text import Decoder, score

SCHEMES = ["onnxruntime_int4", "int4_g32", "int8_static", "int8_token"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor]]:
    """(data, 64 windows of 256 tokens of the test split)."""
    data = StdlibData(block_size=256, batch_size=4)
    data.attach(AutoTokenizer.from_pretrained(EMBEDDED["gpt2_mini"]))
    return data, data.evaluation("test", 64)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_perplexity_and_text_are_those_of_the_fake_quantized_model(scheme: str, texts: Any, tmp_path: Path) -> None:
    data, batch = texts
    rules = instantiate(OmegaConf.load(Path(CONFIGS) / "scheme" / f"{scheme}.yaml"), _convert_="all")["rules"]
    model = prepare(AutoModelForCausalLM.from_pretrained(EMBEDDED["gpt2_mini"], dtype=torch.float32), rules).eval()
    if any(rule.scheme.static for rule in rules):
        ids = data.evaluation("validation", 16)["input_ids"]
        calibrate(model, ids.split(4), lambda m, part: m(input_ids=part))
        freeze_observers(model)
        round_biases(model)
    folder = export(convert(model), "onnx", tmp_path / "onnx")
    want = math.exp(mean_loss(answer_text(model, batch, 4)["nll"], batch["labels"]))
    have = math.exp(mean_loss(-score(folder, batch["input_ids"]), batch["labels"]))
    print(f"{scheme}: perplexity {want:.4f} trained, {have:.4f} in onnxruntime, {100 * (have / want - 1):+.4f}%")
    assert abs(have / want - 1) <= 5e-4
    same_text(model, Decoder(folder), batch["input_ids"][0, :12].tolist())


def same_text(model: Any, decoder: Decoder, ids: list[int]) -> None:
    """64 greedy tokens, or up to a step whose margin is below the spread of the simulation's own sums."""
    made, double = decoder.generate(ids, 64), copy.deepcopy(model).double()
    for step, token in enumerate(made):
        want = logits(model, torch.tensor([ids]))[0, -1]
        if token != int(want.argmax()):
            first, second = want.topk(2).values
            spread = (logits(double, torch.tensor([ids]))[0, -1] - want).abs().max()
            print(f"texts part at step {step}: margin {first - second:.2g}, spread {spread:.2g}")
            assert first - second <= spread
            return
        ids = [*ids, token]
    print(f"{len(made)} tokens equal")
