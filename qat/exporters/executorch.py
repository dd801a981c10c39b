"""A compiled program for ExecuTorch on a CPU (XNNPACK, 8da4w) with a KV cache: `model.pte` and the tokenizer's files.

torchao's tensors, written from the frozen codes as for the target torchao, are what ExecuTorch lowers, in its own
environment (see runtimes/executorch_lower.py). Lowering casts weight scales to bfloat16, so they must be exact in it.
The program computes in float32 and holds its weights packed: it cannot be read back, only run.
"""

import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from qat.errors import UserError
from qat.exporters import torchao
from qat.exporters.hf_folder import float_dtype
from qat.frozen import Frozen
from qat.runtimes import environment
from qat.runtimes.environments import interpreter, missing_environment
from qat.scheme import QuantSpec, Scheme

RUNTIME = "executorch"
UNREADABLE = "codes, scales and weights: a compiled .pte cannot be read back; only its logits can be compared"
MODELS = ("llama", "qwen2", "qwen3")  # whose logits were compared
CONTEXT = 2048  # the most tokens that the cache holds: it is allocated whole
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others' frequencies depend on the length of the text


def missing_runtime() -> str | None:
    """How to make the environment that this target is lowered and proven in; None if it is there."""
    return missing_environment("executorch")


def context(config: dict[str, Any]) -> int:
    """How many tokens the program's cache holds."""
    return min(CONTEXT, config.get("max_position_embeddings") or CONTEXT)


def refuse_text(tokens: int, config: dict[str, Any]) -> str | None:
    """Why texts of so many tokens do not fit; None if they do."""
    room = context(config)
    return None if tokens <= room else f"the program's KV cache holds {room} tokens; give data.block_size={room}"


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why XNNPACK cannot hold this parameter, and what to do; None if it can."""
    if spec is not None and kind != "Linear":
        return f"XNNPACK's 8da4w is for Linear layers, not {kind}; leave it out of the rules"
    if reason := torchao.refuse(name, kind, shape, spec, config):
        return reason
    if config and config["model_type"] not in MODELS:
        return f"ExecuTorch was not tried with {config['model_type']}; {', '.join(MODELS)} are what this target writes"
    if "sliding_attention" in (config.get("layer_types") or []):
        return "its static KV cache has no sliding window; export it to another target"
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        return f"rotary embeddings of type {rope} change with the text's length; export it to another target"
    if spec is None:
        return None
    if spec.qtype != "int4" or spec.offset is not None:
        return f"grid {spec.label()} does not fit; symmetric int4 does: scheme=8da4w"
    if spec.block[1] % 32 or spec.block[1] < 32:
        return f"block {spec.block} does not fit; (1, 32), or a multiple of 32, does"
    if spec.scale not in ("portable", "bfloat16"):
        return f"its scales are {spec.scale}, but lowering casts them to bfloat16: use scale 'portable' or 'bfloat16'"
    return None


def refuse_scheme(scheme: Scheme, config: dict[str, Any]) -> str | None:
    """Why XNNPACK would compute a layer's input otherwise than its scheme says; None if it would not."""
    if scheme.input is None and scheme.weight is not None:
        return "its input is float, but XNNPACK multiplies int4 weights by int8 tokens; scheme=8da4w has those"
    return torchao.refuse_scheme(scheme, config)


def export(frozen: Frozen, path: Path) -> None:
    """Write the program. Raises UserError for another grid, without the environment, or if ExecuTorch cannot lower it.

    Source of the flow: ExecuTorch's XNNPACK backend, to_edge_transform_and_lower with XnnpackPartitioner.
    """
    schemes = frozen.schemes()
    for name, w in frozen.weights.items():
        module = name.removesuffix(".weight")
        if why := refuse_scheme(schemes.get(module, Scheme(weight=w.tensor.spec)), frozen.config):
            raise UserError(f"{module}: {why}")
        scale = w.tensor.scale.float()
        if not torch.equal(scale.bfloat16().float(), scale):
            raise UserError(f"{name} has scales that bfloat16 cannot hold: use scale 'portable'")
    floats = {n: t.float() if t.is_floating_point() else t for n, t in frozen.floats.items()}
    with tempfile.TemporaryDirectory(prefix="qat-executorch-") as folder:
        torchao.export(replace(frozen, floats=floats, tokenizer={}), Path(folder))
        command = [interpreter(RUNTIME), "-m", "qat.runtimes.executorch_lower", folder, str(path / "model.pte")]
        command.append(str(context(frozen.config)))
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode or not (path / "model.pte").is_file():
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise UserError(f"ExecuTorch cannot lower this model: {' | '.join(said[-2:])[:600]}")
    for name, content in frozen.tokenizer.items():
        (path / name).write_bytes(content)


def caveats(frozen: Frozen) -> list[str]:
    """What its runtime does differently from training."""
    if float_dtype(frozen) != torch.float32:
        return [f"the program computes in float32, the trained model in {float_dtype(frozen)}"]
    return []


def read(path: Path) -> NoReturn:
    """Raises UserError: XNNPACK's packed weights are private to it."""
    raise UserError(f"{path}: a compiled .pte cannot be read back; give the run, the frozen folder or another export")
