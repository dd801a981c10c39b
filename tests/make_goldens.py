"""Write tests/goldens.json anew: `python tests/make_goldens.py`. Only after a deliberate change of the numerics."""

import json

from test_affine import GOLDENS, golden_digests

from qat.scheme import QuantSpec

GGML = {"divide": "exact_inverse", "scale": "float16"}
SPECS = [
    QuantSpec(qtype="int4", block=(1, 32)),
    QuantSpec(qtype="int8", block=(1, 32)),
    QuantSpec(qtype="int8", block=(1, -1), scale="float32"),
    QuantSpec(qtype="int8", block=(-1, -1), range="absmax_half", scale="float32"),
    QuantSpec(qtype="int4", block=(1, 128), range="absmax_half", scale="bfloat16"),
    QuantSpec(qtype="int2", block=(1, 32), range="signed_max"),
    QuantSpec(qtype="int3", block=(16, 16), scale="float16", rounding="half_away"),
    QuantSpec(
        qtype="int4", block=(1, 32), range="signed_max", rounding="half_up", divide="exact_inverse", scale="float16"
    ),
    QuantSpec(qtype="int8", block=(1, 32), rounding="half_away", **GGML),
    QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point"),
    QuantSpec(
        qtype="uint8", block=(1, -1), range="minmax", offset="zero_point", scale="float32", rounding="toward_zero"
    ),
    QuantSpec(qtype="uint4", block=(1, 64), range="mlx", offset="float16", scale="float16", divide="exact"),
    QuantSpec(qtype="int5", block=(1, -1), range="minmax", offset="float32", scale="float32", divide="stored_inverse"),
]

if __name__ == "__main__":
    entries = [{"label": s.label(), "spec": s.to_dict(), "sha256": golden_digests(s)} for s in SPECS]
    GOLDENS.write_text(json.dumps(entries, indent=1) + "\n")
