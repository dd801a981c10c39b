"""A small Llama with random weights, read with the embedded models' tokenizer."""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from qat.models.load import Loaded, load


class FromScratch:
    """Llama with random weights and tied embeddings; its tokenizer is that of gpt2_mini."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        max_position_embeddings: int,
    ) -> None:
        self.shape: dict[str, Any] = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "max_position_embeddings": max_position_embeddings,
        }

    def load(self, data: Any = None) -> Loaded:
        """The model, deterministic given torch's seed, and its tokenizer; `data` is of no use here."""
        tokenizer = load(None, name="gpt2_mini").tokenizer
        end: Any = tokenizer.eos_token_id
        config = LlamaConfig(
            vocab_size=len(tokenizer), **self.shape, bos_token_id=end, eos_token_id=end, tie_word_embeddings=True
        )
        return Loaded(model=LlamaForCausalLM(config), tokenizer=tokenizer, source="llama_scratch", fallback=None)
