"""A small GPT-2 from nothing: its byte-level BPE is trained on the training split, its weights are random."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from qat.data.base import TokenData
from qat.models.load import Loaded

END = "<|endoftext|>"


class FromScratch:
    """GPT-2 with random weights and a tokenizer of `vocab_size` entries learned from the data's training split."""

    def __init__(
        self, *, vocab_size: int, n_embd: int, n_layer: int, n_head: int, n_positions: int, dropout: float
    ) -> None:
        self.vocab_size = vocab_size
        self.shape: dict[str, Any] = {
            "n_embd": n_embd,
            "n_layer": n_layer,
            "n_head": n_head,
            "n_positions": n_positions,
        }
        self.dropout = dropout

    def load(self, data: TokenData) -> Loaded:
        """Tokenizer, then the model; deterministic given torch's seed and the data."""
        tokenizer = train_tokenizer(data.rows("train")[data.text_column], self.vocab_size)
        tokenizer.model_max_length = self.shape["n_positions"]
        end: Any = tokenizer.eos_token_id
        config = GPT2Config(
            vocab_size=len(tokenizer),
            **self.shape,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=end,
            eos_token_id=end,
            tie_word_embeddings=True,
            use_cache=False,
        )
        return Loaded(model=GPT2LMHeadModel(config), tokenizer=tokenizer, source="gpt2_scratch", fallback=None)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> GPT2Tokenizer:
    """GPT-2's kind of tokenizer (byte-level BPE, its pre-tokenizer, no added prefix space) over these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return GPT2Tokenizer(tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END)
