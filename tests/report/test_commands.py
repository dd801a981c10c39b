"""The commands of a language run, pasted into a shell: real llama.cpp and plain transformers on files made here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample
from test_table import NASTY, paste

from qat.report.table import next_commands

WIDTH, BLOCKS, CONTEXT = 32, 1, 1024


def byte_tokens() -> list[str]:
    """A letter for each byte as GPT-2 writes them (printable ones stand for themselves), and the end-of-text token."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)] + ["<|endoftext|>"]


def write_gguf(path: Path, tokens: list[str]) -> None:
    """A random GPT-2 with the byte tokens as its vocabulary, through the gguf package."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "gpt2")
    for add, value in (
        (writer.add_context_length, CONTEXT),
        (writer.add_embedding_length, WIDTH),
        (writer.add_block_count, BLOCKS),
        (writer.add_feed_forward_length, 4 * WIDTH),
        (writer.add_head_count, 1),
        (writer.add_layer_norm_eps, 1e-5),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "gpt-2"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [1] * 256 + [3]),
        (writer.add_token_merges, ["T h"]),
        (writer.add_eos_token_id, 256),
    ):
        add(value)
    rng = np.random.default_rng(0)
    block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    block |= {"ffn_up": (4 * WIDTH, WIDTH), "ffn_down": (WIDTH, 4 * WIDTH)}
    tensors: dict[str, Any] = {"token_embd.weight": (len(tokens), WIDTH), "position_embd.weight": (CONTEXT, WIDTH)}
    tensors |= {"output_norm.weight": (WIDTH,), "output_norm.bias": (WIDTH,)}
    for i in range(BLOCKS):
        tensors |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        tensors |= {f"blk.{i}.{name}.bias": shape[:1] for name, shape in block.items()}
    for name, shape in tensors.items():
        writer.add_tensor(name, rng.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_cpp_command_runs_on_a_nasty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("shutil.which", lambda name: None)  # the wheel's llama.cpp, even where llama-cli is installed
    run = sample.write_run(tmp_path / NASTY, sample.language_report())
    write_gguf(run / "export/gguf/model.gguf", byte_tokens())
    assert paste(next_commands(sample.language_report(), run)[0]).strip()


@pytest.mark.slow
def test_transformers_command_runs_on_a_nasty_path(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    run = sample.write_run(tmp_path / NASTY, sample.language_report())
    tokens = byte_tokens()
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=tokens[-1]).save_pretrained(run / "export/hf")
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=WIDTH, n_layer=1, n_head=1, eos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(run / "export/hf")
    assert paste(next_commands(sample.language_report(), run)[1]).startswith("The")
