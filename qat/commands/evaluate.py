"""qat eval: loss and perplexity or accuracy of a run, a frozen folder or an export, in its own runtime."""

import argparse
import math
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from qat.stages import Outcome


def add(parser: argparse.ArgumentParser) -> None:
    """PATH [--data FILE]"""
    parser.add_argument("path", type=Path, help="a run, a frozen folder or an exported folder or file")
    parser.add_argument(
        "--data",
        help="a file or folder of text as data=custom reads it, or a hub dataset id (default: the embedded text; "
        "a classifier is always scored on the test inputs of its run)",
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--block-size", type=int, default=256, help="tokens in a window (default 256)")
    parser.add_argument("--windows", type=int, help="at most so many windows or images, spread evenly (default: all)")


def run(args: argparse.Namespace) -> None:
    """Prints what was scored, where, its loss in nats, and its perplexity or accuracy."""
    from rich.console import Console
    from transformers.utils import logging

    from qat.errors import at_least
    from qat.exporters import identify
    from qat.stages import bar

    logging.disable_progress_bar()  # of loading the weights: there is a bar of our own
    if args.windows is not None:
        at_least("--windows", args.windows, 1)
    target = "frozen" if (args.path / "frozen").is_dir() else identify(args.path)[0]
    with bar(f"eval {args.path}", Console(stderr=True)) as shown, shown.follow():
        what, figures = _images(args, target) if classifies(args.path, target) else _text(args, target, shown)
    print(f"{args.path}: {what}")
    print(", ".join(figures))


def classifies(path: Path, target: str) -> bool:
    """Whether it is a classifier: frozen as a list of layers, or run by a runtime that takes inputs and not tokens."""
    from qat.exporters import target_module
    from qat.frozen import read_config

    if target == "frozen":
        return "layers" in read_config(path / "frozen" if (path / "frozen").is_dir() else path)
    return hasattr(import_module(f"qat.runtimes.{target_module(target).RUNTIME}"), "predict")


def _kept(args: argparse.Namespace) -> "dict[str, Tensor]":
    """What the run of a classifier was scored on. Raises UserError if it is not at hand, or --data is given."""
    from qat import evaluation
    from qat.errors import UserError
    from qat.verification import own_run

    folder = (args.path if args.path.is_dir() else args.path.parent).absolute()
    run_dir = folder if (folder / "frozen").is_dir() else folder.parent if folder.name == "frozen" else own_run(folder)
    kept = None if run_dir is None else run_dir / "evaluation.safetensors"
    if kept is None or not kept.is_file():
        raise UserError(
            f"{args.path} is a classifier, which is scored on the evaluation.safetensors of its run, and there is none "
            "here; give the run folder or RUN/export/onnx, or compare with: qat verify PATH --against RUN"
        )
    if args.data:
        raise UserError(f"--data is text, and {args.path} is a classifier: leave --data out to score {kept}")
    return evaluation.load(kept)


def _images(args: argparse.Namespace, target: str) -> tuple[str, list[str]]:
    import torch

    from qat import evaluation
    from qat.exporters import target_module
    from qat.packed.load import pack
    from qat.packed.sequential import build
    from qat.runtimes import run as run_in
    from qat.verification import read_any

    kept = _kept(args)
    count = len(kept["labels"])
    chosen = torch.linspace(0, count - 1, min(args.windows or count, count)).round().long()
    batch = {name: kept[name][chosen] for name in ("x", "labels")}
    if target == "frozen":
        frozen = read_any(args.path)
        answers, runtime = evaluation.answer_images(pack(build(frozen), frozen), batch), "torch, packed integers"
    else:
        got = run_in(target_module(target).RUNTIME, args.path, predict=batch["x"], version="")
        answers, runtime = {**batch, "logits": got["predict"]}, got["version"]
    found = evaluation.figures(answers)
    said = [f"loss {found['loss']:.6f} nats an image", f"accuracy {found['accuracy']:.4f}"]
    return f"{len(chosen)} images of evaluation.safetensors, {runtime}", said


def _text(args: argparse.Namespace, target: str, shown: "Outcome") -> tuple[str, list[str]]:
    import torch

    from qat.data.custom import CustomData
    from qat.data.stdlib import StdlibData
    from qat.evaluation import mean_loss
    from qat.exporters import target_module
    from qat.models.positions import refuse_longer
    from qat.models.tokenizer import load_tokenizer
    from qat.packed.load import load
    from qat.runtimes import run as run_in

    tokenizer = load_tokenizer(args.path)
    options: dict[str, Any] = {"block_size": args.block_size, "batch_size": 1}
    data = StdlibData(**options)
    if args.data:  # as its own validation file: all of it is scored, none is split off
        data = CustomData(path=args.data, validation_path=args.data, text_column=args.text_column, **options)
    data.attach(tokenizer)
    batch = data.evaluation("test", args.windows)
    ids = batch["input_ids"]
    if target in ("frozen", "hf"):
        model = load(args.path)
        refuse_longer("--block-size", args.block_size, model.config.to_dict())
        parts: list[torch.Tensor] = []
        with torch.no_grad():
            for part in shown.track(ids.split(8)):
                logits = model(input_ids=part).logits[:, :-1].float().transpose(1, 2)
                parts.append(torch.nn.functional.cross_entropy(logits, part[:, 1:], reduction="none"))
        nll, runtime = torch.cat(parts), "torch, packed integers"
    else:
        answers = run_in(target_module(target).RUNTIME, args.path, score=ids, version="")
        nll, runtime = -answers["score"], answers["version"]
    loss = mean_loss(nll, batch["labels"])
    said = [f"loss {loss:.6f} nats a token", f"perplexity {math.exp(loss):.4f}"]
    return f"{ids.shape[0]} windows of {ids.shape[1]} tokens, {runtime}", said
