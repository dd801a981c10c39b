"""The Python API in other people's loops: plain PyTorch and transformers.Trainer, three lines around the training."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import qat
from qat.scheme import QuantSpec, Rule, Scheme

INT4 = Scheme(weight=QuantSpec(qtype="int4", block=(1, 32)))


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return GPT2LMHeadModel(config)


def test_plain_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    before = model[0].weight.detach().clone()  # type: ignore[union-attr]
    qat.prepare(model, [Rule(type="Linear", scheme=INT4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(256, 64)
    target = x @ torch.randn(64, 32) / 8
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    frozen = qat.convert(model)
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(before, model[0].weight)  # type: ignore[arg-type]
    twin = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    twin.load_state_dict(frozen.state_dict())
    assert torch.equal(twin(x), model(x)), "the frozen codes are the trained fake-quantized weights"


def test_transformers_trainer(tmp_path: Path) -> None:
    model = tiny_gpt2()
    ids = torch.randint(1, 96, (16, 16), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=5,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    qat.prepare(model, [Rule(path="lm_head"), Rule(type="Conv1D", scheme=INT4)])
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    frozen = qat.convert(model)
    path = qat.export(frozen, "hf", tmp_path / "folder")
    loaded = qat.load(path).eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    for name in dir(qat):
        if not name.startswith("_"):
            assert getattr(qat, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prepair'"):
        qat.prepair  # noqa: B018
