"""What follows a folder's writers: no thread is left, and every SHA-256 is that of the finished file."""

import hashlib
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_text_models import VOCAB, byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from qat import meanwhile
from qat.conversion import convert, prepare
from qat.exporters import export
from qat.files import read_manifest
from qat.meanwhile import PIECE, flushed_meanwhile, hashed_meanwhile
from qat.scheme import QuantSpec, Rule, Scheme
from qat.streams import Behind


@pytest.mark.parametrize("follow", [flushed_meanwhile, hashed_meanwhile])
def test_an_interrupt_at_the_start_leaves_no_thread(
    follow: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, []

    def interrupted(self: threading.Thread) -> None:
        start(self)
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), follow(tmp_path):  # pyright: ignore[reportGeneralTypeIssues]
        pass
    assert [t.is_alive() for t in started] == [False]


def test_files_that_grow_are_replaced_cut_or_come_late(tmp_path: Path) -> None:
    pieces = [os.urandom(n) for n in (1, PIECE - 1, PIECE, 3 * PIECE + 7, 0, 12)]
    with hashed_meanwhile(tmp_path) as hashed:
        with (tmp_path / "grows").open("wb", buffering=0) as f:
            for piece in pieces:
                f.write(piece)
                time.sleep(0.15)  # the thread looks every tenth of a second
        for name in ("replaced", "cut"):
            (tmp_path / name).write_bytes(pieces[3])
        (tmp_path / "small").write_bytes(b"before")  # which is not looked at until it is asked for
        time.sleep(0.3)
        assert hashed(tmp_path / "replaced") == hashlib.sha256(pieces[3]).hexdigest()
        (tmp_path / "other").write_bytes(pieces[3] + b"another")
        (tmp_path / "other").replace(tmp_path / "replaced")
        (tmp_path / "cut").write_bytes(b"short")
        (tmp_path / "small").write_bytes(b"after, and longer")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "late").write_bytes(pieces[2])
        files = [f for f in tmp_path.rglob("*") if f.is_file()]
        assert len(files) == 5
        for file in files:
            assert hashed(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(FileNotFoundError), hashed_meanwhile(tmp_path) as hashed:
        hashed(tmp_path / "missing")


def test_the_thread_does_most_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(os.urandom(5 * PIECE))
    with hashed_meanwhile(tmp_path) as hashed:
        found = hashed(tmp_path / "f")
        made = hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()
        with (tmp_path / "f").open("r+b") as f:  # what it has seen it does not read again
            f.write(b"x")
        assert hashed(tmp_path / "f") == found == made


@pytest.mark.parametrize("target", ["awq", "gguf", "gptq", "gptq_v1", "hf", "mlx", "onnx", "torchao"])
def test_the_files_of_targets_that_are_hashed_meanwhile_only_grow(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread looks at them without a pause, so that what is written over has been hashed before, and is wrong."""
    repeated, update, sizes = meanwhile._repeated, meanwhile._updated, set[int]()

    def noted(file: Path, *args: Any) -> str:
        found = update(file, *args)
        if file.suffix in (".safetensors", ".gguf", ".onnx"):
            sizes.add(args[0][file].size)
        return found

    monkeypatch.setattr(meanwhile, "_repeated", lambda work, _: repeated(work, 0.0))
    monkeypatch.setattr(meanwhile, "_updated", noted)
    call = Behind._call
    monkeypatch.setattr(Behind, "_call", lambda self, given: (call(self, given), time.sleep(0.03)))
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4
    )
    spec = QuantSpec(qtype="int4", block=(1, 32), scale="float16")
    spec = replace(spec, range="signed_max", divide="exact_inverse", rounding="half_up") if target == "gguf" else spec
    model = prepare(LlamaForCausalLM(config), [Rule(type="Linear", path=".*proj", scheme=Scheme(weight=spec))])
    frozen = convert(model, tokenizer={"tokenizer.json": byte_level_tokenizer().to_str().encode()})
    path = export(frozen, target, tmp_path / "out")
    assert read_manifest(path)["target"] == target  # which raises for another SHA-256
    assert len(sizes) > 2  # it was seen growing
