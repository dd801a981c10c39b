"""The tokenizer of a run, a frozen folder or an export."""

from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.models.load import read_tokenizer


def load_tokenizer(path: Path) -> Any:
    """A transformers tokenizer for whatever `path` is. Raises UserError if there is none beside it.

    An export inside a run folder that has no Hugging Face tokenizer of its own (GGUF) uses the run's.
    """
    folder = path if path.is_dir() else path.parent
    places = [
        folder / "frozen" / "tokenizer",
        folder / "tokenizer",
        folder,
        folder.parent.parent / "frozen" / "tokenizer",
    ]
    for place in places:
        if (place / "tokenizer.json").is_file() or (place / "tokenizer_config.json").is_file():
            return read_tokenizer(place, str(place), False)
    raise UserError(f"there is no tokenizer beside {path}; give the run folder, or put its tokenizer.json next to it")
