"""qat eval: loss and perplexity of a run, a frozen folder or an export on any text, in its own runtime."""

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """PATH [--data FILE]"""
    parser.add_argument("path", type=Path, help="a run, a frozen folder or an exported folder or file")
    parser.add_argument(
        "--data",
        help="a file or folder of text as data=custom reads it, or a hub dataset id (default: the embedded text)",
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--block-size", type=int, default=256, help="tokens in a window (default 256)")
    parser.add_argument("--windows", type=int, help="at most so many windows, spread evenly (default: all)")


def run(args: argparse.Namespace) -> None:
    """Prints tokens, loss in nats per token and perplexity."""
    import math

    import torch

    from qat.data.custom import CustomData
    from qat.data.stdlib import StdlibData
    from qat.errors import at_least
    from qat.evaluation import mean_loss
    from qat.exporters import identify, target_module
    from qat.models.positions import refuse_longer
    from qat.models.tokenizer import load_tokenizer
    from qat.packed.load import load
    from qat.runtimes import run as run_in

    if args.windows is not None:
        at_least("--windows", args.windows, 1)
    target = "frozen" if (args.path / "frozen").is_dir() else identify(args.path)[0]
    in_torch = target in ("frozen", "hf")
    tokenizer = load_tokenizer(args.path)
    options = {"block_size": args.block_size, "batch_size": 1}
    data = StdlibData(**options)
    if args.data:  # as its own validation file: all of it is scored, none is split off
        data = CustomData(path=args.data, validation_path=args.data, text_column=args.text_column, **options)
    data.attach(tokenizer)
    batch = data.evaluation("test", args.windows)
    ids = batch["input_ids"]
    if in_torch:
        model = load(args.path)
        refuse_longer("--block-size", args.block_size, model.config.to_dict())
        parts: list[torch.Tensor] = []
        with torch.no_grad():
            for part in ids.split(8):
                logits = model(input_ids=part).logits[:, :-1].float().transpose(1, 2)
                parts.append(torch.nn.functional.cross_entropy(logits, part[:, 1:], reduction="none"))
        nll = torch.cat(parts)
        runtime = "torch, packed integers"
    else:
        answers = run_in(target_module(target).RUNTIME, args.path, score=ids, version="")
        nll, runtime = -answers["score"], answers["version"]
    loss = mean_loss(nll, batch["labels"])
    print(f"{args.path}: {ids.shape[0]} windows of {ids.shape[1]} tokens, {runtime}")
    print(f"loss {loss:.6f} nats a token, perplexity {math.exp(loss):.4f}")
