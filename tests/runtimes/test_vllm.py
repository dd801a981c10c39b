"""Which folders are run in vLLM: those on its formulas, where its environment has been made."""

from dataclasses import replace
from pathlib import Path

import pytest
from prepared_models import IDS, INT4, ZERO, rule, tiny

from qat.conversion import calibrate, convert, prepare
from qat.exporters import export, runtime_of
from qat.exporters.compressed_tensors import RANGE, TENSOR, TOKEN
from qat.runtimes import environments
from qat.scheme import QuantSpec

CHANNEL = QuantSpec(qtype="int8")
STATIC = rule(CHANNEL, input=TENSOR, static=True)
RUNTIMES = {
    "w8a8": ("vllm", rule(CHANNEL, input=TOKEN)),
    "w8a8_static": ("vllm", STATIC),
    "w4a8": ("vllm", rule(INT4, input=RANGE)),
    "w8a16": ("transformers_folder", rule(CHANNEL)),
    "asymmetric": ("transformers_folder", rule(ZERO)),
    "quant_method qat": ("transformers_folder", rule(CHANNEL, input=replace(TOKEN, divide="stored"))),
}


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_folder_is_run_where_its_formula_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_ENVIRONMENTS", str(tmp_path / "environments"))
    runtime, chosen = RUNTIMES[name]
    net = prepare(tiny("llama"), [rule(None, "lm_head"), chosen]).eval()
    calibrate(net, [IDS], lambda m, ids: m(input_ids=ids))
    path = export(convert(net), "hf", tmp_path / "out")
    assert runtime_of("hf", path) == "transformers_folder"
    python = environments.folder("vllm") / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert runtime_of("hf", path) == runtime


def test_a_target_with_one_runtime(tmp_path: Path) -> None:
    assert runtime_of("gguf", tmp_path) == "llama_cpp"
