"""Transformers on its own, as a script: `python -P plain_transformers.py FOLDER [--with-qat]`.

A folder that plain transformers can read must be run without our package in the process, and whoever imports anything
under `qat` has imported `qat`; so this file imports nothing of it and is started by its path. Each line of standard
input is a JSON object: a function's name, its argument and the file for its answer; each is answered by lines
"progress DONE TOTAL" while it works and a line "done".
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

ANSWERS = sys.stdout


def load(folder: str) -> Any:
    """The folder's model. Asymmetric compressed-tensors weights load only if they are dequantized on the way, and a
    GPT-2 of GPTQ or AWQ only by gptqmodel."""
    whole = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    config = whole.get("quantization_config", {})
    if whole.get("model_type") == "gpt2" and config.get("quant_method") in ("gptq", "awq"):
        return gptqmodel_gpt2(folder, config["quant_method"])
    groups = config.get("config_groups", {}).values()
    options = {}
    if any(not group["weights"]["symmetric"] for group in groups):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def gptqmodel_gpt2(folder: str, method: str) -> Any:
    """A GPT-2 by gptqmodel's own loader: transformers' initializes c_proj.weight, which packed layers do not have.

    These kernels (of the backends') take float32 inputs, but only the loader's half precision: so it rounds embeddings,
    norms and biases, and these get back what the folder holds.
    """
    from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports]

    backend = BACKEND.AWQ_TORCH_ATEN if method == "awq" else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=backend, trust_remote_code=False).model
    held = model.state_dict(keep_vars=True)
    for file in Path(folder).glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not name.endswith(".scales"):
                held[name].data = tensor
    return model.eval()


@torch.no_grad()
def score(model: Any, ids: Tensor) -> Tensor:
    """log p(ids[:, t+1] | ids[:, :t+1]) in nats, float32 [n, T-1]."""
    out = []
    parts = ids.split(max(1, 2048 // ids.shape[1]))
    for done, rows in enumerate(parts):
        print(f"progress {done} {len(parts)}", file=ANSWERS, flush=True)
        logp = model(rows).logits[:, :-1].float().log_softmax(-1)
        out.append(logp.gather(-1, rows[:, 1:, None]).squeeze(-1))
    return torch.cat(out)


@torch.no_grad()
def logprobs(model: Any, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities of the whole vocabulary after each prompt, float32 [n, V]."""
    return torch.stack([model(torch.tensor([p])).logits[0, -1].float().log_softmax(-1) for p in prompts])


@torch.no_grad()
def complete(model: Any, tokenizer: Any, body: dict[str, Any]) -> Tensor:
    """The text that follows body["prompt"], as UTF-8 bytes (uint8): `n_predict` tokens at most, greedy unless
    `temperature` is above 0."""
    ids = tokenizer(body["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
    heat = body.get("temperature", 0)
    torch.manual_seed(body.get("seed", 0))
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=body["n_predict"],
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **({"do_sample": True, "temperature": heat} if heat > 0 else {"do_sample": False}),
    )
    before, after = (tokenizer.decode(row, skip_special_tokens=True) for row in (ids[0], out[0]))
    return torch.tensor(list(after[len(before) :].encode()), dtype=torch.uint8)


def main() -> None:
    folder, with_qat = sys.argv[1], "--with-qat" in sys.argv
    if with_qat:
        import qat  # noqa: F401  # registers quant_method "qat"
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["call"] == "tokenize":
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["argument"]]
            answer = {"tokenize": torch.tensor([i for row in rows for i in row], dtype=torch.int64)}
            answer["lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        else:
            if model is None:
                model = load(folder)
            if request["call"] == "complete":
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                answer = {"complete": complete(model, tokenizer, json.loads(request["argument"]))}
            elif request["call"] == "score":
                answer = {"score": score(model, load_file(request["argument"])["ids"])}
            else:
                answer = {"logprobs": logprobs(model, request["argument"])}
        if not with_qat and "qat" in sys.modules:
            raise RuntimeError("qat was imported: this is no proof that transformers reads the folder on its own")
        save_file(answer, request["answer"])
        print("done", file=ANSWERS, flush=True)


if __name__ == "__main__":
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print banners on standard output, which is for answers alone
    main()
