"""How many tokens a language model has positions for: beyond them it crashes, or computes nonsense."""

from typing import Any

from qat.errors import UserError


def refuse_longer(what: str, tokens: int, config: dict[str, Any]) -> None:
    """Raise UserError if `tokens`, the setting or text `what`, is more than the positions in the model's config."""
    longest = config.get("n_positions") or config.get("max_position_embeddings") or tokens
    if tokens > longest:
        raise UserError(f"{what}: {tokens} tokens are more than the {longest} positions of this model; use fewer")
