"""Perplexity of round-to-nearest on gpt2_mini, or --model llama_mini or FOLDER: int8 to int2, per channel and block 32.

    python benchmarks/rtn.py

Absmax over qmax, linears only (embedding and head stay float), scored on the embedded evaluation text.
"""

import argparse
import copy
from typing import Any

import torch

from qat.conversion import prepare
from qat.data.stdlib import StdlibData
from qat.evaluation import answer, figures
from qat.models.load import EMBEDDED, load
from qat.scheme import QuantSpec, Rule, Scheme


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2_mini", help="an embedded model (default gpt2_mini) or a folder")
    parser.add_argument("--range", default="absmax", help="range rule of the grid (default absmax)")
    parser.add_argument("--windows", type=int, help="at most so many windows of 256 tokens (default: all)")
    args = parser.parse_args()
    loaded = load(None if args.model in EMBEDDED else args.model, name=args.model)
    data = StdlibData(block_size=256, batch_size=8)
    data.attach(loaded.tokenizer)
    batch = data.evaluation("test", args.windows)
    plain = perplexity(loaded.model, batch)
    print(f"torch {torch.__version__}, {loaded.source}, {len(batch['labels'])} windows of 256 tokens, {args.range}")
    print(f"\n| linears | per channel | cost | block 32 | cost |\n|---|---|---|---|---|\n| float | {plain:.3f} | | | |")
    for qtype in ("int8", "int4", "int3", "int2"):
        cells = [qtype]
        for block in ((1, -1), (1, 32)):
            spec = QuantSpec(qtype=qtype, block=block, range=args.range)
            model = copy.deepcopy(loaded.model)
            rules = [Rule(path=r"(.*\.)?lm_head"), Rule(type="Linear|Conv1D", scheme=Scheme(weight=spec))]
            cost = perplexity(prepare(model, rules), batch)
            cells += [f"{cost:.3f}", f"{cost / plain - 1:+.2%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def perplexity(model: Any, batch: dict[str, torch.Tensor]) -> float:
    return figures(answer(model, batch, 8))["perplexity"]


if __name__ == "__main__":
    main()
