"""Packed layers against the fake-quantized ones they come from: every grid, kind and dtype, bit for bit."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qat.conversion import calibrate, convert, freeze_observers, prepare
from qat.errors import UserError
from qat.frozen import Frozen
from qat.packed import linear
from qat.packed.base import PackedLayer
from qat.packed.load import pack
from qat.scheme import QuantSpec, Rule, Scheme

GRIDS = {
    "int4": QuantSpec(qtype="int4", block=(1, 32)),
    "int4 negative scales": QuantSpec(qtype="int4", block=(1, 32), range="signed_max"),
    "int2": QuantSpec(qtype="int2", block=(1, 16)),
    "int3": QuantSpec(qtype="int3", scale="float32"),
    "int7": QuantSpec(qtype="int7", block=(1, 32)),
    "int8 channel": QuantSpec(qtype="int8"),
    "int8 tensor": QuantSpec(qtype="int8", block=(-1, -1), scale="bfloat16"),
    "uint4 zero point": QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point"),
    "int8 zero point": QuantSpec(qtype="int8", range="minmax", offset="zero_point"),
    "uint4 float offset": QuantSpec(qtype="uint4", block=(1, 32), range="minmax", scale="float16", offset="float16"),
    "2-D blocks": QuantSpec(qtype="int4", block=(8, 16)),
    "2-D blocks, zero point": QuantSpec(qtype="uint5", block=(8, 16), range="minmax", offset="zero_point"),
}
INPUTS = {
    "token": Scheme(input=QuantSpec(qtype="int8", scale="float32")),
    "static": Scheme(
        input=QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", scale="float32", offset="zero_point"),
        static=True,
    ),
}


class Net(nn.Module):
    """One layer of every kind; conv (8, 4, 4, 4) is a matrix (8, 64)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(48, 64)
        self.linear = nn.Linear(64, 96)
        self.conv1d = Conv1D(64, 96)
        self.conv = nn.Conv2d(4, 8, 4, stride=2, padding=1)
        self.strange = nn.Conv2d(8, 8, 4, padding=2, padding_mode="circular", groups=2)
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1d(torch.tanh(self.linear(self.embedding(ids))))
        return self.strange(self.conv(x.reshape(-1, 4, 8, 8)))


IDS = torch.arange(12).reshape(3, 4) * 5 % 48


def rules(spec: QuantSpec | None, scheme: Scheme | None = None) -> list[Rule]:
    taken = scheme or Scheme()
    layers = Scheme(weight=spec, input=taken.input, static=taken.static)
    return [Rule(path="embedding", scheme=Scheme(weight=spec)), Rule(path="strange"), Rule(scheme=layers)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_bit_equal_to_the_fake_quantized_model(grid: str, dtype: torch.dtype) -> None:
    model = prepare(Net().to(dtype), rules(GRIDS[grid])).eval()
    frozen = convert(model)
    with torch.no_grad():
        packed = pack(Net().to(dtype), frozen)
        assert torch.equal(packed(IDS), model(IDS))
    assert not any(p.dtype == torch.int32 and p.requires_grad for p in packed.parameters())


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", [None, "int4"])
def test_quantized_inputs(inputs: str, weight: str | None) -> None:
    chosen = rules(GRIDS[weight] if weight else None, INPUTS[inputs])
    chosen[0] = Rule(path="embedding", scheme=Scheme(weight=GRIDS["int8 channel"]))
    if inputs == "token":  # a convolution's input has no tokens
        chosen.insert(0, Rule(path="conv"))
    model = prepare(Net(), chosen)
    batches = [IDS, IDS + 1]
    calibrate(model, batches, lambda m, batch: m(batch))
    freeze_observers(model)
    model.eval()
    packed = pack(Net(), convert(model))
    with torch.no_grad():
        assert torch.equal(packed(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dot_of_integers(dtype: torch.dtype) -> None:
    spec = QuantSpec(qtype="int8", scale="float32", integer_dot=True)
    chosen = [Rule(path="linear|conv1d", scheme=Scheme(weight=GRIDS["int8 channel"], input=spec)), Rule()]
    model = prepare(Net().to(dtype), chosen).eval()
    packed = pack(Net().to(dtype), convert(model))
    with torch.no_grad():
        assert torch.equal(packed(IDS), model(IDS))


def test_codes_take_exactly_their_bits() -> None:
    """4 bits a weight and 16 a scale of 32 weights, and nothing of the float weight is left."""
    frozen = convert(prepare(Net(), rules(GRIDS["int4"])))
    packed = pack(Net(), frozen)
    state = [t for _, t in [*packed.named_parameters(), *packed.named_buffers()]]
    assert sum(t.nbytes for t in state) == frozen.nbytes()
    words = {n: m.weight.nbytes for n, m in packed.named_modules() if isinstance(m, PackedLayer)}
    assert words == {"embedding": 48 * 32, "linear": 96 * 32, "conv1d": 96 * 32, "conv": 8 * 32}


def test_only_rows_that_are_looked_up_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(Net(), convert(prepare(Net(), rules(GRIDS["int4"]))))
    seen: list[int] = []
    values = PackedLayer.values

    def spy(self: PackedLayer, *args: object) -> Tensor:
        out = values(self, *args)  # type: ignore[arg-type]
        seen.append(out.shape[0])
        return out

    monkeypatch.setattr(PackedLayer, "values", spy)
    packed.embedding(IDS)
    assert seen == [IDS.numel()]


@pytest.mark.parametrize("rows", [96, 2500])
def test_a_layer_multiplied_in_parts_gives_the_same_sums(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(64, rows)), [Rule(scheme=Scheme(weight=GRIDS["int4"]))]).eval()
    packed = pack(nn.Sequential(nn.Linear(64, rows)), convert(model))
    largest: list[int] = []
    dense = PackedLayer.dense

    def spy(self: PackedLayer, *args: object) -> Tensor:
        out = dense(self, *args)  # type: ignore[arg-type]
        largest.append(out.shape[0])
        return out

    monkeypatch.setattr(PackedLayer, "dense", spy)
    monkeypatch.setattr(linear, "WHOLE", 64 * 1024)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
    assert max(largest) <= 1024


def test_moves_and_casts_keep_codes_and_scales() -> None:
    frozen = convert(prepare(Net(), rules(GRIDS["uint4 zero point"])))
    packed = pack(Net(), frozen)
    before = copy.deepcopy(packed.linear.state_dict())
    packed.half().double().float()
    after = packed.linear.state_dict()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before if n != "bias")
    assert packed.bfloat16().embedding(IDS).dtype == torch.bfloat16


def test_integer_activations_are_an_error_and_not_silence() -> None:
    """T5 casts activations to the dtype of the weight."""
    packed = pack(Net(), convert(prepare(Net(), rules(GRIDS["int4"]))))
    with pytest.raises(TypeError, match="casts them to the dtype of the weight"):
        packed.linear(torch.ones(1, 64, dtype=torch.int32))


def test_a_model_of_another_shape_is_refused() -> None:
    frozen = convert(prepare(Net(), rules(GRIDS["int4"])))
    other = Net()
    other.linear = nn.Linear(64, 32)
    with pytest.raises(UserError, match="linear has shape"):
        pack(other, frozen)
    other = Net()
    other.more = nn.Linear(2, 2)
    with pytest.raises(UserError, match="more"):
        pack(other, frozen)
    renamed = Frozen({"nowhere.weight": frozen.weights["linear.weight"]}, frozen.floats)
    with pytest.raises(UserError, match="only one of the two"):
        pack(Net(), renamed)
