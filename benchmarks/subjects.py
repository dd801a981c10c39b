"""What the benchmarks compare: two models, and for each method a function that prepares a float model for training."""

import argparse
import logging
import warnings
from collections.abc import Callable

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import qat
from qat.quantizers.lsq import LSQ

INT4 = qat.QuantSpec(qtype="int4", block=(1, 32))


def llama_40m() -> nn.Module:
    """Hidden 1024, 3 layers, 40.6M parameters."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=3,
        num_attention_heads=16,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def gpt2_mini() -> nn.Module:
    """The shape of the embedded model: 4 layers of 256, a vocabulary of 4096, tied; Conv1D throughout."""
    config = GPT2Config(
        vocab_size=4096, n_embd=256, n_layer=4, n_head=8, n_positions=1024, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"llama_40m": llama_40m, "gpt2_mini": gpt2_mini}


def plain(model: nn.Module) -> nn.Module:
    return model


def ours(model: nn.Module) -> nn.Module:
    """Every linear layer but the head, int4 block 32: what the others quantize too."""
    rule = qat.Rule(type="Linear|Conv1D", path="(?!lm_head).*", scheme=qat.Scheme(weight=INT4))
    return qat.prepare(model, [rule])


def ours_lsq(model: nn.Module) -> nn.Module:
    rule = qat.Rule(type="Linear|Conv1D", path="(?!lm_head).*", scheme=qat.Scheme(weight=INT4))
    return qat.prepare(model, [rule], weight=LSQ)


def _as_linear(model: nn.Module) -> nn.Module:
    """Conv1D replaced by nn.Linear, which is all that the others quantize (they leave Conv1D in floating point)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1])
            linear.weight = nn.Parameter(module.weight.detach().t().contiguous())
            linear.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model


def torchao(model: nn.Module) -> nn.Module:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, QATStep

    model = _as_linear(model)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=32)  # pyright: ignore[reportAttributeAccessIssue]
    config = QATConfig(weight_config=weight, step=QATStep.PREPARE)
    quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name)
    return model


def quanto(model: nn.Module) -> nn.Module:
    warnings.simplefilter("ignore")
    from optimum.quanto import qint4, quantize  # pyright: ignore[reportMissingImports]

    model = _as_linear(model)
    quantize(model, weights=qint4, exclude="lm_head")
    return model


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": plain,
    "ours": ours,
    "ours_lsq": ours_lsq,
    "torchao": torchao,
    "quanto": quanto,
}


def train_step(model: nn.Module, batch: int, tokens: int, vocab: int) -> Callable[[], float]:
    """One step of AdamW on random tokens, as a function that returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark of a training step has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="llama_40m")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return p
