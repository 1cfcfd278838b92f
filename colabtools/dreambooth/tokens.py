"""How much of a prompt a base model's text encoder reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colabtools import registry

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["TOKEN_LIMIT", "count_tokens"]

# What CLIP's text encoders read, the tokens for start and end included.
# Source: `max_position_embeddings` of every Stable Diffusion's text encoder.
TOKEN_LIMIT = 77


def count_tokens(base_model: str, prompts: Iterable[str]) -> dict[str, int]:
    """Return how many tokens each prompt has for CLIP, those for its start and end included.

    Nothing is fetched: where the base model's tokenizer is not on this machine yet, or is none of
    CLIP's, nothing is counted.

    Raises:
        ModelError: the base model is not known.
    """
    base = registry.find_base(base_model)
    if base.family == "flux":
        return {}
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            base.source, subfolder="tokenizer", local_files_only=True
        )
    except (OSError, ValueError, TypeError):
        return {}
    return {
        prompt: len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        for prompt in prompts
    }
