"""A torchao folder compiled for ExecuTorch's XNNPACK backend: run by exporters/executorch.py in that environment.

The program: forward(ids int64 [1, T], positions int64 [T]) -> float32 logits [1, T, V], T up to CHUNK, and a KV cache
that it keeps between calls; every quantized linear is XNNPACK's own (int8 tokens, int4 weights).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 128  # tokens a call: memory for their logits is planned ahead


class Decoder(nn.Module):
    """A transformers decoder over a static cache whose tensors are this module's buffers."""

    def __init__(self, model: Any, room: int) -> None:
        from transformers.cache_utils import StaticCache

        super().__init__()
        config = model.config
        self.model = model
        self.cache: Any = StaticCache(max_cache_len=room, config=config)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(1, config.num_key_value_heads, size, torch.float32, torch.device("cpu"))
        for i, layer in enumerate(self.cache.layers):
            self.register_buffer(f"keys_{i}", layer.keys, persistent=False)
            self.register_buffer(f"values_{i}", layer.values, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        for i, layer in enumerate(self.cache.layers):  # tracing sees buffers only as attributes of a module
            layer.keys, layer.values = getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")
            layer.cumulative_length = positions[0].clone()
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits


def lower(source: Path, out: Path, room: int) -> None:
    """Compile the folder `source` into the file `out`, with a cache of `room` tokens.

    Raises RuntimeError if a quantized linear was left to other kernels, which round otherwise.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
    from torchao.utils import unwrap_tensor_subclass
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", dtype=torch.float32).eval()
    model.requires_grad_(False)
    unwrap_tensor_subclass(model)
    vocabulary = model.config.vocab_size
    example = torch.zeros(1, 3, dtype=torch.int64), torch.arange(3)
    some = torch.export.Dim("tokens", min=1, max=min(CHUNK, room))
    with torch.no_grad():
        program = torch.export.export(
            Decoder(model, room).eval(), example, dynamic_shapes=({1: some}, {0: some}), strict=False
        )
    # what ExecuTorch's own runners ask a program for
    about = {"get_max_context_len": room, "get_max_seq_len": min(CHUNK, room), "get_vocab_size": vocabulary}
    about |= {"use_kv_cache": True, "enable_dynamic_shape": True}
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=about)
    calls = {str(n.target) for n in edge.exported_program().graph.nodes if n.op == "call_function"}
    left = sorted(c for c in calls if any(word in c for word in ("quantize_", "qparams", "linear", "addmm", "aten.mm")))
    if left:
        raise RuntimeError(f"XNNPACK did not take {left[0].split('>')[0]}")
    with out.open("wb") as f:
        edge.to_executorch().write_to_file(f)


if __name__ == "__main__":
    lower(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
