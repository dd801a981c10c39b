"""Tensors one at a time: the library's own bytes, nothing left out, and no export that gathers the model in memory."""

import ctypes
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_text_models import INT4, VOCAB, byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from qat.conversion import convert, prepare
from qat.errors import UserError
from qat.exporters import export
from qat.frozen import Frozen
from qat.scheme import Rule, Scheme
from qat.streams import CALLS, NAMES, ROOM, Behind, Writer, ahead, info, stored

TENSORS = {
    **{f"é/{i}": torch.arange(5).to(torch.float32).to(dtype) for i, dtype in enumerate(NAMES)},
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
}


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    save_file({n: t.contiguous() for n, t in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    with Writer(tmp_path / "ours", {n: info(t) for n, t in TENSORS.items()}, {"format": "pt"}) as writer:
        for name, tensor in reversed(TENSORS.items()):
            writer.put(name, tensor)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    read = stored(tmp_path / "ours")
    assert set(read) == set(load_file(tmp_path / "theirs"))
    assert all(torch.equal(read[n].float(), t.float()) for n, t in TENSORS.items() if not t.is_complex())
    with pytest.raises(KeyError):
        read["another"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_small_tensors_that_are_kept_hold_no_open_files(tmp_path: Path) -> None:
    save_file({str(i): torch.full((8,), float(i)) for i in range(100)}, tmp_path / "f")
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = list(stored(tmp_path / "f").values())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert sorted(t[0].item() for t in held) == list(range(100))


def test_a_tensor_that_is_not_as_announced_or_does_not_come_is_an_error(tmp_path: Path) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="a was announced and did not come"), Writer(tmp_path / "f", {"a": info(x)}):
        pass
    for wrong in (x.t(), x.half()):
        with pytest.raises(ValueError, match="was announced as"), Writer(tmp_path / "f", {"a": info(x)}) as writer:
            writer.put("a", wrong)


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_behind_are_all_made_and_their_errors_raised(threads: int) -> None:
    done: list[int] = []
    with Behind(done.append, threads) as behind:
        for i in range(50):
            behind(i)
    assert sorted(done) == list(range(50))
    assert threads > 1 or done == sorted(done)

    def refuse(i: int) -> None:
        if i == 9:
            raise OSError("disk full")

    def made(count: int, wrong: bool = False) -> None:
        with Behind(refuse, threads) as behind:
            for i in range(count):
                behind(i)
            if wrong:
                raise ValueError("of the maker")

    for count in (10, 31):  # raised at the end, and by a later call
        with pytest.raises(OSError, match="disk full"):
            made(count)
    with pytest.raises(ValueError, match="of the maker"):
        made(10, wrong=True)


def test_what_is_made_ahead_comes_in_order_and_leaves_torchs_threads_as_they_were() -> None:
    before, made = torch.get_num_threads(), []

    def make(name: str) -> tuple[str, int]:
        made.append(name)
        if name == "7":
            raise ValueError("of 7")
        return name, torch.get_num_threads()

    names = [str(i) for i in range(7)]
    found = []
    for name, threads in ahead(make, names, threads=2):
        assert len(made) <= len(found) + 3  # the one in use and two
        assert threads == max(1, before // 2)
        found.append(name)
    assert found == names
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="of 7"):
        list(ahead(make, map(str, range(12))))
    assert torch.get_num_threads() == before
    assert list(ahead(make, [])) == []


def test_calls_that_are_large_wait_and_small_ones_do_not() -> None:
    go, started = threading.Event(), []

    def use(name: str, tensor: torch.Tensor) -> None:
        started.append(name)
        assert go.wait(20)

    large, small = torch.empty(ROOM + 1, dtype=torch.uint8), torch.empty(8)
    with Behind(use) as behind:
        for call in (("a", large), ("b", small), ("c", small)):
            behind(*call)  # none of them waits for the first to end
        assert started in ([], ["a"])
        threading.Timer(0.2, go.set).start()
        behind("d", large)
        assert started[0] == "a"
    assert started == ["a", "b", "c", "d"]


@pytest.mark.parametrize("interrupted", [True, False])
def test_after_an_error_or_an_interrupt_nothing_more_is_called(interrupted: bool) -> None:
    go, called = threading.Event(), []

    def use(i: int) -> None:
        assert go.wait(20)
        called.append(i)
        if not interrupted:
            raise OSError("disk full")

    def made() -> None:
        with Behind(use) as behind:
            for i in range(20):
                behind(i)
            if interrupted:
                threading.Timer(0.2, go.set).start()
                raise KeyboardInterrupt
            go.set()

    with pytest.raises(KeyboardInterrupt if interrupted else OSError):
        made()
    assert called == [0]


def test_no_more_calls_wait_than_files_may_be_open() -> None:
    go, most = threading.Event(), []
    threading.Timer(0.3, go.set).start()
    with Behind(lambda _: go.wait(20)) as behind:
        for i in range(3 * CALLS):
            behind(i)
            most.append(len(behind.waiting))
    assert max(most) == CALLS


def growth(work: Callable[[], object]) -> int:
    """By how many bytes the resident size grew at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

    def kilobytes(key: str) -> int:
        return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)).split()[1])

    before = kilobytes("VmRSS")
    work()
    return (kilobytes("VmHWM") - before) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_step_gathers_the_model_in_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8
    )
    rules = [Rule(type="Linear", path="(?!lm_head).*", scheme=Scheme(weight=INT4))]
    model = prepare(LlamaForCausalLM(config), rules)
    codes = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    tokenizer = {"tokenizer.json": byte_level_tokenizer().to_str().encode()}
    path = tmp_path / "frozen"
    grown = {"convert": growth(lambda: convert(model, tokenizer=tokenizer, path=path))}
    assert Frozen.load(path).digests() == convert(model, tokenizer=tokenizer).digests()
    for target in ("hf", "gptq", "gguf"):

        def made(target: str = target) -> None:
            export(Frozen.load(path), target, tmp_path / target)

        made()  # what it imports is not the model
        grown[target] = growth(made)
    assert max(grown.values()) < codes / 2, grown  # int8 codes, which eager loading would hold all at once


def test_a_tensor_that_is_not_finite_leaves_no_folder(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    model = prepare(LlamaForCausalLM(config), [Rule(type="Linear", scheme=Scheme(weight=INT4))])
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    with pytest.raises(UserError, match=r"lm_head\.weight: the tensor holds NaN"):
        convert(model, path=tmp_path / "frozen")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nor_does_an_unquantized_one_that_holds_nan(dtype: torch.dtype, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.LayerNorm(4)).to(dtype)
    prepare(model, [Rule(type="Linear", scheme=Scheme(weight=INT4))])
    with torch.no_grad():
        model[1].bias[2] = torch.inf  # which some models have on purpose
        convert(model, config={"architecture": "x"})
        model[1].bias[3] = torch.nan
    with pytest.raises(UserError, match=r"1\.bias holds NaN: training has diverged"):
        convert(model, config={"architecture": "x"}, path=tmp_path / "frozen")
    assert list(tmp_path.iterdir()) == []
