"""prepare, calibrate and convert: names and identities kept, ties, clear refusals, and codes equal to the forward's."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qat.conversion import calibrate, convert, fake_quantizers, freeze_observers, prepare, set_fake_quant
from qat.errors import UserError
from qat.modules.base import QuantLayer
from qat.quantizers.lsq import LSQ
from qat.quantizers.minmax import MinMax
from qat.scheme import QuantSpec, Rule, Scheme

INT4 = Scheme(weight=QuantSpec(qtype="int4", block=(1, 32)))
INT8 = Scheme(weight=QuantSpec(qtype="int8", block=(1, 32)))
STATIC = Scheme(
    weight=QuantSpec(qtype="int8", block=(1, -1), scale="float32"),
    input=QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", offset="zero_point", scale="float32"),
    static=True,
)
GPT2_RULES = [Rule(type="Conv1D", scheme=INT4), Rule(path=".*(wte|lm_head)", scheme=INT8)]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


IDS = torch.arange(24).reshape(2, 12)


def test_names_and_identities_are_kept() -> None:
    model = gpt2()
    names, weights = list(model.state_dict()), dict(model.named_parameters())
    prepare(model, GPT2_RULES)
    assert list(model.state_dict()) == names
    assert all(p is weights[n] for n, p in model.named_parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(isinstance(m, QuantLayer) for m in model.modules()) == 8 + 2


@pytest.mark.parametrize("weight", [MinMax, LSQ])
def test_scales_are_frozen_in_the_dtype_they_are_stored_in(weight) -> None:
    frozen = convert(prepare(gpt2(), GPT2_RULES, weight=weight))
    assert {w.tensor.scale.dtype for w in frozen.weights.values()} == {torch.float16}


def test_tied_weights_share_one_quantizer_and_one_grid() -> None:
    model = prepare(gpt2(), GPT2_RULES, weight=LSQ)
    assert model.lm_head.weight_quantizer is model.transformer.wte.weight_quantizer
    frozen = convert(model)
    assert frozen.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in frozen.weights


@pytest.mark.parametrize("factory", [gpt2, llama])
def test_the_converted_weights_are_what_the_forward_pass_multiplied_with(factory) -> None:
    model = factory()
    float_model = copy.deepcopy(model)
    rules = GPT2_RULES if factory is gpt2 else [Rule(path="lm_head"), Rule(type="Linear", scheme=INT4)]
    prepare(model, rules)
    with torch.no_grad():
        want = model(IDS).logits
    frozen = convert(model)
    assert frozen.config["model_type"] in ("gpt2", "llama")
    missing = float_model.load_state_dict(frozen.state_dict(), strict=False).missing_keys
    assert [k for k in missing if not k.endswith("attn.bias")] == []
    with torch.no_grad():
        got = float_model(IDS).logits
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_conv1d_blocks_run_along_in() -> None:
    model = gpt2()
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    assert weight.shape == (64, 256)
    frozen = convert(prepare(model, [Rule(type="Conv1D", scheme=INT4)]))
    w = frozen.weights["transformer.h.0.mlp.c_fc.weight"]
    assert w.tensor.codes.shape == (256, 64)
    assert w.tensor.scale.shape == (256, 2)
    assert w.dequantize().shape == (64, 256)
    top = weight[:32, 5].abs().max() / 7
    assert torch.equal(w.tensor.scale[5, 0], top.to(torch.bfloat16).to(torch.float16))


def test_toggling_changes_the_result_and_back() -> None:
    model = gpt2()
    before = model(IDS).logits
    prepare(model, GPT2_RULES)
    on = model(IDS).logits
    set_fake_quant(model, False)
    assert torch.equal(model(IDS).logits, before)
    set_fake_quant(model, True)
    assert torch.equal(model(IDS).logits, on)
    assert not torch.equal(on, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_toggling_changes_the_compiled_loss() -> None:
    """A canary: torch.compile could fold the flag into a constant."""
    model = prepare(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)), [Rule(scheme=INT4)])
    x = torch.randn(4, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with torch.no_grad():
        for state in (True, False, True):
            set_fake_quant(model, state)
            torch.testing.assert_close(compiled(x), model(x))
        on = compiled(x)
        set_fake_quant(model, False)
        assert not torch.allclose(compiled(x), on, atol=1e-4)


def test_static_inputs() -> None:
    model = prepare(cnn(), [Rule(scheme=STATIC)])
    with pytest.raises(UserError, match="has no range"):
        convert(model)
    with pytest.raises(UserError, match="never seen a batch"):
        freeze_observers(model)
    with pytest.raises(UserError, match="calibration set is empty"):
        calibrate(model, [], lambda m, b: m(b))
    batches = [torch.rand(2, 3, 8, 8) * 4 - 1 for _ in range(3)]
    calibrate(model, batches, lambda m, b: m(b))
    freeze_observers(model)
    low = min(float(b.min()) for b in batches)
    high = max(float(b.max()) for b in batches)
    frozen = convert(model)
    i = frozen.inputs["0"]
    assert i.static
    assert float(i.scale) == pytest.approx((high - low) / 255, rel=1e-6)
    assert int(i.offset) == round(-low / float(i.scale))
    assert float(frozen.inputs["3"].scale) > 0
    model.train()
    model(torch.rand(2, 3, 8, 8) * 100)  # frozen: training no longer moves the range
    assert torch.equal(convert(model).inputs["0"].scale, i.scale)


def test_calibration_refuses_what_is_not_finite_and_leaves_the_model_as_it_was() -> None:
    model = prepare(cnn(), [Rule(scheme=STATIC)]).train()
    with pytest.raises(UserError, match="NaN or infinity"):
        calibrate(model, [torch.full((1, 3, 8, 8), torch.nan)], lambda m, b: m(b))
    assert model.training
    assert all(q.enabled for q in fake_quantizers(model).values())
    with pytest.raises(UserError, match="never reached"):
        calibrate(model, [torch.rand(1, 3, 8, 8)], lambda m, b: m[0](b))


def test_shared_inputs() -> None:
    rules = [Rule(path=".*(q|k|v)_proj", scheme=STATIC, share="input"), Rule(path=".*o_proj", scheme=STATIC)]
    model = prepare(llama(), rules)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.input_quantizer is attention.k_proj.input_quantizer is attention.v_proj.input_quantizer
    assert attention.o_proj.input_quantizer is not attention.q_proj.input_quantizer
    assert model.model.layers[1].self_attn.q_proj.input_quantizer is not attention.q_proj.input_quantizer


def test_dynamic_inputs_are_recorded() -> None:
    token = QuantSpec(qtype="int8", block=(1, -1), scale="float32")
    frozen = convert(prepare(cnn()[3:], [Rule(scheme=Scheme(weight=INT8.weight, input=token))]))
    assert frozen.inputs["3"].spec == token
    assert not frozen.inputs["3"].static
    assert frozen.inputs["3"].scale is None


def test_preparing_twice_and_converting_too_early_are_refused() -> None:
    with pytest.raises(UserError, match="nothing to convert"):
        convert(gpt2())
    with pytest.raises(UserError, match="prepared already"):
        prepare(prepare(gpt2(), GPT2_RULES), GPT2_RULES)


def test_weights_that_are_not_finite_are_named() -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(UserError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight: .*NaN"):
        prepare(model, GPT2_RULES, gelu="float16_table", kv_cache="float16")
    with pytest.raises(UserError, match="decides nothing"):
        prepare(model, [*GPT2_RULES, Rule(path="nothing")], gelu="float16_table", kv_cache="float16")
    assert {n: type(m) for n, m in model.named_modules()} == before  # a refused model stays as it was
    assert "qat" not in model.config._attn_implementation
    assert not hasattr(model.config, "kv_cache")
    model = prepare(gpt2(), GPT2_RULES)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[3, 3] = 1e30
    with pytest.raises(UserError, match=r"transformer\.h\.0\.attn\.c_attn\.weight: a scale is beyond"):
        convert(model)


def test_what_a_runtime_computes_otherwise_is_noted_or_refused() -> None:
    config = prepare(gpt2(), GPT2_RULES, gelu="float16_table", kernels="ggml").config
    assert (config.gelu, config.kernels) == ("float16_table", "ggml")
    assert not hasattr(prepare(gpt2(), GPT2_RULES).config, "kernels")
    with pytest.raises(UserError, match="kernels=mlx is not possible; choose ggml, onnxruntime or leave it out"):
        prepare(gpt2(), GPT2_RULES, kernels="mlx")


def test_a_trained_state_survives_save_and_load() -> None:
    """Learned scales and observed ranges are in the state dict, bit for bit."""
    model = prepare(cnn(), [Rule(scheme=STATIC)], weight=lambda s, t: LSQ(s, t))
    calibrate(model, [torch.rand(2, 3, 8, 8)], lambda m, b: m(b))
    with torch.no_grad():
        model[0].weight_quantizer.scale.mul_(1.1)
    other = prepare(cnn(), [Rule(scheme=STATIC)], weight=lambda s, t: LSQ(s, t))
    other.load_state_dict(model.state_dict())
    assert convert(other).digests() == convert(model).digests()
