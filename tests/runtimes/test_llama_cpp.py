"""llama.cpp as a runtime, against transformers on float32 models that the gguf package wrote (not our exporter)."""

import inspect
import json
import os
import stat
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qat.errors import UserError, VerifyError
from qat.runtimes import llama_cpp, run

pytest.importorskip("xllamacpp")
VOCAB = 512
TEXT = "def f(x):\n\treturn x ** 2  # naïve café ☕ 日本語\n<|endoftext|>class A:\n    pass\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator([inspect.getsource(json.decoder), inspect.getsource(textwrap)], trainer)
    return tok


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms away from 0 and 1, so that one put in the wrong place is seen."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def write_f32(model: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> Path:
    c, is_gpt2 = model.config, model.config.model_type == "gpt2"
    w = gguf.GGUFWriter(path, c.model_type)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_head_count(c.num_attention_heads)
    if is_gpt2:
        w.add_feed_forward_length(4 * c.n_embd)
        w.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        w.add_feed_forward_length(c.intermediate_size)
        w.add_head_count_kv(c.num_key_value_heads)
        w.add_layer_norm_rms_eps(c.rms_norm_eps)
        w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    spec = json.loads(tokenizer.to_str())["model"]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(sorted(spec["vocab"], key=spec["vocab"].get))
    w.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (VOCAB - 1))
    w.add_token_merges([" ".join(m) for m in spec["merges"]])
    w.add_bos_token_id(0)
    w.add_eos_token_id(0)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2 if is_gpt2 else gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, p in model.named_parameters():
        a = p.detach().numpy()
        if is_gpt2 and name.split(".")[-2].startswith("c_") and a.ndim == 2:
            a = a.T
        if "q_proj" in name or "k_proj" in name:
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            a = a.reshape(heads, 2, -1, a.shape[1]).swapaxes(1, 2).reshape(a.shape)
        w.add_tensor(table.get_name(name, (".weight", ".bias")), np.ascontiguousarray(a))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = randomize(LlamaForCausalLM(config))
    return model, write_f32(model, tokenizer, tmp_path_factory.mktemp("llama") / "m.gguf")


