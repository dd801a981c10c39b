"""Run folders such as a finished run leaves, with made-up but plausible figures, for looking at the report.

`python tests/report/sample.py FOLDER` writes one folder per kind of run and their report.html.
"""

import csv
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from qat.report.html import write_html
from qat.report.schema import Report, recovered, write_report

BLOCKS = 8
INT4, INT8 = "int4 (1, 32) absmax portable", "int8 (1, 32) absmax portable"
KINDS = {"attn.c_attn": (256, 768), "attn.c_proj": (256, 256), "mlp.c_fc": (256, 1024), "mlp.c_proj": (1024, 256)}
FLOAT_BYTES, INT4_BYTES = 29_600_000, 4_870_000
CAVEATS = [
    "llama.cpp rounds the input of transformer.h.0.attn.c_attn.weight and 32 more to 8 bits, and training left it in "
    "floating point; schemes llama_* train with that",
    "llama.cpp reads GELU from a float16 table, training computed it; scheme.gelu=float16_table has it",
]
CONFIG = """recipe: gpt2_int4
seed: 0
model:
  path: openai-community/gpt2
  offline: gpt2_mini
trainer:
  max_steps: 1200
quant_start_step: 200
optimizer:
  lr: 2.0e-05
"""


def language_stage(loss: float, size: int, quantized: int = 0) -> Any:
    return {"loss": loss, "perplexity": math.exp(loss), "bytes": size} | (
        {"bytes_quantized": quantized} if quantized else {}
    )


def coverage() -> list[Any]:
    """Parameters of a GPT-2 with eight blocks."""
    out: list[Any] = [
        {"name": "transformer.wte.weight", "shape": [4096, 256], "scheme": INT8, "reason": "rule .*wte, tied"},
        {"name": "transformer.wpe.weight", "shape": [1024, 256], "scheme": "float", "reason": "no rule matches"},
    ]
    for block in range(BLOCKS):
        for kind, shape in KINDS.items():
            name = f"transformer.h.{block}.{kind}"
            out.append({"name": f"{name}.weight", "shape": list(shape), "scheme": INT4, "reason": "rule Conv1D"})
            out.append({"name": f"{name}.bias", "shape": [shape[1]], "scheme": "float", "reason": "a bias"})
        for norm in ("ln_1", "ln_2"):
            for part in ("weight", "bias"):
                name = f"transformer.h.{block}.{norm}.{part}"
                out.append({"name": name, "shape": [256], "scheme": "float", "reason": "a norm"})
    return out


def layers(rng: random.Random) -> list[Any]:
    """SQNR near 21 dB for int4 at block 32, less where weights are heavy-tailed; clipping near half a percent."""
    out: list[Any] = [{"name": "transformer.wte", "sqnr_db": 43.6, "clip_rate": 0.0004, "bits": 8.5, "scheme": INT8}]
    for block in range(BLOCKS):
        for index, kind in enumerate(KINDS):
            sqnr = 21.3 - index * 0.4 - (3.5 if block == 0 and index == 1 else 0) + rng.gauss(0, 0.35)
            clip = abs(rng.gauss(0.006, 0.002)) * (2.2 if index == 3 else 1)
            name = f"transformer.h.{block}.{kind}"
            out.append({"name": name, "sqnr_db": sqnr, "clip_rate": clip, "bits": 4.5, "scheme": INT4})
    return out


def language_report() -> Report:
    """GPT-2 shaped, int4, three arms beside PTQ, three exports, the embedded stand-in."""
    stages: Any = {
        "float": language_stage(3.2142, FLOAT_BYTES),
        "control": language_stage(3.1921, FLOAT_BYTES),
        "ptq": language_stage(3.2987, INT4_BYTES, 4_320_000),
        "qat": language_stage(3.2044, INT4_BYTES, 4_320_000),
    }
    exports: Any = {}
    for target, runtime, diff, extra in (
        ("gguf", "llama.cpp b6997 (xllamacpp)", 3.1e-4, 41_000),
        ("hf", "transformers 5.23", 0.0, 63_000),
        ("gptq", "transformers 5.23, float16", 2.2e-2, 48_000),
    ):
        exports[target] = {
            "path": f"export/{target}",
            "bits_per_weight": 5.27,
            "codes_equal": True,
            "weights_equal": True,
            "runtime": runtime,
            "max_logit_diff": diff,
        } | language_stage(3.2044 + diff / 10, INT4_BYTES + extra, 4_320_000)
    exports["gguf"]["unchecked"] = CAVEATS
    report: Any = {
        "recipe": "gpt2_int4",
        "model": "gpt2_mini",
        "data": "stdlib",
        "seed": 0,
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "qat": "0.1"},
        "device": "cpu, 2 cores",
        "coverage": coverage(),
        "stages": stages,
        "exports": exports,
        "timing": {"step_seconds": 0.2131, "train_seconds": 511.4, "export_seconds": 2.2, "total_seconds": 655.0},
        "layers": layers(random.Random(1)),
        "fallback": [
            {
                "requested": "openai-community/gpt2",
                "used": "the embedded gpt2_mini (7.4M parameters)",
                "reason": "huggingface.co could not be reached and nothing is cached.",
            }
        ],
    }
    share = recovered(stages)
    assert share is not None
    return report | {"recovered": share}


