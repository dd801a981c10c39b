"""Times one artefact in its runtime; runtimes.py starts it with that runtime's own Python.

    PYTHON runtimes_worker.py RUNTIME PATH --threads 2 --prompt 128 --new 32

Loads the artefact and answers {"load": seconds}; then for every line of standard input does one
round and answers {"prompt": seconds, "new": seconds a token}: a prompt from an empty KV cache up to its first token,
and the tokens after it, one at a time, greedily, until LIMIT seconds are over. Importing is not part of loading.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qat.errors import UserError, VerifyError

LIMIT = 10.0  # seconds; only gptqmodel's eager kernels come near it
Round = Callable[[list[int], int], tuple[float, float]]  # (prompt, how many more) -> seconds, and seconds a new token
Decode = Callable[[list[int]], Iterator[int]]  # prompt -> the tokens after it


def clocked(decode: Decode) -> Round:
    def measure(prompt: list[int], new: int) -> tuple[float, float]:
        start = time.perf_counter()
        tokens = decode(prompt)
        next(tokens)
        first = time.perf_counter()
        made = 0
        for _ in islice(tokens, new):
            made += 1
            if time.perf_counter() - first > LIMIT:
                break
        return first - start, (time.perf_counter() - first) / made

    return measure


def llama_cpp(path: Path, threads: int) -> Round:
    """The wheel's server with its default settings: flash attention where it can, a float16 cache, warmed up."""
    import xllamacpp

    from qat.exporters.gguf_header import gguf_file
    from qat.runtimes.llama_cpp import _Server

    x: Any = xllamacpp
    params = x.CommonParams()
    params.model.path = str(gguf_file(path))
    params.hostnames = ["127.0.0.1"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    params.verbosity = -1
    wheel = x.Server(params)
    server = _Server(wheel.listening_address)

    def measure(prompt: list[int], new: int) -> tuple[float, float]:
        assert wheel  # the server lives as long as this function
        told = server.post(
            "/completion", prompt=prompt, n_predict=new + 1, temperature=0, ignore_eos=True, cache_prompt=False
        )["timings"]
        if (told["prompt_n"], told["predicted_n"]) != (len(prompt), new + 1):
            raise VerifyError(f"llama.cpp took {told['prompt_n']} and made {told['predicted_n']} tokens")
        return told["prompt_ms"] / 1e3, told["predicted_ms"] / 1e3 / new  # the first new token is the prompt's

    return measure


def ort(path: Path, threads: int) -> Round:
    import numpy as np

    from qat.runtimes.ort_text import Decoder

    model = Decoder(path, threads)

    def decode(prompt: list[int]) -> Iterator[int]:
        ids, past = np.array([prompt], np.int64), None
        while True:
            logits, past = model.step(ids, past=past)
            ids = logits[:, -1:].argmax(-1)
            yield int(ids[0, 0])

    return clocked(decode)


def transformers_folder(path: Path, threads: int) -> Round:
    from qat.runtimes.plain_transformers import load

    torch.set_num_threads(threads)
    model = load(str(path)).eval()

    def decode(prompt: list[int]) -> Iterator[int]:
        ids, past = torch.tensor([prompt]), None
        while True:
            with torch.inference_mode():
                out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            yield int(ids)

    return clocked(decode)


def mlx(path: Path, threads: int) -> Round:
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    from mlx_lm.generate import generate_step  # pyright: ignore[reportMissingImports]
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    mx.set_default_device(mx.cpu)
    model = load_model(path)[0]  # reads the weights too: it is lazy only where it is asked to

    def decode(prompt: list[int]) -> Iterator[int]:
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=1 << 20):
            yield int(token)

    return clocked(decode)


def executorch(path: Path, threads: int) -> Round:
    from qat.runtimes.executorch import _Program

    program = _Program(path)

    def decode(prompt: list[int]) -> Iterator[int]:
        ids, start = prompt, 0
        while True:
            token = int(program.logits(ids, start)[-1].argmax())
            start += len(ids)
            ids = [token]
            yield token

    return clocked(decode)


RUNTIMES = (llama_cpp, ort, transformers_folder, mlx, executorch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runtime", choices=[f.__name__ for f in RUNTIMES])
    parser.add_argument("path", type=Path)
    for option in ("--threads", "--prompt", "--new"):
        parser.add_argument(option, type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print on standard output, which is for answers alone

    def answer(**said: float | str) -> None:
        print(json.dumps(said), file=answers, flush=True)

    open_it = next(f for f in RUNTIMES if f.__name__ == args.runtime)
    imported(args.runtime)
    prompt = torch.randint(2, 4000, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        start = time.perf_counter()
        measure = open_it(args.path, args.threads)
        answer(load=time.perf_counter() - start)
        measure(prompt[:8], 2)  # what the first call alone does: allocating, repacking
        for _ in sys.stdin:
            seconds = measure(prompt, args.new)
            answer(prompt=seconds[0], new=seconds[1])
    except (UserError, VerifyError) as error:
        sys.exit(str(error))


def imported(runtime: str) -> None:
    """Import what loading needs, so that loading is timed without it."""
    from importlib import import_module

    needs = {
        "llama_cpp": ["xllamacpp", "qat.runtimes.llama_cpp"],
        "ort": ["onnxruntime", "qat.runtimes.ort_text"],
        "transformers_folder": ["transformers.models.llama.modeling_llama", "qat.runtimes.plain_transformers"],
        "mlx": ["mlx_lm.generate", "mlx_lm.models.llama"],
        "executorch": ["executorch.runtime", "qat.runtimes.executorch"],
    }
    for name in needs[runtime]:
        import_module(name)


if __name__ == "__main__":
    main()
