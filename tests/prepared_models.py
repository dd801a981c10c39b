"""Tiny transformers models that are really prepared and converted, for the tests of what is written and loaded."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertForSequenceClassification

from qat.conversion import convert, prepare
from qat.frozen import Frozen
from qat.scheme import QuantSpec, Rule, Scheme

VOCAB = 512
IDS = torch.arange(40).reshape(2, 20) * 7 % VOCAB
INT4 = QuantSpec(qtype="int4", block=(1, 32))
NEGATIVE = QuantSpec(qtype="int4", block=(1, 32), range="signed_max")  # half of its scales are negative
INT8 = QuantSpec(qtype="int8", block=(1, 32))
CHANNEL = QuantSpec(qtype="int8")
ZERO = QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point")


def rule(weight: QuantSpec | None, path: str = ".*", kind: str = "Linear|Conv1D", **scheme: Any) -> Rule:
    return Rule(path=path, type=kind, scheme=None if weight is None and not scheme else Scheme(weight=weight, **scheme))


ALL = [rule(INT8, ".*(wte|embed_tokens|word_embeddings|lm_head|decoder)", ".*"), rule(NEGATIVE)]
LINEAR = [rule(None, ".*(lm_head|decoder)"), rule(NEGATIVE)]


def tiny(kind: str, **changes: Any) -> Any:
    """A random two-layer model in eval mode, its norms and biases not 1 and 0."""
    torch.manual_seed(0)
    if kind.startswith("bert"):
        config = BertConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            **changes,
        )
        model: Any = (BertForMaskedLM if kind == "bert" else BertForSequenceClassification)(config)
    else:
        shape: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        if kind == "gpt2":
            shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        else:
            shape |= {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
        tokens = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **tokens, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def prepared(kind: str, rules: list[Rule], **changes: Any) -> tuple[Any, Frozen]:
    """(the fake-quantized model, what is frozen of it)."""
    model = prepare(tiny(kind, **changes), rules)
    model.config.architectures = [type(model).__name__]
    return model.eval(), convert(model, tokenizer={"tokenizer_config.json": b"{}"})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of a batch, and of one, two and three tokens, for which BLAS has other routines; flat."""
    inputs = [IDS, *(IDS[:1, :n] for n in (1, 2, 3))]
    return torch.cat([model(ids).logits.flatten() for ids in inputs])
