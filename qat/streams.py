"""Tensors in and out of a safetensors file one at a time: what is written or read is in memory while it is in use.

The library writes from a dict of every tensor. `Writer` makes the same bytes (https://github.com/huggingface/safetensors,
"Format") from a header that is known before, so that the tensors may come one by one.
"""

import json
import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

T = TypeVar("T")
Info = tuple[torch.dtype, tuple[int, ...]]

NAMES = {  # in the order of the library, which stores the widest first and equals by name
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SMALL = 2**16  # bytes of a tensor that is read, not mapped
ROOM, CALLS = 2**24, 32  # bytes and calls that may wait for a thread: a mapped tensor is an open file
_ORDER = {dtype: rank for rank, dtype in enumerate(NAMES)}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Later(Mapping[str, T]):
    """Values by name that are made when they are asked for, each time anew, so that none stays in memory."""

    def __init__(self, names: Iterable[str], make: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def stored(file: Path) -> Later[Tensor]:
    """The tensors of a file, each mapped when it is asked for and let go with its last reference; the file must stay.

    Raises SafetensorError or OSError for a file that is damaged.
    """
    with safe_open(file, "pt"):  # the library refuses a header that does not fit its file
        pass
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    header.pop("__metadata__", None)
    return Later(header, lambda name: _mapped(file, 8 + size, header[name]))


def _mapped(file: Path, start: int, entry: dict[str, Any]) -> Tensor:
    """One tensor of a file whose tensors begin at `start`. Its own bytes are mapped, not the whole file, so that asking
    for a tensor to learn its shape costs next to nothing. Small ones are read: a mapping holds an open file."""
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = (start + i for i in entry["data_offsets"])
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    if end - begin <= SMALL:
        with file.open("rb") as f:
            f.seek(begin)
            return torch.frombuffer(bytearray(f.read(end - begin)), dtype=dtype).reshape(shape)
    page = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY  # where a mapping may begin
    with file.open("rb") as f:
        held = mmap.mmap(f.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(held, dtype=torch.uint8, offset=begin - page).view(dtype).reshape(shape)


def info(tensor: Tensor) -> Info:
    """What the header says of a tensor, which may be one without storage."""
    return tensor.dtype, tuple(tensor.shape)


def nbytes(said: Info) -> int:
    """Bytes of a tensor."""
    return said[0].itemsize * torch.Size(said[1]).numel()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class Writer:
    """A file whose tensors are `infos`; `put` takes them in any order. metadata: of the header."""

    def __init__(self, path: Path, infos: Mapping[str, Info], metadata: dict[str, str] | None = None) -> None:
        header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
        self.infos = infos
        self.places: dict[str, int] = {}
        end = 0
        for name in sorted(infos, key=lambda n: (_ORDER[infos[n][0]], n)):
            (dtype, shape), start = infos[name], end
            end += nbytes(infos[name])
            self.places[name] = start
            header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.file = path.open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)

    def put(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor that is not as announced."""
        if info(tensor) != self.infos[name]:
            raise ValueError(f"{name} is {info(tensor)} and was announced as {self.infos[name]}")
        self.file.seek(self.start + self.places.pop(name))
        self.file.write(raw(tensor))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Raises ValueError if a tensor is missing."""
        self.file.close()
        if self.places and error is None:
            raise ValueError(f"{next(iter(self.places))} was announced and did not come")


def ahead(make: Callable[[str], T], names: Iterable[str], threads: int = 2) -> Generator[T]:
    """make(name) of each, in order, by threads that go on while the caller uses one. Close it if it is not used up.

    They share torch's threads, which wait for each other in every operation, so that two single ones do more than two
    together. As many are being made, waiting or in use as there are threads.
    """
    before = torch.get_num_threads()
    each = max(1, before // threads)
    waiting: deque[Future[T]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(each,)) as pool:
            for name in names:
                waiting.append(pool.submit(make, name))
                if len(waiting) == threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(before)


class Behind:
    """A function that other threads call while its next arguments are made: writing and hashing let threads run.

    Of one thread, the calls keep their order. A call waits until it and those before it hold no more than ROOM bytes of
    tensors, besides the largest, one a thread: a weight is in use, its scales wait, and the next weight is being made.
    The first error is raised by a later call or at the end, and what waits is then left out.
    """

    def __init__(self, use: Callable[..., object], threads: int = 1) -> None:
        self.use, self.threads, self.failed = use, threads, False
        self.pool = ThreadPoolExecutor(threads)
        self.waiting: deque[tuple[Future[None], int]] = deque()

    def __call__(self, *given: Any) -> None:
        size = sum(getattr(x, "nbytes", 0) for x in given)
        while self.waiting and (self.waiting[0][0].done() or self._full(size)):
            self.waiting.popleft()[0].result()
        self.waiting.append((self.pool.submit(self._call, given), size))

    def _call(self, given: tuple[Any, ...]) -> None:
        if self.failed:
            return
        try:
            self.use(*given)
        except BaseException:
            self.failed = True
            raise

    def _full(self, size: int) -> bool:
        sizes = sorted([size, *(held for _, held in self.waiting)])
        return len(sizes) > CALLS or sum(sizes[: -self.threads]) > ROOM

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.failed |= error is not None
        self.pool.shutdown()
        while self.waiting and error is None:
            self.waiting.popleft()[0].result()
