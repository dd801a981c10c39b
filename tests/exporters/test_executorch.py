"""The executorch target: the compiled program's logits, through its KV cache, and what is refused before compiling."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_logits import PROMPTS, differences, logits, rules, spread, trained
from prepared_models import INT4, INT8, ZERO, prepared, rule, tiny

from qat.auditing import audit
from qat.errors import UserError, VerifyError
from qat.exporters import executorch, export, identify
from qat.exporters.torchao import ASYMMETRIC
from qat.files import write_manifest
from qat.runtimes import environments, run
from qat.scheme import QuantSpec
from qat.shipping import _outcome
from qat.verification import verify

GRID = rules("8da4w")
REFUSED = {
    "lowering casts them to bfloat16": ("llama", [rule(replace(INT4, scale="float32"), input=ASYMMETRIC)]),
    "symmetric int4 does": ("llama", [rule(INT8, input=ASYMMETRIC)]),
    "scheme=8da4w": ("llama", [rule(ZERO, input=ASYMMETRIC)]),
    r"\(1, 32\), or a multiple": ("llama", [rule(QuantSpec(qtype="int4", block=(1, 16)), input=ASYMMETRIC)]),
    "its input is float": ("llama", [rule(INT4)]),
    "not what torchao computes": ("llama", [rule(INT4, input=QuantSpec(qtype="int8", scale="float32"))]),
    "not tried with mistral": ("mistral", GRID),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_at_the_audit_and_at_the_export(why: str, tmp_path: Path) -> None:
    kind, scheme = REFUSED[why]
    model = tiny(kind)
    with pytest.raises(UserError, match=why):
        audit(model, scheme, targets=["executorch"], config=model.config.to_dict())
    with pytest.raises(UserError, match=why):
        export(prepared(kind, scheme)[1], "executorch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_that_bfloat16_cannot_hold_is_named(tmp_path: Path) -> None:
    _, frozen = trained("llama", GRID)
    name, w = next(iter(frozen.weights.items()))
    scale = w.tensor.scale.clone()
    scale[0, 0] = scale[0, 0].nextafter(torch.tensor(9.0, dtype=scale.dtype))
    frozen.weights[name] = replace(w, tensor=replace(w.tensor, scale=scale))
    with pytest.raises(UserError, match=f"{name} has scales that bfloat16 cannot hold"):
        export(frozen, "executorch", tmp_path / "out")


def test_models_and_texts_that_do_not_fit() -> None:
    config = {"model_type": "llama", "max_position_embeddings": 64}
    assert executorch.refuse_text(64, config) is None
    assert "holds 64 tokens" in (executorch.refuse_text(65, config) or "")
    assert executorch.refuse("x", "Linear", (64, 64), INT4, config) is None
    for changes, why in (
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rotary embeddings of type longrope"),
    ):
        assert why in (executorch.refuse("x", "Linear", (64, 64), INT4, config | changes) or "")


def test_without_its_environment_it_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_ENVIRONMENTS", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"python -m qat\.runtimes\.environments executorch"):
        export(prepared("llama", GRID)[1], "executorch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_verify_says_of_a_file_that_it_cannot_read(tmp_path: Path) -> None:
    frozen = trained("llama", GRID)[1]
    frozen.save(tmp_path / "frozen")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.pte").write_bytes(b"compiled")
    write_manifest(tmp_path / "out", {"kind": "export", "target": "executorch", "tensors": frozen.digests()})
    verdict = verify(tmp_path / "out", against=tmp_path / "frozen", runtime=False)
    assert not verdict.differences
    assert executorch.UNREADABLE in verdict.unchecked
    assert "codes_equal" not in verdict.figures
    found = {"figures": verdict.figures, "differences": [], "unchecked": []}
    assert "compiled: its codes cannot be read back" in _outcome(found)
    first = next(iter(frozen.weights))
    frozen.weights[first].tensor.codes[0, 0] ^= 1
    frozen.save(tmp_path / "other")
    said = verify(tmp_path / "out", against=tmp_path / "other", runtime=False).differences
    assert said == [f"{first}.words: the file was made of another tensor, by its manifest"]
    with pytest.raises(UserError, match="cannot be read back"):
        executorch.read(tmp_path / "out")


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}),
    "qwen2, tied, with biases": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "llama, 140 positions": ("llama", {"max_position_embeddings": 140}),
}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(the trained model, what was frozen of it, the folder); half a minute each."""
    if why := environments.missing_environment("executorch"):
        pytest.skip(f"not run: {why}")
    kind, changes = MODELS[request.param]
    model, frozen = trained(kind, GRID, **changes)
    return model, frozen, export(frozen, "executorch", tmp_path_factory.mktemp("executorch") / "out")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", list(MODELS)[:3], indirect=True)
def test_executorch_computes_what_was_trained(compiled: tuple[Any, Any, Path]) -> None:
    """Prompts at once, and token by token from the cache."""
    model, _, path = compiled
    bound = max(2e-6, float(spread(model).median()))
    groups = [[i for i in range(50) if len(PROMPTS[i]) == n] for n in range(8, 13)]
    want = logits(model, 50)
    for how in ("logits", "stepwise"):
        have = [torch.empty(0)] * 50
        for g in groups:
            for i, x in zip(
                g, run("executorch", path, **{how: torch.stack([PROMPTS[i] for i in g])})[how], strict=True
            ):
                have[i] = x
        found = differences(have, want)
        assert (found <= 2e-6).double().mean() >= 1 / 3
        assert found.median() <= bound


@pytest.mark.slow
@pytest.mark.parametrize("compiled", list(MODELS)[3:], indirect=True)
def test_the_runtime_and_a_damaged_file(compiled: tuple[Any, Any, Path]) -> None:
    model, _, path = compiled
    ids = (torch.arange(140) * 11 % 512)[None]  # more than one call takes
    answer = run("executorch", path, score=ids, logprobs=[PROMPTS[0].tolist()], version="")
    with torch.no_grad():
        want = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        last = model(PROMPTS[0][None]).logits[:, -1].log_softmax(-1)
    assert abs(float(answer["score"].mean() / want.mean()) - 1) <= 5e-4
    assert (answer["score"] - want).abs().median() <= 1e-4
    assert (answer["logprobs"] - last).abs().max() <= 0.1
    assert answer["version"].startswith("executorch 1.")
    with pytest.raises(UserError, match="cache holds 1 to 140"):
        run("executorch", path, logprobs=[[1] * 141])
    program = (path / "model.pte").read_bytes()
    (path / "model.pte").write_bytes(program[: len(program) // 2])
    with pytest.raises(VerifyError, match="SHA-256 differs"):
        verify(path)
    (path / "manifest.json").unlink()
    assert identify(path) == ("executorch", None)
    with pytest.raises(VerifyError, match="cannot load"):
        run("executorch", path, logprobs=[[1, 2]])
