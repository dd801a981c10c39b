"""What `prepare`, `calibrate` and the exporters would refuse is refused at the audit, before data and run folder."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_conversion import GPT2_RULES, STATIC, cnn, gpt2
from torch import nn

from qat import entry
from qat.auditing import audit
from qat.errors import UserError
from qat.exporters import refuse_caches
from qat.observers.ema import EMAObserver
from qat.observers.minmax import MinMaxObserver
from qat.ptq import mse
from qat.quantizers.fixed import Fixed
from qat.quantizers.lsq import LSQ
from qat.quantizers.minmax import MinMax
from qat.rehearsal import rehearse
from qat.scheme import QuantSpec, Rule, Scheme

STATIC_RULES = [Rule(scheme=STATIC)]


def refusal(model: nn.Module, rules: list[Rule], **options: Any) -> str:
    """The message of what a rehearsal refuses, "" if it refuses nothing; the model stays as it is."""
    before = {n: type(m) for n, m in model.named_modules()}
    given: dict[str, Any] = {"weight": MinMax, "observer": MinMaxObserver, "calibration_batches": 1, **options}
    try:
        rehearse(model, audit(model, rules), rules, **given)
    except UserError as error:
        return str(error)
    finally:
        assert {n: type(m) for n, m in model.named_modules()} == before
    return ""


def test_what_prepare_accepts_is_accepted() -> None:
    assert refusal(gpt2(), GPT2_RULES, weight=LSQ) == ""
    assert refusal(gpt2(), GPT2_RULES, weight=partial(Fixed, init=mse.search), calibration_batches=0) == ""
    assert refusal(cnn(), STATIC_RULES) == ""


def test_settings_of_quantizer_and_observer() -> None:
    no_steps = partial(Fixed, init=partial(mse.search, steps=0))
    assert "the quantizer refuses int8 (1, 32) absmax portable: steps=0" in refusal(gpt2(), GPT2_RULES, weight=no_steps)
    offset = QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point")
    asymmetric = [Rule(type="Conv1D", scheme=Scheme(weight=offset))]
    assert "LSQ learns symmetric scales" in refusal(gpt2(), asymmetric, weight=LSQ)
    assert "momentum is 2" in refusal(cnn(), STATIC_RULES, observer=partial(EMAObserver, momentum=2))
    assert "calibration_batches=0 leaves the static input range of 0" in refusal(
        cnn(), STATIC_RULES, calibration_batches=0
    )


def test_numerics_that_do_not_exist() -> None:
    assert refusal(gpt2(), GPT2_RULES, gelu="float16_table", kernels="ggml") == ""
    assert "kernels=mlx is not possible; choose ggml, onnxruntime" in refusal(gpt2(), GPT2_RULES, kernels="mlx")
    assert "gelu=table is not possible" in refusal(gpt2(), GPT2_RULES, gelu="table")


def test_a_kv_cache_that_model_or_target_cannot_have() -> None:
    assert refusal(gpt2(), GPT2_RULES, kv_cache="int8") == ""  # heads of 32
    assert "language models of transformers, not Sequential" in refusal(cnn(), STATIC_RULES, kv_cache="int8")
    refuse_caches(["gguf", "hf"], None)
    refuse_caches(["gguf", "hf"], "int8")  # qat.load computes it too
    with pytest.raises(UserError, match=r"export to onnx: kv_cache=int8 is llama\.cpp's; leave it out"):
        refuse_caches(["gguf", "onnx"], "int8")


@pytest.mark.parametrize(("leaf", "value"), [("mlp.c_fc.weight", torch.nan), ("ln_2.weight", torch.inf)])
def test_a_weight_that_is_not_finite_is_named_quantized_or_not(leaf: str, value: float) -> None:
    model = gpt2()
    name = f"transformer.h.1.{leaf}"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] = value
    assert f"{name} holds NaN or infinity" in refusal(model, GPT2_RULES)


def test_a_weight_whose_scale_overflows_is_named() -> None:
    model = gpt2()
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.weight")[3, 5] = 1e7
    message = refusal(model, GPT2_RULES)
    assert message.startswith("transformer.h.1.mlp.c_fc.weight: a scale is beyond the range of portable")
    bfloat16 = Scheme(weight=QuantSpec(qtype="int4", block=(1, 32), scale="bfloat16"))
    assert refusal(model, [Rule(type="Conv1D", scheme=bfloat16)]) == ""


def test_a_run_is_refused_before_its_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert entry.main(["recipe=digits_cnn_int8", "calibration_batches=0", "model.epochs=1"]) == 2
    assert entry.main(["recipe=quickstart", "quantizer=mse", "quantizer.init.steps=0"]) == 2
    assert capsys.readouterr().err.count("; give 1 or more") == 2
    assert list(tmp_path.iterdir()) == []
