"""Specs: what is refused, the round trip through a dict, block resolution and stored bits."""

import json

import pytest
import torch
from reference import valid_specs

from qat.scheme import QTYPES, QuantSpec, Rule, Scheme, bits_per_weight, check_block

SUPER = QuantSpec(qtype="uint6", block=(1, 8), range="one_signed", scale="float16")


def test_qtypes() -> None:
    integers = {name: q for name, q in QTYPES.items() if name != "ternary"}
    assert len(integers) == 14
    assert (QTYPES["ternary"].qmin, QTYPES["ternary"].qmax, QTYPES["ternary"].bits) == (-1, 1, 2)
    for name, q in integers.items():
        assert name == ("int" if q.qmin else "uint") + str(q.bits)
        assert q.qmax - q.qmin == 2**q.bits - 1
        assert torch.tensor([q.qmin, q.qmax]).to(q.storage).tolist() == [q.qmin, q.qmax]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"qtype": "int9"}, "qtype"),
        ({"qtype": "int4", "range": "max"}, "range"),
        ({"qtype": "int4", "rounding": "up"}, "rounding"),
        ({"qtype": "int4", "scale": "fp16"}, "scale"),
        ({"qtype": "int4", "divide": "inverse"}, "divide"),
        ({"qtype": "int4", "block": (1, 0)}, "block"),
        ({"qtype": "int4", "block": (1, -2)}, "block"),
        ({"qtype": "int4", "block": (1, 2.0)}, "block"),
        ({"qtype": "int4", "block": (32,)}, "block"),
        ({"qtype": "int4", "range": "minmax"}, "needs an offset"),
        ({"qtype": "int4", "offset": "zero_point"}, "takes no offset"),
        ({"qtype": "int4", "range": "minmax", "offset": "zero"}, "offset"),
        ({"qtype": "uint4"}, "signed qtype"),
        ({"qtype": "int4", "range": "mlx", "offset": "float16"}, "unsigned"),
        ({"qtype": "uint4", "range": "mlx", "offset": "zero_point"}, "floating offset"),
        ({"qtype": "uint4", "range": "minmax_zero", "offset": "zero_point"}, "floating offset"),
        ({"qtype": "int4", "range": "one_signed"}, "unsigned"),
        ({"qtype": "int4", "range": "signed_max", "divide": "reciprocal"}, "range 'absmax'"),
        ({"qtype": "int4", "scale": QuantSpec(qtype="int6")}, "one_signed"),
        ({"qtype": "int4", "range": "signed_max", "scale": SUPER}, "scales of both signs"),
        ({"qtype": "uint4", "range": "mlx", "offset": "float16", "scale": SUPER}, "range absmax"),
        ({"qtype": "int4", "divide": "exact", "scale": SUPER}, "divide 'stored'"),
    ],
)
def test_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec(**kwargs)


def test_specs_round_trip_through_json() -> None:
    for spec in valid_specs()[::37]:
        assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    two = QuantSpec(qtype="uint4", block=(1, 32), range="minmax_zero", scale=SUPER, offset=SUPER)
    assert QuantSpec.from_dict(json.loads(json.dumps(two.to_dict()))) == two
    assert two.label() == "uint4 (1, 32) minmax_zero uint6/8*float16 +uint6/8*float16"
    assert QuantSpec(qtype="int4", block=[1, 32]) == QuantSpec(qtype="int4", block=(1, 32))


def test_check_block() -> None:
    assert check_block((6, 64), (-1, -1)) == (6, 64)
    assert check_block((6, 64), (1, 32)) == (1, 32)
    for shape, block in (((6, 65), (1, 32)), ((6, 64), (4, 32)), ((6, 16), (1, 32))):
        with pytest.raises(ValueError, match="not divisible"):
            check_block(shape, block)


def test_bits_per_weight() -> None:
    assert bits_per_weight(QuantSpec(qtype="int4", block=(1, 32)), (8, 64)) == 4.5  # as Q4_0
    assert bits_per_weight(QuantSpec(qtype="int8", block=(1, 32)), (8, 64)) == 8.5  # as Q8_0
    q4_1 = QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="float16", scale="float16")
    assert bits_per_weight(q4_1, (8, 64)) == 5.0
    q4_k = QuantSpec(qtype="uint4", block=(1, 32), range="minmax_zero", scale=SUPER, offset=SUPER)
    assert bits_per_weight(q4_k, (8, 256)) == 4.5  # as Q4_K: 144 bytes for 256
    with pytest.raises(ValueError, match="not divisible"):
        bits_per_weight(q4_k, (8, 128))
    assert bits_per_weight(QuantSpec(qtype="ternary", block=(1, 256)), (8, 256)) == 2.0625  # as TQ2_0
    zero = QuantSpec(qtype="uint4", block=(1, 128), range="minmax", offset="zero_point", scale="float16")
    assert bits_per_weight(zero, (8, 128)) == 4 + 20 / 128
    assert bits_per_weight(QuantSpec(qtype="int8", block=(-1, -1), scale="float32"), (2, 16)) == 9.0


def test_static_inputs_need_one_range() -> None:
    with pytest.raises(ValueError, match="static"):
        Scheme(static=True)
    with pytest.raises(ValueError, match="static"):
        Scheme(input=QuantSpec(qtype="int8", block=(1, -1)), static=True)
    for divide in ("reciprocal", "reciprocal_scale", "exact", "exact_inverse"):  # what they divide by is not kept
        with pytest.raises(ValueError, match=f"a static input divides by its stored scale.*'{divide}'"):
            Scheme(input=QuantSpec(qtype="int8", block=(-1, -1), divide=divide), static=True)
    with pytest.raises(ValueError, match="share"):
        Rule(share="inputs")
