"""Logits of many short prompts, from a model in this process and from plain transformers in one without our package."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from prepared_models import VOCAB, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.conversion import calibrate, convert, prepare
from qat.frozen import Frozen
from qat.scheme import Rule

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [(torch.arange(8 + i % 5) * 7 + 13 * i + 1) % VOCAB for i in range(50)]
KINDS: dict[str, dict[str, Any]] = {"llama": {"tie_word_embeddings": False}, "qwen2": {"tie_word_embeddings": True}}


def rules(scheme: str) -> list[Rule]:
    """Those of configs/scheme/SCHEME.yaml, with groups that divide the tiny models' layers."""
    text = (ROOT / "configs/scheme" / f"{scheme}.yaml").read_text().replace("128]", "32]").replace(" 64]", " 32]")
    return list(instantiate(OmegaConf.create(text), _convert_="all")["rules"])


def trained(kind: str, scheme: list[Rule], dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Frozen]:
    """A tiny random model with fake-quantized layers, and what is frozen of it; `dtype` is that of the masters."""
    model = tiny(kind, **{**KINDS.get(kind, {}), **changes})
    for p in model.parameters():  # not the buffers: rotary frequencies stay float32, as in from_pretrained
        p.data = p.data.to(dtype)
    for layer in (m for n, m in model.named_modules() if n.endswith("q_proj")):
        layer.weight.data[0].abs_()  # the extreme zero points
        layer.weight.data[1].abs_().neg_()
    model = prepare(model, scheme).eval()
    model.config.architectures = [type(model).__name__]
    calibrate(model, PROMPTS[:4], lambda m, ids: m(ids[None]))
    return model, convert(model)


@torch.no_grad()
def logits(model: Any, count: int = 5) -> list[Tensor]:
    """(tokens, vocabulary) of the first `count` prompts, in the dtype of the model."""
    return [model(ids[None]).logits[0] for ids in PROMPTS[:count]]


SCRIPT = """
import json, sys, torch
from safetensors.torch import load_file, save_file
sys.path.insert(0, sys.argv[1])
from plain_transformers import load
from transformers import AutoModelForCausalLM
prompts, failed = load_file(sys.argv[3]), {}
for name, folder in json.loads(sys.argv[2]).items():
    model = load(folder)
    seen = {}
    def watch(path):
        def hook(module, given, made):
            seen.update({f"{path}.in": given[0][0].clone(), f"{path}.out": made[0].clone()})
        return hook
    with torch.no_grad():
        model(prompts["0"][None])  # compressed-tensors decompresses
        for p in model.parameters():
            if type(p.data) is torch.Tensor:
                p.data = p.data.clone()  # mapped off a 64-byte boundary, BLAS sums in another order
        some = prompts if name in sys.argv[5].split(",") else {str(i): prompts[str(i)] for i in range(5)}
        out = {i: model(ids[None]).logits[0].float() for i, ids in some.items()}
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(watch(path))
        model(prompts["0"][None])
    save_file(out | seen, f"{sys.argv[4]}/{name}")
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as e:
        failed[name] = str(e)
assert "qat" not in sys.modules
print(json.dumps(failed))
"""


def plain_transformers(
    folders: Mapping[str, Path], root: Path, many: Iterable[str] = ()
) -> tuple[dict[str, list[Tensor]], dict[str, dict[str, Tensor]], dict[str, str]]:
    """By folder's name: logits of the first five prompts (all 50 for the folders in `many`); `LAYER.in` and
    `LAYER.out` of the first prompt; why bare from_pretrained raises."""
    save_file({str(i): ids for i, ids in enumerate(PROMPTS)}, root / "prompts")
    (root / "logits").mkdir()
    asked = json.dumps({n: str(p) for n, p in folders.items()})
    script = [sys.executable, "-P", "-c", SCRIPT, str(ROOT / "qat/runtimes"), asked, root / "prompts", root / "logits"]
    script.append(",".join(many))
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    got = {n: load_file(root / "logits" / n) for n in folders}
    failed = json.loads(done.stdout.strip().splitlines()[-1])
    layers = {n: {k: t for k, t in found.items() if "." in k} for n, found in got.items()}
    prompts = {n: [found[str(i)] for i in range(len(PROMPTS)) if str(i) in found] for n, found in got.items()}
    return prompts, layers, failed


def differences(have: list[Tensor], want: list[Tensor]) -> Tensor:
    """The largest difference of every prompt, as a share of the largest logit (50,)."""
    top = max(float(w.abs().max()) for w in want)
    return torch.stack([(a.double() - b.double()).abs().max() / top for a, b in zip(have, want, strict=True)])


@torch.no_grad()
def layer_by_layer(seen: dict[str, Tensor], model: Any) -> float:
    """The largest difference of a layer's output for the input that the runtime's layer got, as a share of it."""
    paths = [k.removesuffix(".in") for k in seen if k.endswith(".in")]
    assert len(paths) > 10
    made = {p: model.get_submodule(p)(seen[f"{p}.in"]) for p in paths}
    return max(float((made[p] - seen[f"{p}.out"]).abs().max() / made[p].abs().max()) for p in paths)


def spread(model: Any) -> Tensor:
    """How far the simulation is from itself when it accumulates in float64, prompt by prompt (50,)."""
    want = logits(model, len(PROMPTS))
    other = logits(model.double(), len(PROMPTS))
    model.float()
    return differences(other, want)
