"""What a model source hands to the pipeline."""

from typing import Any, NamedTuple, Protocol

from torch import nn


class Loaded(NamedTuple):
    """A float model, its tokenizer (None where inputs are not text) and the name that reports use."""

    model: nn.Module
    tokenizer: Any
    name: str


class Source(Protocol):
    """`model=` in a recipe: cheap to build, so that a typo is found early; `load` does the work."""

    def load(self, data: Any) -> Loaded:
        """Load or build the model; `data` is the run's data module, for sources that learn a tokenizer from it."""
        ...
