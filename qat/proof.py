"""The second half of verify: a file in its real runtime must split text and score it as the trained model does.

A runtime may differ from training by rounding, which a caveat of the export may explain, and by nothing else.
"""

import math
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from qat import evaluation
from qat.errors import UserError
from qat.exporters import identify, runtime_of
from qat.frozen import Frozen
from qat.rescue import is_ours
from qat.runtimes import run
from qat.tokenizer_diagnosis import HARD_LINES
from qat.verdict import NOT_RUN, Verdict

TOKENIZER_LINES = 300
LOSS_BOUND = 5e-4  # nats: 0.05% of perplexity
NOISE = 4.0  # standard errors of the mean difference: rounded activations move every token's loss, but not the mean
EXPLAINED = 0.05  # nats: what a caveat of the export explains at most


def tokenizer(path: Path, module: ModuleType, frozen: Frozen, base: Path, verdict: Verdict) -> None:
    """The runtime's own tokenizer against that of `frozen`, on lines of the evaluation text and hard ones.

    If `base` is a GGUF file, llama.cpp is asked about it too.
    """
    files = frozen.tokenizer
    if not any(name.startswith("tokenizer") for name in files):
        return
    loaded = _load(files)
    if loaded is None:
        verdict.unchecked.append(f"the tokenizer in the runtime: transformers cannot load that of {base}")
        return
    asked = [(runtime_of(verdict.target, path), path)]
    if not is_ours(base) and identify(base)[0] == "gguf":
        asked.append(("llama_cpp", base))
    text = ""
    if (base / "evaluation.safetensors").is_file():
        ids = evaluation.load(base / "evaluation.safetensors")["input_ids"]
        text = str(loaded.decode(ids.flatten().tolist(), skip_special_tokens=True))
    lines = [line for line in text.splitlines() if line.strip()][:TOKENIZER_LINES] + HARD_LINES
    known = getattr(module, "known_difference", None)
    if known is not None:  # lines on which the runtime cannot agree, and says why
        reasons = {line: known(files, line) for line in lines}
        verdict.unchecked += sorted({f"tokenizer lines: {why}" for why in reasons.values() if why})
        lines = [line for line in lines if not reasons[line]]
    want = [loaded(line, add_special_tokens=False)["input_ids"] for line in lines]
    for runtime, file in asked:
        try:
            have = run(runtime, file, tokenize=lines)["tokenize"]
        except UserError as why:  # what was compared so far is not lost
            verdict.unchecked.append(f"{NOT_RUN}the tokenizer in {runtime}: {why}")
            return
        for line, a, b in zip(lines, have, want, strict=True):
            if list(a) != list(b):
                said = f"the tokenizer differs on {line[:60]!r}: {list(a)[:12]} in {file}, {list(b)[:12]} in {base}"
                verdict.differences.append(said)
                break
    verdict.figures["tokenizer_lines"] = len(lines)


def _load(files: dict[str, bytes]) -> Any:
    """transformers' tokenizer of these files; None if it makes none of them."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else it asks on the terminal
        except Exception:  # of many kinds, the tokenizers library's plain Exception among them
            return None


def score(path: Path, module: ModuleType, base: Path | None, caveats: list[str], verdict: Verdict) -> None:
    """The evaluation text in the real runtime: loss, perplexity or accuracy, and the largest difference; judged."""
    if base is None or not (base / "evaluation.safetensors").is_file():
        verdict.unchecked.append("loss in the runtime: no evaluation.safetensors; give --against RUN")
        return
    e = evaluation.load(base / "evaluation.safetensors")
    images = "x" in e
    calls: dict[str, Any] = (
        {"predict": e["x"]} if images else {"score": e["input_ids"], "logprobs": e["prompts"].tolist()}
    )
    try:
        got = run(runtime_of(verdict.target, path), path, **calls, version="")
    except UserError as why:
        verdict.unchecked.append(f"{NOT_RUN}loss in the runtime: {why}")
        return
    if images:
        logits: Tensor = got["predict"]
        same = float((logits.argmax(-1) == e["logits"].argmax(-1)).double().mean())
        verdict.figures |= {**evaluation.figures({**e, "logits": logits}), "predictions_equal": same}
        diff = float((logits - e["logits"]).abs().max())
        losses = (nn.functional.cross_entropy(x.double(), e["labels"], reduction="none") for x in (logits, e["logits"]))
    else:
        verdict.figures |= evaluation.figures({"nll": -got["score"], "labels": e["labels"]})
        diff = float((got["logprobs"] - e["logprobs"]).abs().max())
        counted = e["labels"][:, 1:] != -100
        losses = (x[counted].double() for x in (-got["score"], e["nll"]))
    verdict.figures |= {"runtime": got["version"], "max_logit_diff": diff}
    have, want = losses
    mean = float((have - want).mean())
    verdict.figures["loss_diff"] = mean
    if why := judged(have - want):
        explained = caveats and abs(mean) <= EXPLAINED
        said = f"{got['version']}: {why}"
        if explained:
            verdict.unchecked.append(f"{said}, explained by the caveat: {caveats[0]}")
        else:
            verdict.differences.append(said)


def judged(apart: Tensor) -> str | None:
    """Why the losses of a runtime are not those of the trained model; None if they may be.

    apart: their differences in nats, float64, one for each token or image. The mean may be as large as 0.05% of
    perplexity, or as what rounding does to so short a text: `NOISE` standard errors of the mean of these differences.
    """
    mean = float(apart.mean())
    noise = float(apart.std()) / math.sqrt(apart.numel()) if apart.numel() > 1 else 0.0
    bound = max(LOSS_BOUND, NOISE * noise)
    if abs(mean) <= bound:  # not so for NaN
        return None
    return f"its loss is {mean:+.6f} nats from the trained model's, more than {bound:.6f}"
