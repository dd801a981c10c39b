"""The language-model task against transformers' own loss; gradient checkpointing; the classifier's metrics."""

from pathlib import Path

import pytest
import torch
from tiny_training import gpt2, train

from qat.training.classifier import Classifier
from qat.training.module import CausalLM, token_losses
from qat.training.optim import Optimizer


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def test_loss_is_that_of_transformers() -> None:
    model = gpt2().eval()
    model.config.loss_type = "ForCausalLM"
    ours = CausalLM(model=model, optimizer=Optimizer(lr=1.0)).training_step(batch(), 0)
    torch.testing.assert_close(ours, model(**batch()).loss)


def test_ignored_labels_leave_no_loss() -> None:
    assert len(token_losses(gpt2().eval(), batch())) == 3 * 15 - 4


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = gpt2(dropout=0.0).train()
        task = CausalLM(model=model, optimizer=Optimizer(lr=1.0), gradient_checkpointing=checkpointing)
        task.training_step(batch(), 0).backward()
        assert model.is_activation_checkpointing == checkpointing
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_mixed_precision_keeps_float32_masters(tmp_path: Path) -> None:
    model = gpt2()
    train(model, tmp_path, precision="bf16-mixed", max_steps=2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_classifier_metrics() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    task = Classifier(model=torch.nn.Identity(), optimizer=Optimizer(lr=1.0), num_classes=2)
    labels = torch.tensor([0, 1, 1])
    task.validation_step({"x": logits[:2], "labels": labels[:2]}, 0)
    task.validation_step({"x": logits[2:], "labels": labels[2:]}, 1)
    assert task.validation_accuracy.compute().item() == pytest.approx(2 / 3)
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert task.validation_loss.compute().item() == pytest.approx(expected)
    assert task.training_step({"x": logits, "labels": labels}, 0).item() == pytest.approx(expected)
