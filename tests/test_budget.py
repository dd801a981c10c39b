"""Memory: what training needs counted on a real optimiser step, and a refusal that names need, supply and remedy."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_conversion import gpt2

from qat import budget, entry
from qat.errors import UserError

CPU = torch.device("cpu")


def settings(**given: Any) -> partial[Any]:
    return partial(dict, **{"max_steps": 1, "precision": "32-true", **given})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_need_is_what_a_step_of_the_optimizer_holds(dtype: torch.dtype) -> None:
    model = gpt2().to(dtype)
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert budget.training_nbytes(model, "bf16-mixed") == sum(t.nbytes for t in held)
    assert budget.training_nbytes(gpt2().to(dtype), "bf16-true") == 8 * sum(p.numel() for p in gpt2().parameters())


def test_too_little_memory_is_refused_only_where_training_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    weights = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(budget, "available", lambda device: 3 * weights)  # and the weights are there already
    assert f"{budget.size(4 * weights)} of memory are there" in budget.refuse_memory(model, settings(), CPU)
    monkeypatch.setattr(budget, "available", lambda device: 3 * weights - 1000)
    said = f"training needs {budget.size(4 * weights)} for weights, gradients and optimizer alone, and "
    said += f"{budget.size(4 * weights - 1000)} of memory are there"
    with pytest.raises(UserError, match=f"{said}: .* trainer.max_steps=0"):
        budget.refuse_memory(model, settings(), CPU)
    assert budget.refuse_memory(model, settings(max_steps=0), CPU) == ""
    assert budget.refuse_memory(model, settings(precision="bf16-true"), CPU) != ""
    assert budget.refuse_memory(model, settings(strategy="fsdp"), CPU) != ""


def test_a_run_that_cannot_train_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "available", lambda device: 10**6)
    assert entry.main(["recipe=quickstart", "trainer.accelerator=cpu"]) == 2
    assert "training needs 71.5 MB for weights, gradients and optimizer alone" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_memory_there_is_this_machines() -> None:
    there = budget.available(CPU)
    assert there is not None
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0.01 * total < there <= total