@pytest.fixture(scope="module")
def gpt2(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    model = randomize(GPT2LMHeadModel(config))
    return model, write_f32(model, tokenizer, tmp_path_factory.mktemp("gpt2") / "m.gguf")


def reference(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)


def scored(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return reference(model, ids)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def batch(tokenizer: Tokenizer) -> torch.Tensor:
    """Real text with an end-of-text token and split characters, and random ids, most of them broken UTF-8."""
    ids = tokenizer.encode(TEXT).ids
    assert 0 in ids
    assert any(tokenizer.decode([i]) == "�" for i in ids)
    return torch.stack([torch.tensor(ids), torch.randint(VOCAB, (len(ids),))])


def test_score_equals_transformers_on_llama(llama: tuple[PreTrainedModel, Path], tokenizer: Tokenizer) -> None:
    model, path = llama
    ids = batch(tokenizer)
    torch.testing.assert_close(llama_cpp.score(path, ids), scored(model, ids), atol=1e-5, rtol=0)


def test_score_equals_transformers_on_gpt2(gpt2: tuple[PreTrainedModel, Path], tokenizer: Tokenizer) -> None:
    """llama.cpp looks GELU up in a float16 table: errors of about 1e-4 that average out."""
    model, path = gpt2
    ids = batch(tokenizer)
    difference = llama_cpp.score(path, ids) - scored(model, ids)
    assert difference.abs().max() < 1e-3
    assert difference.mean().abs() < 5e-5


def test_score_fills_the_whole_context(llama: tuple[PreTrainedModel, Path], tokenizer: Tokenizer) -> None:
    """As many tokens as the model has positions, in one piece."""
    model, path = llama
    ids = torch.tensor([tokenizer.encode(inspect.getsource(json.decoder)).ids[:256]])
    torch.testing.assert_close(llama_cpp.score(path, ids), scored(model, ids), atol=2e-5, rtol=0)


def test_logprobs_are_the_whole_vocabulary(llama: tuple[PreTrainedModel, Path], tokenizer: Tokenizer) -> None:
    model, path = llama
    ids = batch(tokenizer)
    prompts = [ids[0, :3].tolist(), ids[1, :40].tolist(), ids[0, :41].tolist()]
    want = torch.stack([reference(model, torch.tensor([p]))[0, -1] for p in prompts])
    torch.testing.assert_close(llama_cpp.logprobs(path, prompts), want, atol=1e-5, rtol=0)


def test_run_in_a_process_of_its_own(llama: tuple[PreTrainedModel, Path], tokenizer: Tokenizer) -> None:
    """One process answers all calls; tensors, rows, texts and strings survive the trip."""
    model, path = llama
    ids = batch(tokenizer)
    lines = [TEXT, "", "日本 ☕\ttab\r\n", "x\x00y"]
    answer = run("llama_cpp", path.parent, score=ids, logprobs=[[1, 2, 3]], tokenize=lines, version="")
    torch.testing.assert_close(answer["score"], scored(model, ids), atol=1e-5, rtol=0)
    assert answer["logprobs"].shape == (1, VOCAB)
    assert answer["tokenize"] == [tokenizer.encode(line).ids for line in lines]
    assert answer["version"].startswith(("xllamacpp 20", "llama-server "))


def test_complete_generates_greedily(llama: tuple[PreTrainedModel, Path], tokenizer: Tokenizer) -> None:
    model, path = llama
    ids = torch.tensor([tokenizer.encode("def f").ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    request = json.dumps({"prompt": "def f", "n_predict": 8, "temperature": 0})
    said = run("llama_cpp", path, complete=request)["complete"]
    assert said == tokenizer.decode(out[0, ids.shape[1] :].tolist())


def test_a_broken_file_is_a_verification_failure(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(llama[1].read_bytes()[:20_000])
    with pytest.raises(VerifyError, match="cannot load"):
        run("llama_cpp", tmp_path, score=torch.tensor([[1, 2, 3]]))


def test_a_folder_without_a_model_names_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 0 \.gguf files"):
        run("llama_cpp", tmp_path, score=torch.tensor([[1, 2, 3]]))


def test_too_slow_is_said(llama: tuple[PreTrainedModel, Path]) -> None:
    with pytest.raises(UserError, match=r"llama_cpp did not finish within 0\.1 s"):
        run("llama_cpp", llama[1], timeout=0.1, score=torch.tensor([[1, 2, 3]]))


def test_not_installed_names_the_command(llama: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="pip install xllamacpp"):
        llama_cpp.score(llama[1], torch.tensor([[1, 2, 3]]))


STAND_IN = """#!{python}
# llama-server's command line and HTTP API, answered by the wheel: the options must be spelled as llama.cpp spells them
import argparse, os, time
import xllamacpp as x
if "--version" in os.sys.argv:
    raise SystemExit(print("version: 9999 (stand-in)"))
parser = argparse.ArgumentParser(allow_abbrev=False)
for option in ("model", "host", "cache-type-k", "cache-type-v", "flash-attn"):
    parser.add_argument("--" + option, required=True)
for option in ("port", "ctx-size", "parallel", "threads", "n-gpu-layers"):
    parser.add_argument("--" + option, type=int, required=True)
parser.add_argument("--no-warmup", action="store_true", required=True)
a = parser.parse_args()
assert (a.cache_type_k, a.cache_type_v, a.flash_attn) == ("f32", "f32", "off")
open({pid!r}, "w").write(str(os.getpid()))
p = x.CommonParams()
p.model.path, p.hostnames, p.port, p.n_ctx, p.n_parallel = a.model, [a.host], a.port, a.ctx_size, a.parallel
p.cpuparams.n_threads = a.threads
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.warmup = False
try:
    server = x.Server(p)
except RuntimeError as error:
    raise SystemExit("stand-in: " + str(error))
time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `llama-server` on PATH; the path of the file in which it leaves its process id."""
    folder, pid = tmp_path / "bin", tmp_path / "pid"
    folder.mkdir()
    file = folder / "llama-server"
    file.write_text(STAND_IN.format(python=sys.executable, pid=str(pid)))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return pid


def gone(pid: Path) -> bool:
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_llama_server_on_path_is_preferred_and_ended(
    llama: tuple[PreTrainedModel, Path], tokenizer: Tokenizer, program: Path
) -> None:
    model, path = llama
    ids = batch(tokenizer)[:1]
    torch.testing.assert_close(llama_cpp.score(path, ids), scored(model, ids), atol=1e-5, rtol=0)
    assert llama_cpp.version() == "llama-server version: 9999 (stand-in)"
    assert gone(program)


def test_a_llama_server_that_fails_is_reported_and_ended(
    llama: tuple[PreTrainedModel, Path], tmp_path: Path, program: Path
) -> None:
    broken = tmp_path / "m.gguf"
    broken.write_bytes(llama[1].read_bytes()[:20_000])
    with pytest.raises(VerifyError, match="stand-in: Failed to init"):
        llama_cpp.score(broken, torch.tensor([[1, 2, 3]]))
    assert gone(program)
    with pytest.raises(KeyError), llama_cpp._serve(llama[1], 64):  # an error on our side ends it too
        raise KeyError
    assert gone(program)
