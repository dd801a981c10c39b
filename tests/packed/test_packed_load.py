"""`qat.load`: packed integers from folders, runs and Frozen objects, and the memory that takes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_models import ALL, IDS, INT4, LINEAR, logits, prepared

import qat
from qat.affine import QTensor
from qat.errors import UserError, VerifyError
from qat.exporters import export
from qat.frozen import Frozen, FrozenWeight
from qat.packed.base import PackedLayer


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Frozen, Path]:
    """A fake-quantized GPT-2, what was frozen of it, and a run folder with that and its export."""
    model, frozen = prepared("gpt2", ALL)
    run = tmp_path_factory.mktemp("run")
    frozen.save(run / "frozen")
    export(frozen, "hf", run / "export" / "hf")
    return model, frozen, run


@pytest.mark.parametrize("source", ["", "frozen", "export/hf", None])
def test_every_source_gives_the_trained_model(source: str | None, gpt2: tuple[Any, Frozen, Path]) -> None:
    model, frozen, run = gpt2
    loaded = qat.load(frozen if source is None else str(run / source))
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training


def test_weights_in_memory_are_the_packed_ones(gpt2: tuple[Any, Frozen, Path]) -> None:
    _, frozen, run = gpt2
    loaded = qat.load(run / "export/hf")
    persistent = loaded.state_dict(keep_vars=True)
    unique = {id(t): t.nbytes for t in persistent.values()}
    assert sum(unique.values()) == frozen.nbytes()
    head, table = loaded.lm_head, loaded.transformer.wte
    assert head.weight is table.weight
    assert head.weight_scale is table.weight_scale


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_a_scaled_embedding(kind: str, tmp_path: Path) -> None:
    """Gemma's is a class of its own, and its table is also the head's."""
    model, frozen = prepared(kind, ALL, head_dim=16)
    assert frozen.weights["model.embed_tokens.weight"].kind == "Embedding"
    assert not [name for name in frozen.inputs if "embed" in name]
    assert torch.equal(logits(qat.load(export(frozen, "hf", tmp_path / "out"))), logits(model))


def test_a_folder_that_plain_transformers_reads_stays_packed_here(tmp_path: Path) -> None:
    model, frozen = prepared("llama", LINEAR)
    path = export(frozen, "hf", tmp_path / "out")
    loaded = qat.load(path)
    packed = [m for m in loaded.modules() if isinstance(m, PackedLayer)]
    assert len(packed) == len(frozen.weights) == 14
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")  # then in the other dialect
    assert torch.equal(logits(qat.load(tmp_path / "again")), logits(model))


def test_dtype_generation_and_settings(gpt2: tuple[Any, Frozen, Path], tmp_path: Path) -> None:
    model, frozen, _ = gpt2
    settings = json.dumps({"max_new_tokens": 3}).encode()
    frozen = dataclasses.replace(frozen, tokenizer={"generation_config.json": settings})
    loaded = qat.load(export(frozen, "hf", tmp_path / "out"))
    made = loaded.generate(IDS, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert made.shape == (2, 23)
    want = model.generate(IDS, do_sample=False, attention_mask=torch.ones_like(IDS), max_new_tokens=3)
    assert torch.equal(made, want)
    half = qat.load(frozen, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.transformer.wte.weight_scale.dtype == torch.float16
    assert logits(half).dtype == torch.bfloat16


def test_architectures_may_be_absent(gpt2: tuple[Any, Frozen, Path]) -> None:
    model, frozen, _ = gpt2
    config = {k: v for k, v in frozen.config.items() if k != "architectures"}
    loaded = qat.load(Frozen(frozen.weights, frozen.floats, ties=frozen.ties, config=config))
    assert torch.equal(logits(loaded), logits(model))


def test_what_cannot_be_loaded(gpt2: tuple[Any, Frozen, Path], tmp_path: Path) -> None:
    _, frozen, _ = gpt2
    with pytest.raises(UserError, match="no run, no frozen folder"):
        qat.load(tmp_path)
    with pytest.raises(UserError, match="'exact' or 'fast'"):
        qat.load(frozen, kernel="turbo")
    with pytest.raises(UserError, match="int8"):
        qat.load(frozen, dtype=torch.int8)
    with pytest.raises(UserError, match="not a transformers model"):
        qat.load(Frozen(frozen.weights, frozen.floats, config={"architecture": "digits"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="not quantized"):
        qat.load(tmp_path)
    floats = {n: t for n, t in frozen.floats.items() if n != "transformer.ln_f.bias"}
    with pytest.raises(VerifyError, match=r"transformer\.ln_f\.bias"):
        qat.load(Frozen(frozen.weights, floats, ties=frozen.ties, config=frozen.config))


MEASURE = """
import sys, torch
from pathlib import Path
import qat, qat.packed.load
from transformers import LlamaForCausalLM

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
qat.load(sys.argv[2])  # warms up whatever is imported on first use
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # restart the peak
model = qat.load(sys.argv[1])
loaded = status("VmHWM") - before
with torch.no_grad():
    model(torch.arange(8)[None])
print(before, loaded, status("VmHWM") - before)
"""


def random_llama(layers: int, hidden: int) -> Frozen:
    """A Llama of random int4 codes that never had float weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=256,
    )
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    weights, floats = {}, {}
    for name, shape in shapes.items():
        if "_proj" in name:
            codes = torch.randint(-7, 8, shape, dtype=torch.int8)
            scale = torch.full((shape[0], shape[1] // 32), 2.0**-8, dtype=torch.float16)
            weights[name] = FrozenWeight(QTensor(codes, scale, None, INT4), "Linear", shape)
        else:
            floats[name] = torch.ones(shape)
    return Frozen(weights, floats, config={**config.to_dict(), "architectures": ["LlamaForCausalLM"]})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_the_float_model_exists_at_no_time(tmp_path: Path) -> None:
    """Peak memory of loading and running, in a process of its own: a third of what float32 weights alone would take."""
    frozen = random_llama(8, 768)
    path = export(frozen, "hf", tmp_path / "large")
    small = export(random_llama(1, 64), "hf", tmp_path / "small")
    command = [sys.executable, "-c", MEASURE, str(path), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    _, loaded, ran = map(int, done.stdout.split())
    as_float = 4 * sum(w.tensor.codes.numel() for w in frozen.weights.values())
    packed = frozen.nbytes()
    print(f"float32 {as_float}, packed {packed}, peak of loading {loaded}, of loading and running {ran}")
    assert as_float > 150e6
    assert packed < ran  # the measurement sees the model at all
    assert loaded < as_float / 3
    assert ran < as_float / 3
