"""Run a GGUF file in real llama.cpp: the `llama-server` on PATH if there is one, else the `xllamacpp` wheel's server.

Both speak the same HTTP API, on the loopback only. Settings are those under which llama.cpp on a CPU can be compared
with torch: one slot, and the KV cache that the model was trained with (float32 if training simulated none). A text is
scored in one request: a grammar of token-id terminals forces every next token, while the reported log-probabilities are
those before grammar and sampling.
"""

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.exporters.gguf_header import gguf_file
from qat.exporters.gguf_models import KV_CACHE
from qat.progress import told
from qat.runtimes import main

_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not see loopback requests
_INSTALL = "llama.cpp is not installed: pip install xllamacpp (or put llama-server on PATH)"


# kv_cache of the scheme -> llama.cpp's cache type, and whether with flash attention
CACHES = {None: ("f32", False), "float16": ("f16", False), "float16_flash": ("f16", True), "int8": ("q8_0", True)}


def trained_cache(file: Path) -> str | None:
    """The KV cache that the model was trained with, from the file's own metadata."""
    try:
        field = GGUFReader(file).fields.get(KV_CACHE)
    except (OSError, ValueError, LookupError):
        return None  # llama.cpp says better than we what is wrong with the file
    return None if field is None else str(field.contents())


