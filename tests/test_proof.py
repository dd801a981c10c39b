"""What a runtime's scores may differ by, and what is left of a comparison whose runtime is not there."""

import json
from pathlib import Path
from typing import Any

import foreign_checkpoints
import pytest
import torch
from prepared_models import LINEAR, prepared
from tiny_text_models import byte_level_tokenizer, tokenizer_files

from qat import evaluation, proof
from qat.errors import UserError
from qat.exporters import export
from qat.verification import verify

END = "<|endoftext|>"


def noise(count: int, std: float, mean: float) -> torch.Tensor:
    """Differences with exactly this mean and standard deviation."""
    x = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (x - x.mean()) / x.std() * std + mean


def test_the_bound_is_a_share_of_perplexity_or_the_noise_of_the_text() -> None:
    assert proof.judged(noise(4000, 0.001, 4e-4)) is None
    assert "-0.000600 nats" in str(proof.judged(noise(4000, 0.001, -6e-4)))
    assert proof.judged(noise(100, 0.01, 3e-3)) is None  # 0.001 nats of standard error
    assert "more than 0.004000" in str(proof.judged(noise(100, 0.01, 5e-3)))
    assert proof.judged(noise(100, 0.01, float("nan"))) is not None
    assert proof.judged(torch.zeros(1, dtype=torch.float64)) is None


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a text that was scored, and its Hugging Face export."""
    model, frozen = prepared("llama", LINEAR)
    frozen.tokenizer = tokenizer_files(byte_level_tokenizer(), unk_token=END)
    frozen.save(tmp_path / "run" / "frozen")
    ids = torch.randint(2, 500, (8, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    evaluation.save(evaluation.answer(model, batch, 4), tmp_path / "run" / "evaluation.safetensors")
    export(frozen, "hf", tmp_path / "run" / "export" / "hf")
    return tmp_path / "run"


def pretend(monkeypatch: pytest.MonkeyPatch, run_dir: Path, shift: float, tokens: int = 0) -> None:
    """A runtime that answers as the trained model did, but for `shift` nats a token and `tokens` ids."""
    e = evaluation.load(run_dir / "evaluation.safetensors")

    def run(runtime: str, path: Path, **calls: Any) -> dict[str, Any]:
        if "tokenize" in calls:
            from tokenizers import Tokenizer

            loaded = Tokenizer.from_file(str(path / "tokenizer.json"))
            encoded = [loaded.encode(line, add_special_tokens=False).ids for line in calls["tokenize"]]
            return {"tokenize": [[i + tokens for i in ids] for ids in encoded]}
        return {"score": -e["nll"] - shift, "logprobs": e["logprobs"], "version": "pretended 1"}

    monkeypatch.setattr(proof, "run", run)


def test_another_loss_is_a_difference(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, run_dir, 1e-4)
    verdict = verify(run_dir / "export" / "hf")
    assert verdict.differences == []
    assert verdict.figures["runtime"] == "pretended 1"
    pretend(monkeypatch, run_dir, 0.01)
    (said,) = verify(run_dir / "export" / "hf").differences
    assert "pretended 1: its loss is +0.01" in said


def test_a_caveat_explains_a_little(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.exporters.hf.caveats", lambda frozen: ["it rounds"])
    pretend(monkeypatch, run_dir, 0.01)
    verdict = verify(run_dir / "export" / "hf")
    assert verdict.differences == []
    assert verdict.unchecked[-1].endswith("explained by the caveat: it rounds")
    pretend(monkeypatch, run_dir, 0.2)
    assert verify(run_dir / "export" / "hf").differences


def test_the_tokenizer_is_always_tried_on_hard_lines(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "evaluation.safetensors").rename(run_dir / "away")
    monkeypatch.setattr(evaluation, "load", lambda path: pytest.fail("there is no text"))
    monkeypatch.setattr(proof, "run", lambda *_, tokenize: {"tokenize": [[7] for _ in tokenize]})
    (said,) = verify(run_dir / "export" / "hf").differences
    assert said.startswith("the tokenizer differs on '  leading and   inner")


def test_a_missing_runtime_does_not_lose_the_comparison(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise UserError("pip install it")

    monkeypatch.setattr(proof, "run", missing)
    verdict = verify(run_dir / "export" / "hf")
    assert verdict.figures["codes_equal"] is True
    assert verdict.differences == []
    assert "  not run: loss in the runtime: pip install it" in verdict.lines()


def test_code_that_a_tokenizer_brings_is_not_run_and_nobody_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    files = foreign_checkpoints.tokenizer()
    named = json.loads(files["tokenizer_config.json"])
    named["auto_map"] = {"AutoTokenizer": ["theirs.Tokenizer", None]}
    assert proof._load(files)
    assert proof._load({**files, "tokenizer_config.json": json.dumps(named).encode()}) is None
    assert "Do you wish to run" not in capsys.readouterr().out
