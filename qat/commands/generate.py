"""qat generate: greedy or sampled text from a run, a frozen folder or any export, in the runtime of the export."""

import argparse
import json
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """PATH --prompt TEXT"""
    parser.add_argument("path", type=Path, help="a run, a frozen folder or an exported folder or file")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Runs, frozen and hf folders are computed from packed integers in torch, every other export by its runtime."""
    from qat.commands.evaluate import classifies
    from qat.errors import UserError
    from qat.exporters import identify, target_module
    from qat.runtimes import run as run_in

    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: give 0 (the likeliest token) or more")
    if not args.prompt:
        raise UserError("--prompt is empty: give at least one character")
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: give 1 or more")
    target = "frozen" if (args.path / "frozen").is_dir() else identify(args.path)[0]
    if classifies(args.path, target):
        raise UserError(f"{args.path} is a classifier, which generates no text; score it with: qat eval {args.path}")
    if target not in ("frozen", "hf"):
        request = {"prompt": args.prompt, "n_predict": args.tokens, "temperature": args.temperature, "seed": args.seed}
        print(args.prompt + run_in(target_module(target).RUNTIME, args.path, complete=json.dumps(request))["complete"])
        return
    import torch
    from transformers.utils import logging

    from qat.models.positions import refuse_longer
    from qat.models.tokenizer import load_tokenizer
    from qat.packed.load import load

    logging.disable_progress_bar()  # of loading the weights
    tokenizer = load_tokenizer(args.path)
    model = load(args.path)
    ids = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("--prompt holds no token of this model: give other text")
    refuse_longer("--prompt and --tokens", ids.shape[1] + args.tokens, model.config.to_dict())
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, pad_token_id=pad, **sampling
        )
    print(tokenizer.decode(out[0], skip_special_tokens=True))
