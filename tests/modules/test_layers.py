"""Fake-quantized layers: each against the float layer run with its quantized weight, and whole models in training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from qat.conversion import prepare
from qat.modules import LAYERS, quantized_class
from qat.quantizers.lsq import LSQ
from qat.quantizers.minmax import MinMax
from qat.scheme import QuantSpec, Rule, Scheme

GROUP = QuantSpec(qtype="int4", block=(1, 16))
CHANNEL = QuantSpec(qtype="int8", block=(1, -1))
TOKEN = QuantSpec(qtype="int8", block=(1, -1), scale="float32")


def layers() -> list[tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        (nn.Linear(64, 24), torch.randn(2, 5, 64)),
        (nn.Linear(64, 24, bias=False), torch.randn(7, 64)),
        (Conv1D(48, 64), torch.randn(2, 5, 64)),
        (nn.Conv2d(16, 8, 3, padding=1, stride=2, padding_mode="reflect"), torch.randn(2, 16, 9, 9)),
        (nn.Conv2d(16, 16, 4, groups=4, dilation=2), torch.randn(1, 16, 9, 9)),
        (nn.Embedding(50, 64, padding_idx=3), torch.randint(0, 50, (2, 7))),
    ]


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("factory", [MinMax, LSQ])
def test_a_layer_equals_the_float_layer_with_the_quantized_weight(index: int, factory) -> None:
    layer, x = layers()[index]
    spec = GROUP
    cls = quantized_class(layer)
    q = factory(spec, cls.canonical(layer.weight.detach()))
    new = cls.from_float(layer, q, None)
    assert new.weight is layer.weight
    assert new.kind == type(layer).__name__
    got = new(x)
    value = new.quantized_weight().detach()
    with torch.no_grad():
        layer.weight.copy_(value.t() if isinstance(layer, Conv1D) else value.view_as(layer.weight))
    torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("index", [0, 2, 3])
def test_inputs_are_quantized_too(index: int) -> None:
    layer, x = layers()[index]
    spec = QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", offset="zero_point") if index == 3 else TOKEN
    cls = quantized_class(layer)
    new = cls.from_float(layer, None, MinMax(spec))
    assert torch.equal(new(x), layer(MinMax(spec)(x)))
    assert not torch.equal(new(x), layer(x))


def test_gradients_reach_every_parameter() -> None:
    for layer, x in layers():
        new = quantized_class(layer).from_float(layer, MinMax(GROUP), None)
        new(x).square().sum().backward()
        for name, p in new.named_parameters():
            assert p.grad is not None, (type(layer), name)
            assert p.grad.abs().sum() > 0


def test_embedding_rows_are_quantized_as_in_the_whole_table() -> None:
    """Only the rows that are looked up are quantized, to the same values and gradients as the whole table would be."""
    layer, ids = layers()[5]
    new = quantized_class(layer).from_float(layer, MinMax(GROUP), None)
    whole = F.embedding(ids, new.quantized_weight(), padding_idx=3)
    assert torch.equal(new(ids), whole)
    ours = torch.autograd.grad(new(ids).square().sum(), layer.weight)[0]
    theirs = torch.autograd.grad(whole.square().sum(), layer.weight)[0]
    torch.testing.assert_close(ours, theirs)
    assert not ours[3].any()


def test_subclasses_are_not_taken_for_their_base() -> None:
    class Mine(nn.Linear):
        pass

    model = prepare(nn.Sequential(nn.Linear(16, 16), Mine(16, 16)), [Rule(scheme=Scheme(weight=GROUP))])
    assert type(model[0]).__name__ == "QuantLinear"
    assert type(model[1]) is Mine
    assert all(name.endswith(("Linear", "Embedding", "Conv2d", "Conv1D")) for name in LAYERS)


def test_devices_and_dtypes_follow_the_float_layer() -> None:
    model = prepare(nn.Sequential(nn.Linear(32, 8)).to(torch.bfloat16), [Rule(scheme=Scheme(weight=GROUP))], weight=LSQ)
    assert model(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model[0].weight_quantizer.scale.dtype == torch.float32


@pytest.mark.parametrize("weight", [MinMax, LSQ])
@pytest.mark.parametrize("mode", ["float32", "autocast", "checkpointing"])
def test_a_gpt2_learns(weight, mode: str) -> None:
    """Two dozen steps on one batch lower the loss, with a tied int8 embedding and int4 Conv1D."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    )
    rules = [
        Rule(type="Conv1D", scheme=Scheme(weight=GROUP)),
        Rule(path=".*wte|lm_head", scheme=Scheme(weight=CHANNEL)),
    ]
    prepare(model, rules, weight=weight).train()
    if mode == "checkpointing":
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(0, 64, (4, 16))
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1
