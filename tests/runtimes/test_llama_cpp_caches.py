"""KV caches alone: float weights, so that nothing else rounds, against llama.cpp's logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_llama_cpp_numerics import last, scheme
from tiny_text_models import VOCAB, byte_level_tokenizer, tiny, tokenizer_files
from torch import Tensor

import qat
from qat.exporters.gguf import export
from qat.frozen import Frozen
from qat.models.load import load
from qat.modules import attention
from qat.modules.attention import use_kv_cache
from qat.runtimes import llama_cpp
from qat.scheme import KV_CACHES
from qat.shipping import tokenizer_files as files_of

pytest.importorskip("xllamacpp")


def model(head_dim: int, kind: str) -> Any:
    net: Any = tiny("llama", hidden_size=256, intermediate_size=512, head_dim=head_dim)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.3)
    use_kv_cache(net, kind)
    return net


def in_llama_cpp(net: Any, kind: str, prompts: list[list[int]], folder: Path) -> Tensor:
    files = tokenizer_files(byte_level_tokenizer(), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    floats = {name: p.detach() for name, p in net.named_parameters()}
    config = {**net.config.to_dict(), "architectures": [type(net).__name__], "name": "tiny", "kv_cache": kind}
    export(Frozen({}, floats, {}, {}, config, files), folder)
    return llama_cpp.logprobs(folder, prompts)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_the_int8_cache_is_llama_cpps(head_dim: int, tmp_path: Path) -> None:
    """Heads of 32 are not rotated, those of 64 by one matrix, those of 128 by two sizes of it."""
    net = model(head_dim, "int8")
    torch.manual_seed(1)
    prompts = [torch.randint(2, VOCAB, (8 + i % 5,)).tolist() for i in range(50)]
    want, largest = last(net, prompts)
    error = (in_llama_cpp(net, "int8", prompts, tmp_path) - want).abs().amax(-1) / largest
    net.set_attn_implementation("eager")
    plain = (last(net, prompts)[0] - want).abs().amax(-1) / largest
    print(f"int8, heads of {head_dim}: within 2e-6 {(error < 2e-6).float().mean():.2f}, plain {plain.median():.1e}")
    assert (error < 2e-6).float().mean() >= 1 / 3
    assert error.median() <= 2e-6
    assert plain.min() > 1e-4


def test_flash_attention_sums_in_float16_below_a_tile_of_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """63 tokens take the kernel of single queries, 64 that of tiles: each simulation is far better on its own side."""
    net = model(64, "float16_flash")
    torch.manual_seed(1)
    prompts = [torch.randint(2, VOCAB, (tokens,)).tolist() for tokens in (63, 64) for _ in range(8)]
    got = in_llama_cpp(net, "float16_flash", prompts, tmp_path)
    errors = []
    for tile in (0, 1000):
        monkeypatch.setattr(attention, "TILE", tile)
        want, largest = last(net, prompts)
        errors.append(((got - want).abs().amax(-1) / largest).reshape(2, 8).median(1).values)
    print(f"63 and 64 tokens: as tiles {errors[0].tolist()}, as single queries {errors[1].tolist()}")
    assert errors[1][0] < errors[0][0] / 5
    assert errors[0][1] < errors[1][1] / 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KV_CACHES)
def test_the_embedded_model_over_each_cache(kind: str, tmp_path: Path) -> None:
    """A cache multiplies the roundings that a last bit can flip. llama.cpp sums integers, exactly, where torch
    multiplies float32, so it is the float64 evaluation of the simulation that it comes nearest to."""
    loaded: Any = load(None, name="gpt2_mini")
    net: Any = qat.prepare(loaded.model, **{**scheme("llama_q4_0"), "kv_cache": kind}).eval()
    config = {**net.config.to_dict(), "architectures": [type(net).__name__], "name": "mini"}
    torch.manual_seed(1)
    prompts = [torch.randint(2, config["vocab_size"], (8 + i % 5,)).tolist() for i in range(50)]
    narrow, largest = last(net, prompts)
    wide, _ = last(copy.deepcopy(net).double(), prompts)
    export(qat.convert(net, config=config, tokenizer=files_of(loaded.tokenizer)), tmp_path)
    got = llama_cpp.logprobs(tmp_path, prompts)
    net.set_attn_implementation("eager")
    plain, _ = last(net, prompts)
    errors = [(a - b).abs().amax(-1) / largest for a, b in ((got, wide), (got, narrow), (wide, narrow), (got, plain))]
    close = [(error < 2e-6).float().mean() for error in errors]
    said = [f"{share:.0%} {error.median():.1e}" for share, error in zip(close, errors, strict=True)]
    print(f"{kind}: against float64 {said[0]}, float32 {said[1]}, these two {said[2]}, without a cache {said[3]}")
    assert close[0] >= 1 / 3
    assert errors[0].median() <= errors[2].median()
    assert close[3] == 0
