"""Transformers as a runtime: both kinds of folder give, in a process of their own, what the trained model computes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from prepared_models import ALL, IDS, LINEAR, prepared
from tiny_models import tiny_tokenizer

from qat.errors import UserError, VerifyError
from qat.exporters import export
from qat.progress import follow
from qat.runtimes import run, transformers_folder


@pytest.mark.parametrize(("kind", "rules", "method"), [("llama", LINEAR, "compressed-tensors"), ("gpt2", ALL, "qat")])
def test_scores_are_those_of_the_trained_model(kind: str, rules: list, method: str, tmp_path: Path) -> None:
    model, frozen = prepared(kind, rules)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    files = {f.name: f.read_bytes() for f in (tmp_path / "tokenizer").iterdir()}
    path = export(dataclasses.replace(frozen, tokenizer=files), "hf", tmp_path / "out")
    assert transformers_folder.method(path) == method
    lines = ["the quick brown fox", "", "naïve"]
    seen: list[tuple[int, int]] = []
    asked = json.dumps({"prompt": "the fox", "n_predict": 6, "temperature": 0.0, "seed": 0})
    prompts = [[3, 4], [5, 6, 7]]
    with follow(lambda done, total: seen.append((done, total))):
        got = run("transformers_folder", path, score=IDS, logprobs=prompts, tokenize=lines, complete=asked, version="")
    assert seen == [(0, 1)]  # told by the process behind the runtime's own
    with torch.no_grad():
        want = model(IDS).logits.log_softmax(-1)
    assert torch.equal(got["score"], want[:, :-1].gather(-1, IDS[:, 1:, None]).squeeze(-1))
    with torch.no_grad():
        last = [model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in ([3, 4], [5, 6, 7])]
    assert torch.equal(got["logprobs"], torch.stack(last))
    assert got["tokenize"] == [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    ids = tokenizer("the fox", return_tensors="pt")["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert got["complete"] == tokenizer.decode(made[0], skip_special_tokens=True).removeprefix("the fox")
    assert got["version"].startswith("transformers ")


def test_a_folder_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        run("transformers_folder", tmp_path, score=IDS)
    path = export(prepared("llama", LINEAR)[1], "hf", tmp_path / "out")
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(VerifyError, match="transformers cannot run"):
        run("transformers_folder", path, score=IDS)
