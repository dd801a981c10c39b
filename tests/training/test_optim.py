"""Parameter groups and the schedule, the latter against transformers' own."""

from pathlib import Path

import pytest
import torch
from tiny_training import gpt2, train
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_with_min_lr_schedule_with_warmup

from qat.conversion import prepare
from qat.quantizers.lsq import LSQ
from qat.scheme import QuantSpec, Rule, Scheme
from qat.training.optim import Optimizer, factor, groups


def names(model: torch.nn.Module) -> tuple[set[str], ...]:
    of = {id(p): name for name, p in model.named_parameters()}
    return tuple({of[id(p)] for p in group} for group in groups(model))


def test_norms_biases_and_learned_scales_do_not_decay() -> None:
    rule = Rule(type="Conv1D", scheme=Scheme(weight=QuantSpec(qtype="int4", block=(1, 16))))
    model = prepare(gpt2(), [rule], weight=LSQ)
    decayed, plain, scales = names(model)
    assert len(scales) == 8  # one for each of the 2 x 4 linears
    assert all(name.endswith("bias") or ".ln_" in name for name in plain)
    assert {name.rpartition(".")[2] for name in decayed} == {"weight"}
    assert decayed | plain | scales == {name for name, _ in model.named_parameters()}
    built = Optimizer(lr=1e-3, scale_lr=0.1, weight_decay=0.2).build(model, 10)["optimizer"]
    assert [group["weight_decay"] for group in built.param_groups] == [0.2, 0.0, 0.0]
    assert [group["initial_lr"] for group in built.param_groups] == pytest.approx([1e-3, 1e-3, 1e-4])


def test_norms_of_transformers_own_classes_do_not_decay() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    _, plain, scales = names(LlamaForCausalLM(config))
    assert plain == {
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }
    assert not scales


def test_cosine_is_that_of_transformers() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, 50, min_lr_rate=0.1)
    for step in range(60):
        if 10 <= step <= 50:
            assert factor(step, 10, 50, 0.1) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_warm_up_ends_at_the_full_rate_and_the_floor_holds() -> None:
    assert [factor(step, 4, 100, 0.1) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(100, 4, 100, 0.1) == factor(1000, 4, 100, 0.1) == pytest.approx(0.1)


def test_clipping_at_zero_is_none_at_all(tmp_path: Path) -> None:
    runs = [gpt2(dropout=0.0) for _ in range(2)]
    runs[1].load_state_dict(runs[0].state_dict())
    for model, clip in zip(runs, (0, None), strict=True):
        train(model, tmp_path / str(clip), max_steps=2, gradient_clip_val=clip)
    for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(a, b)
