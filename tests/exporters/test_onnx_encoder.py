"""BERT as ONNX: int8 and int4 weights, each head, against the fake-quantized model."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_decoders import apart, tokens
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

from qat.conversion import calibrate, convert, freeze_observers, prepare
from qat.exporters import export
from qat.exporters.onnx import read, refuse
from qat.exporters.onnx_nbits import level_4
from qat.quantizers.bias import round_biases
from qat.runtimes import run
from qat.runtimes.ort import open_session, operators
from qat.runtimes.ort_text import encode
from qat.scheme import QuantSpec, Rule, Scheme

ROW = QuantSpec(qtype="int8", block=(1, -1), scale="float32")
INT4 = QuantSpec(qtype="int4", block=(1, 16))
UINT8 = QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", scale="float32", offset="zero_point")
SCHEMES = {
    "static": Scheme(weight=ROW, input=UINT8, static=True),
    "token": Scheme(weight=ROW, input=ROW),
    "level_4": Scheme(weight=INT4, input=level_4(16)),
    "level_0": Scheme(weight=INT4),
}
HEADS = [BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification]


def bert(head: type[nn.Module], scheme: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    model = head(BertConfig(**sizes, vocab_size=512, num_labels=5, attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    prepare(model, [Rule(path=r".*word_embeddings|(?!.*embeddings).*", scheme=SCHEMES[scheme])])
    if SCHEMES[scheme].static:
        calibrate(model, [tokens(4, 32, seed) for seed in range(100, 104)], lambda m, ids: m(input_ids=ids))
        freeze_observers(model)
        round_biases(model)
    return model


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_fake_quantized_model(head: type[nn.Module], scheme: str, tmp_path: Path) -> None:
    model = bert(head, scheme)
    frozen = convert(model)
    folder = export(frozen, "onnx", tmp_path / "out")
    assert read(folder).digests() == frozen.digests()
    kernels = {"static": "MatMulIntegerToFloat", "token": "MatMulInteger"}
    kernels |= dict.fromkeys(("level_4", "level_0"), "MatMulNBits")
    ops = Counter(operators(folder))
    assert ops[kernels[scheme]] == len([n for n in frozen.weights if "embeddings" not in n]) + (head is BertForMaskedLM)
    assert not {"MatMul", "Gemm", "FusedMatMul"} & set(ops), ops
    found = []
    for seed in range(50):
        ids = tokens(1, 8 + seed % 5, seed)
        with torch.no_grad():
            found.append(apart(encode(folder, ids).numpy(), model(input_ids=ids).logits))
    assert sum(f <= 2e-6 for f in found) >= (50 if scheme == "level_0" else 17), sorted(found)
    assert np.median(found) <= 2e-6


def test_padding_and_token_types(tmp_path: Path) -> None:
    model = bert(BertForSequenceClassification, "level_0")
    folder = export(convert(model), "onnx", tmp_path / "out")
    ids, mask, types = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    mask[1, 7:], types[:, 5:] = 0, 1
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        want = model(**given).logits
    assert apart(open_session(folder).run(None, {n: t.numpy() for n, t in given.items()})[0], want) <= 2e-6
    assert run("ort", folder, encode=ids)["encode"].shape == (3, 5)


def test_other_heads_are_refused() -> None:
    config = {**BertConfig().to_dict(), "architectures": ["BertForQuestionAnswering"]}
    assert "not BertForQuestionAnswering" in str(refuse("qa_outputs.weight", "Linear", (2, 768), None, config))
