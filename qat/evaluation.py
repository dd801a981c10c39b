"""What every stage and runtime of a run is measured on, and what the trained model answered there.

Kept as RUN/evaluation.safetensors. Text: `input_ids`, `labels` [n, T] int64, `nll` [n, T-1] (nats of each next
token), `prompts` [m, L] int64 and `logprobs` [m, V] after each prompt. Classification: `x` [n, ...], `labels` [n],
`logits` [n, C]. The answers are the fake-quantized model's own, computed in the process that trained it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.errors import UserError, VerifyError
from qat.files import atomic_file

Evaluated = dict[str, Tensor]
Track = Callable[[Sequence[Tensor]], Iterable[Tensor]]
PROMPTS, PROMPT_TOKENS = 8, 12  # short: one flipped int8 activation code decorrelates everything after it


@torch.no_grad()
def answer_text(model: nn.Module, batch: Evaluated, batch_size: int, track: Track = iter) -> Evaluated:
    """The model's negative log-likelihoods on `batch` and its log-probabilities after short prompts (float32)."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    nll: list[Tensor] = []
    for ids in track(batch["input_ids"].split(batch_size)):
        ids = ids.to(device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        nll.append(nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu())
    prompts = batch["input_ids"][:PROMPTS, :PROMPT_TOKENS].contiguous()
    logprobs = model(input_ids=prompts.to(device)).logits[:, -1].float().log_softmax(-1).cpu()
    model.train(training)
    return {**batch, "nll": torch.cat(nll), "prompts": prompts, "logprobs": logprobs}


@torch.no_grad()
def answer_images(model: nn.Module, batch: Evaluated) -> Evaluated:
    """The model's logits on `batch["x"]`."""
    training = model.training
    model.eval()
    logits = model(batch["x"].to(next(model.parameters()).device)).float().cpu()
    model.train(training)
    return {**batch, "logits": logits}


def answer(model: nn.Module, batch: Evaluated, batch_size: int, track: Track = iter) -> Evaluated:
    """`batch` with the model's answers, text or classification by its keys. track: shows progress over batches."""
    return answer_text(model, batch, batch_size, track) if "input_ids" in batch else answer_images(model, batch)


def figures(answers: Evaluated) -> dict[str, float]:
    """{"loss", "perplexity"} or {"loss", "accuracy"} of a batch with answers; loss in nats, accuracy a share of 1."""
    if "nll" in answers:
        loss = mean_loss(answers["nll"], answers["labels"])
        return {"loss": loss, "perplexity": math.exp(loss)}
    logits, labels = answers["logits"].double(), answers["labels"]
    loss = float(nn.functional.cross_entropy(logits, labels))
    return {"loss": loss, "accuracy": float((logits.argmax(-1) == labels).double().mean())}


def save(answers: Evaluated, path: Path) -> None:
    """Write the file atomically."""
    with atomic_file(path) as temp:
        save_file({k: v.contiguous() for k, v in answers.items()}, temp)


def load(path: Path) -> Evaluated:
    """Read the file. Raises UserError if it is not there, VerifyError if it is damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run it belongs to has not got as far as evaluation")
    try:
        return load_file(path)
    except SafetensorError as e:
        raise VerifyError(f"{path} cannot be read: {e}") from e


def mean_loss(nll: Tensor, labels: Tensor) -> float:
    """Mean of nll [n, T-1] over the positions whose label [n, T] (unshifted) is not -100, in nats."""
    return float(nll.double()[labels[:, 1:] != -100].mean())
