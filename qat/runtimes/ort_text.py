"""A language model's ONNX file in ONNX Runtime: scores texts, and generates from .onnx and tokenizer.json alone.

The KV cache stays in the runtime's own memory from one step to the next.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.models.positions import refuse_longer
from qat.runtimes.ort import open_session
from qat.runtimes.scoring import prompt_logprobs, window_score


class Decoder:
    """A session on the file, and what its metadata say of the model."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.session = open_session(path, threads=threads)
        inputs = self.session.get_inputs()
        if "input_ids" not in {i.name for i in inputs}:
            raise UserError(f"{path} is not a language model: it takes {', '.join(i.name for i in inputs)}")
        self.empty = {i.name: (i.shape[1], i.shape[3]) for i in inputs if i.name.startswith("past_key_values.")}
        self.outputs = [o.name for o in self.session.get_outputs()]
        told = self.session.get_modelmeta().custom_metadata_map.get("qat", "{}")
        self.config: dict[str, Any] = json.loads(told).get("config", {})

    def step(self, ids: np.ndarray, mask: np.ndarray | None = None, past: dict[str, Any] | None = None) -> Any:
        """Logits float32 [batch, new, vocabulary] of int64 tokens [batch, new], and the cache for the next step.

        mask: int64 [batch, all tokens so far], 0 for padding on the left; None: there is none. past: the cache.
        """
        from onnxruntime import OrtValue

        batch, new = ids.shape
        before = 0 if past is None else next(iter(past.values())).shape()[2]
        mask = np.ones((batch, before + new), np.int64) if mask is None else mask
        positions = (mask.cumsum(-1) - 1).clip(min=0)[:, before:]
        feed = {
            n: OrtValue.ortvalue_from_numpy(np.zeros((batch, h, 0, d), np.float32)) for n, (h, d) in self.empty.items()
        }
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            feed[name] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        logits, *present = self.session.run_with_ort_values(self.outputs, feed | (past or {}))
        names = [name.replace("present", "past_key_values") for name in self.outputs[1:]]
        return logits.numpy(), dict(zip(names, present, strict=True))

    def generate(self, ids: list[int], count: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
        """Up to `count` tokens after `ids`, greedy at temperature 0; fewer if the model's end token comes."""
        end = self.config.get("eos_token_id")
        ends = set(end if isinstance(end, list) else [] if end is None else [end])
        chance = np.random.default_rng(seed)
        made: list[int] = []
        logits, past = self.step(np.array([ids], np.int64))
        while True:
            last = logits[0, -1].astype(np.float64)
            if temperature > 0:
                weights = np.exp((last - last.max()) / temperature)
                token = int(chance.choice(len(last), p=weights / weights.sum()))
            else:
                token = int(last.argmax())
            made.append(token)
            if token in ends or len(made) == count:
                return made
            logits, past = self.step(np.array([[token]], np.int64), past=past)


decoder = cache(Decoder)


def score(path: Path, ids: Tensor) -> Tensor:
    """log p(ids[:, t+1] | ids[:, :t+1]) in nats, float32 [n, T-1], of int64 token ids [n, T].

    Raises UserError if onnxruntime is missing or the file is no language model, VerifyError if it cannot be loaded.
    """
    return window_score(lambda rows: _logits(path, rows), ids)


def logprobs(path: Path, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities over the whole vocabulary after each prompt: float32 [n, V], nats. Raises as `score` does."""
    return prompt_logprobs(lambda rows: _logits(path, rows), prompts)


def _logits(path: Path, ids: Tensor) -> Tensor:
    return torch.from_numpy(decoder(path).step(ids.numpy())[0])


def encode(path: Path, ids: Tensor) -> Tensor:
    """Logits float32 [n, labels] or [n, T, labels] of an encoder, for whole texts of int64 tokens [n, T]."""
    texts = ids.numpy()
    given = {"input_ids": texts, "attention_mask": np.ones_like(texts), "token_type_ids": np.zeros_like(texts)}
    return torch.from_numpy(open_session(path).run(None, given)[0])


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"there is no tokenizer.json beside {path}: put the model's own there")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises plain Exception
        raise VerifyError(f"{file} cannot be read: {e}") from e


def tokenize(path: Path, lines: list[str]) -> list[list[int]]:
    """The tokens of each line, special tokens in the text recognised, none added."""
    tokenizer = _tokenizer(path)
    return [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]


def complete(path: Path, request: str) -> str:
    """Generated text. request: JSON with `prompt`, `n_predict`, `temperature` and `seed`. Raises UserError if the
    prompt is empty, or with what follows does not fit into the model's positions."""
    body = json.loads(request)
    tokenizer, model = _tokenizer(path), decoder(path)
    ids = tokenizer.encode(body["prompt"], add_special_tokens=False).ids
    if not ids:
        raise UserError("the prompt is empty: give at least one character")
    refuse_longer("the prompt and the new tokens", len(ids) + body["n_predict"], model.config)
    return tokenizer.decode(model.generate(ids, body["n_predict"], body["temperature"], body["seed"]))