class _Server:
    """A running server at `url`; `score_from` and `full` are its two questions."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.n_vocab = 0
        self.printable = 0

    def ready(self) -> None:
        """Ask what must be known of the vocabulary: its size, and a token that is a whole printable character."""
        self.n_vocab = self.post("/v1/models")["data"][0]["meta"]["n_vocab"]
        self.printable = self.tokens("a")[-1]

    def open(self, route: str, body: dict[str, Any] | None = None, timeout: float = 900.0) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        return _NO_PROXY.open(request, timeout=timeout)

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        try:
            with self.open(route, body or None) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            said = json.loads(error.read())["error"]["message"]  # such as: exceeds the available context size
            raise UserError(f"llama.cpp refuses the request: {said}") from error

    def tokens(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def full(self, prompt: list[int]) -> Tensor:
        """Log-probabilities of the whole vocabulary after `prompt`: float32 [n_vocab], nats.

        A printable next token is forced, since the server leaves the probabilities of an incomplete character out;
        the bias does not enter the reported numbers. A probability that underflows float32 (below e-87) is reported by
        llama.cpp as -3.4e38.
        """
        bias = [[self.printable, 1e4]]
        answer = self.post(
            "/completion", prompt=prompt, n_predict=1, n_probs=self.n_vocab, temperature=0, logit_bias=bias
        )
        out = torch.full((self.n_vocab,), -torch.inf)
        top = answer["completion_probabilities"][0]["top_logprobs"]
        out[torch.tensor([t["id"] for t in top])] = torch.tensor([t["logprob"] for t in top])
        return out

    def forced(self, ids: list[int], start: int) -> dict[int, float]:
        """Position -> log p(ids[position] | ids[:position]) from `start` on, as far as one request goes.

        Left out by the server: end-of-text tokens, which no grammar can force (it stops there), and tokens that end
        in the middle of a UTF-8 character.
        """
        grammar = "root ::= " + " ".join(f"<[{i}]>" for i in ids[start:])
        body = {"prompt": ids[:start], "n_predict": len(ids) - start, "n_probs": 1, "temperature": 0}
        found: dict[int, float] = {}
        try:
            with self.open("/completion", {**body, "grammar": grammar, "stream": True, "cache_prompt": True}) as lines:
                for line in lines:
                    event = json.loads(line[6:]) if line.startswith(b"data: {") else {}
                    if "error" in event:
                        break
                    for token in event.get("completion_probabilities", []):
                        position = start + event["tokens_predicted"] - 1
                        if token["id"] != ids[position]:
                            raise VerifyError(f"llama.cpp sampled {token['id']} at {position}, not {ids[position]}")
                        found[position] = token["logprob"]
        except urllib.error.HTTPError:
            pass  # a llama.cpp without token terminals in its grammar (before December 2025): `full` does it all
        return found

    def score(self, ids: list[int]) -> Tensor:
        """log p(ids[t + 1] | ids[:t + 1]) in nats: float32 [len(ids) - 1]."""
        found: dict[int, float] = {}
        start = 1
        while start < len(ids):
            found |= self.forced(ids, start)
            start = max([start, *(position + 1 for position in found)])
            if start < len(ids):
                found[start] = self.full(ids[:start])[ids[start]].item()
                start += 1
        for position in reversed(range(1, len(ids))):  # last first: the cache then already holds each prefix
            if position not in found:
                found[position] = self.full(ids[:position])[ids[position]].item()
        return torch.tensor([found[position] for position in range(1, len(ids))])


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def _binary(program: str, file: Path, n_ctx: int, cache: str, flash: bool) -> Iterator[_Server]:
    """`llama-server` as a child process, killed at the end."""
    port = _free_port()
    options = {
        "--model": file,
        "--host": "127.0.0.1",
        "--port": port,
        "--ctx-size": n_ctx,
        "--parallel": 1,
        "--threads": torch.get_num_threads(),
        "--n-gpu-layers": 0,
        "--cache-type-k": cache,
        "--cache-type-v": cache,
        "--flash-attn": "on" if flash else "off",
    }
    command = [program, *(str(part) for pair in options.items() for part in pair), "--no-warmup"]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            server = _Server(f"http://127.0.0.1:{port}")
            while True:
                try:
                    server.open("/health", timeout=5).close()
                    break
                except OSError:
                    if child.poll() is not None:
                        log.seek(0)
                        tail = log.read().decode(errors="replace").strip().splitlines()[-3:]
                        raise VerifyError(f"llama-server ended with code {child.returncode}: {tail}") from None
                    time.sleep(0.05)
            yield server
        finally:
            child.kill()
            child.wait()


@contextmanager
def _wheel(file: Path, n_ctx: int, cache: str, flash: bool) -> Iterator[_Server]:
    """The server inside the `xllamacpp` wheel, in this process."""
    try:
        import xllamacpp
    except ImportError:
        raise UserError(_INSTALL) from None
    x: Any = xllamacpp  # a compiled module without type hints
    params = x.CommonParams()
    params.model.path = str(file)
    params.hostnames = ["127.0.0.1"]
    params.n_ctx = n_ctx
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.n_gpu_layers = 0
    params.cache_type_k = params.cache_type_v = getattr(x.ggml_type, f"GGML_TYPE_{cache.upper()}")
    attention = f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if flash else 'DISABLED'}"
    params.flash_attn_type = getattr(x.llama_flash_attn_type, attention)
    params.warmup = params.ui = False
    params.cache_ram_mib = 0
    params.verbosity = -1
    try:
        server = x.Server(params)
    except RuntimeError as error:
        raise VerifyError(f"llama.cpp cannot load {file}: {error}") from None
    yield _Server(server.listening_address)
    del server  # stops its threads


@contextmanager
def _serve(path: Path, n_ctx: int) -> Iterator[_Server]:
    program, file = shutil.which("llama-server"), gguf_file(path)
    cache, flash = CACHES[trained_cache(file)]
    with _binary(program, file, n_ctx, cache, flash) if program else _wheel(file, n_ctx, cache, flash) as server:
        server.ready()
        yield server


def score(path: Path, ids: Tensor) -> Tensor:
    """log p(ids[:, t+1] | ids[:, :t+1]) in nats, float32 [n, T-1], of int64 token ids [n, T].

    Raises UserError if llama.cpp is not installed, VerifyError if it cannot load the file.
    """
    with _serve(path, ids.shape[1] + 8) as server:
        return torch.stack([server.score(row) for row in told(ids.tolist())])


def logprobs(path: Path, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities over the whole vocabulary after each prompt: float32 [n, V], nats. Raises as `score` does."""
    with _serve(path, max(len(p) for p in prompts) + 8) as server:
        return torch.stack([server.full(prompt) for prompt in told(prompts)])


def tokenize(path: Path, lines: list[str]) -> list[list[int]]:
    """llama.cpp's own tokenization of each line, special tokens in the text recognised, none added."""
    with _serve(path, 64) as server:
        return [server.tokens(line) for line in lines]


def complete(path: Path, request: str) -> str:
    """Generated text. request: the JSON body of llama.cpp's /completion, at least `prompt` and `n_predict`."""
    body = json.loads(request)
    with _serve(path, len(body["prompt"].encode()) + body["n_predict"] + 8) as server:
        return server.post("/completion", **body)["content"]


def version(path: Path | None = None, _: Tensor | None = None) -> str:
    """Which llama.cpp runs here, for the report. Arguments are ignored (`run` passes them to every function)."""
    if program := shutil.which("llama-server"):
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=60)
        return f"llama-server {(said.stdout + said.stderr).strip().splitlines()[0]}"
    try:
        import xllamacpp
    except ImportError:
        raise UserError(_INSTALL) from None
    return f"xllamacpp {xllamacpp.__version__}"


if __name__ == "__main__":
    main(score, logprobs, tokenize, complete, version)
