"""The model card (README.md) of an export: what it is, on which grid, how good, and how to run it."""

from collections import Counter
from pathlib import Path
from typing import Any

from qat.exporters import caveats
from qat.frozen import Frozen
from qat.report.schema import Fallback, Stages, read_report

_PLAIN = "python -c \"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('.'))\""
_GPTQMODEL = (
    "python -c \"from gptqmodel import *; print(GPTQModel.load('.', device='cpu', dtype='float16', "
    'backend=BACKEND.{backend}))"'
)
RUN = {
    "gguf": "llama-cli -m model.gguf -p 'The'",
    "hf": "python -c \"{plugin}from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('.'))\"",
    **dict.fromkeys(("torchao", "gptq", "gptq_v1", "awq"), _PLAIN),
    "onnx": "python -c \"import onnxruntime as o; print(o.InferenceSession('model.onnx').get_inputs()[0])\"",
}

# llama.cpp's options for the KV cache that training simulated; its defaults are float16_flash
CACHE = {"float16": " -fa off", "int8": " -fa on -ctk q8_0 -ctv q8_0"}

_TRAINED = (
    "Weights were trained on the grid that this file stores: codes were decided once after training and packed "
    "unchanged."
)
_CARRIED = "Weights were quantized by another tool; every value it stored is carried over exactly, nothing was rounded."


def model_card(frozen: Frozen, target: str, run_dir: Path, *, trained: bool = True) -> str:
    """The card of one export of a finished run; figures come from the run's report.json, if it has one.

    trained: false for a checkpoint that another tool quantized, which `run_dir` then is.
    """
    report: dict[str, Any] = dict(read_report(run_dir)) if (run_dir / "report.json").is_file() else {}
    return card(
        frozen,
        target,
        title=f"{report.get('recipe', run_dir.name)} of {report.get('model', 'a model')}" if trained else run_dir.name,
        data=report.get("data", ""),
        stages=report.get("stages", {}),
        fallback=report.get("fallback", []),
        trained=trained,
    )


def card(
    frozen: Frozen,
    target: str,
    *,
    title: str,
    data: str,
    stages: Stages,
    fallback: list[Fallback],
    trained: bool = True,
) -> str:
    """The card as Markdown."""
    grids = Counter(w.tensor.spec.label() for w in frozen.weights.values())
    lines = ["---", "tags: [quantized, quantization-aware-training]", "---", f"# {title} ({target})", ""]
    for f in fallback:
        lines += [f"> **Stand-in:** {f['requested']} was not used but **{f['used']}** in its place: {f['reason']}.", ""]
    lines += [
        f"{_TRAINED if trained else _CARRIED} `manifest.json` lists the SHA-256 of every file and tensor.",
        "",
        "| grid | tensors |",
        "|---|---|",
        *(f"| {label} | {count} |" for label, count in grids.most_common()),
        f"| floating point | {len(frozen.floats)} |",
        "",
    ]
    if stages:
        lines += [
            f"Measured on held-out {data} by the run that made it:" if data else "Measured by the run that made it:",
            "",
        ]
        lines += ["| | loss | perplexity or accuracy |", "|---|---|---|"]
        for name, stage in stages.items():
            quality = stage.get("perplexity", stage.get("accuracy"))  # type: ignore[attr-defined]
            lines.append(f"| {name} | {stage['loss']:.5f} | {quality:.4f} |")  # type: ignore[index]
        lines.append("")
    lines += [f"> {c}." for c in caveats(frozen, target)] + [""]
    if target == "onnx" and "layers" not in frozen.config:
        lines += ["```", "qat generate . --prompt 'The'", "```", ""]
    elif target in RUN:
        # what plain transformers cannot load says so among the caveats
        ours = target == "hf" and any("import qat" in line for line in lines)
        command = RUN[target]
        if command == _PLAIN and frozen.config.get("model_type") == "gpt2":
            command = _GPTQMODEL.replace("{backend}", "AWQ_TORCH_ATEN" if target == "awq" else "GPTQ_TORCH")
        options = CACHE.get(frozen.config.get("kv_cache", ""), "") if target == "gguf" else ""
        lines += ["```", command.replace("{plugin}", "import qat; " if ours else "") + options, "```", ""]
    return "\n".join(lines)