def classifier_report() -> Report:
    """A small CNN, int8, one export, no control arm, a PTQ gap too small for `recovered`."""
    names = ["conv1", "conv2", "fc1", "fc2"]
    report: Any = {
        "recipe": "digits_cnn_int8",
        "model": "digits_cnn",
        "data": "digits",
        "seed": 7,
        "versions": {"torch": "2.13.0", "onnxruntime": "1.31.1"},
        "device": "cpu",
        "coverage": [
            {"name": f"{n}.weight", "shape": [32, 16, 3, 3], "scheme": "int8 channel", "reason": "rule .*"}
            for n in names
        ],
        "stages": {
            "float": {"loss": 0.0712, "accuracy": 0.98333, "bytes": 212_000},
            "ptq": {"loss": 0.0731, "accuracy": 0.98056, "bytes": 55_800},
            "qat": {"loss": 0.0709, "accuracy": 0.98333, "bytes": 55_800},
        },
        "exports": {
            "onnx": {
                "path": "export/onnx/model.onnx",
                "bytes": 61_300,
                "bits_per_weight": 8.1,
                "codes_equal": True,
                "weights_equal": True,
                "runtime": "onnxruntime 1.31.1",
                "loss": 0.0709,
                "accuracy": 0.98333,
                "max_logit_diff": 0.0,
            }
        },
        "timing": {"step_seconds": 0.0061},
        "layers": [
            {"name": n, "sqnr_db": 38.0 + i, "clip_rate": 0.0, "bits": 8.0, "scheme": "int8 channel"}
            for i, n in enumerate(names)
        ],
    }
    return report


def pretrain_report() -> Report:
    """scheme=none: a float model was trained, nothing quantized or exported."""
    report: Any = language_report()
    for key in ("recovered", "layers", "fallback"):
        del report[key]
    entries = [c | {"scheme": "float", "reason": "scheme=none"} for c in report["coverage"]]
    stages = {"float": language_stage(8.4131, FLOAT_BYTES), "control": language_stage(3.2142, FLOAT_BYTES)}
    report |= {"training": {"steps": 1200, "items": 9_830_400, "best_validation_loss": 3.2071}}
    return (
        report
        | {"corpus": {"name": "stdlib", "windows": {"train": 9600, "test": 96}, "sha256": "5f0c" * 16}}
        | {"recipe": "pretrain_gpt2_mini", "stages": stages, "exports": {}, "coverage": entries}
    )


def ptq_report() -> Report:
    """Calibrated and exported without training."""
    report: Any = language_report()
    for key in ("recovered", "fallback"):
        del report[key]
    stages = {arm: report["stages"][arm] for arm in ("float", "ptq")}
    for entry in report["exports"].values():
        entry |= {key: report["stages"]["ptq"][key] for key in ("loss", "perplexity")}
    return report | {"recipe": "gpt2_int8", "stages": stages, "timing": {"total_seconds": 41.0}}


def write_metrics(path: Path, arms: dict[str, float], steps: int = 1200) -> None:
    """Wide rows as training writes them, losses falling from each arm's height, with noise and a jump at step 200."""
    rng = random.Random(2)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", "arm", "train/loss", "lr", "val/loss"], restval="")
        writer.writeheader()
        for arm, height in arms.items():
            for step in range(5, steps + 1, 5):
                loss = 3.17 + height * math.exp(-step / 350)
                if arm == "qat" and step > 200:
                    loss += 0.012 + 0.07 * math.exp(-(step - 200) / 160)
                noisy = loss + rng.gauss(0, 0.025)
                writer.writerow({"step": step, "arm": arm, "train/loss": noisy, "lr": 2e-5 * (1 - step / steps)})
                if step % 100 == 0:
                    writer.writerow({"step": step, "arm": arm, "val/loss": loss + 0.02 + rng.gauss(0, 0.002)})


def write_run(run_dir: Path, report: Report, arms: dict[str, float] | None = None, config: str | None = CONFIG) -> Path:
    """A run folder with its files, exports as far as `next_commands` looks at them. `arms`: as for write_metrics."""
    run_dir.mkdir(parents=True)
    for target, entry in report["exports"].items():
        path = run_dir / entry["path"]
        (path if not path.suffix else path.parent).mkdir(parents=True)
        if target == "gguf":
            (path / "model.gguf").touch()
        if target == "hf":
            (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "qat"}}))
    write_report(report, run_dir / "report.json")
    if arms:
        write_metrics(run_dir / "metrics.csv", arms)
    if config is not None:
        (run_dir / "config.yaml").write_text(config)
    return run_dir


def write_samples(folder: Path) -> dict[str, Path]:
    """One run folder of every kind: language, classifier, pretrain, ptq."""
    return {
        "language": write_run(folder / "language", language_report(), {"control": 0.05, "qat": 0.05, "float": 0.06}),
        "classifier": write_run(folder / "classifier", classifier_report(), {"qat": 0.9}),
        "pretrain": write_run(folder / "pretrain", pretrain_report(), {"control": 5.0}),
        "ptq": write_run(folder / "ptq", ptq_report(), config=None),
    }


if __name__ == "__main__":
    for run in write_samples(Path(sys.argv[1])).values():
        print(write_html(run))
