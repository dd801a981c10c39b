"""A sequential network built again from its frozen form computes what the trained one did."""

import torch
from torch import nn

from qat.conversion import convert, prepare
from qat.models.sequential import describe
from qat.packed.load import pack
from qat.packed.sequential import build
from qat.scheme import QuantSpec, Rule, Scheme


def test_nested_grouped_and_partly_quantized() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.Dropout(), nn.ReLU()),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Sequential(nn.Linear(32, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 5))),
    )
    rule = Rule(type="Conv2d|Linear", path="(?!3.0).*", scheme=Scheme(weight=QuantSpec(qtype="int8")))
    trained = prepare(model, [rule]).eval()
    frozen = convert(trained, config=describe(trained, (4, 8, 8)))
    assert len(frozen.weights) == 2
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(pack(build(frozen), frozen)(x), trained(x))
