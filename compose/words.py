"""Which text tokens of a denoiser call some words of the prompt became."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compose.errors import RequestError
from compose.sites import Layout


def token_share(pipe: Any, layout: Layout, prompt: str, words: str) -> Tensor:
    """(text tokens up to the last of `words`,): 1 where a token is part of `words`, else 0.

    Raises RequestError for words that the prompt does not hold, and for families whose text is wrapped in a chat.
    """
    if not layout.tokenizers:
        raise RequestError(
            f"words of a region cannot be placed in the text of {layout.family}; leave them out"
        )
    start = prompt.lower().find(words.lower())
    if start < 0:
        raise RequestError(f"the prompt does not hold the words '{words}' of a region")
    parts = []
    for name, before in layout.tokenizers:
        tokenizer = getattr(pipe, name, None)
        if tokenizer is not None:
            parts.append(_in_one(tokenizer, before, prompt, start, start + len(words)))
    return torch.cat(parts)


def _in_one(tokenizer: Any, before: int, prompt: str, start: int, stop: int) -> Tensor:
    first, last = (before + _count(tokenizer, prompt[:end]) for end in (start, stop))
    share = torch.zeros(tokenizer.model_max_length if before else last)
    share[first:last] = 1.0
    return share


def _count(tokenizer: Any, text: str) -> int:
    text = text.rstrip()
    return len(tokenizer(text, add_special_tokens=False).input_ids) if text else 0
