"""llama.cpp's GELU table: its values by numpy, its gradient by torch's GELU."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qat.modules.gelu import TableGELU, table_gelu, use_table_gelu


def test_every_float16_maps_to_the_float16_of_the_formula() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    x = bits.view(np.float16).astype(np.float32)
    x = x[np.isfinite(x)]
    one, root = np.float32(1), np.float32(np.sqrt(2 / np.pi))
    inner = root * x * (one + np.float32(0.044715) * x * x)  # float32 throughout, as in ggml: 1 + tanh cancels
    want = (np.float32(0.5) * x * (one + np.tanh(inner))).astype(np.float16).astype(np.float32)
    want = np.where(x <= -10, 0, np.where(x >= 10, x, want))
    got = table_gelu(torch.from_numpy(x)).numpy()
    assert np.abs(got - want).max() <= 2.0**-9  # one unit in the last place of a float16 up to 10
    assert (got != want).mean() < 5e-3  # the last bit of tanh differs between libraries


def test_gradient_is_that_of_gelu() -> None:
    x = torch.linspace(-12, 12, 1001, requires_grad=True)
    TableGELU()(x).sum().backward()
    y = x.detach().clone().requires_grad_()
    F.gelu(y, approximate="tanh").sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


def test_the_activations_of_transformers_are_found() -> None:
    for kind, act in (("gpt2", "gelu_new"), ("gpt2", "gelu_pytorch_tanh"), ("gpt_neox", "gelu"), ("llama", "silu")):
        shape = {"n_layer": 2, "n_embd": 32, "n_head": 2} if kind == "gpt2" else {"num_hidden_layers": 2}
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        key = "activation_function" if kind == "gpt2" else "hidden_act"
        config = AutoConfig.for_model(kind, **{**sizes, **shape, key: act})
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        assert use_table_gelu(model) == (0 if act == "silu" else 2)
        assert getattr(model.config, key) == ("gelu_pytorch_tanh" if act == "gelu" else act)  # what the table is
