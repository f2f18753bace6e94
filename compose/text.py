"""Text of branches: a prompt is encoded once per distinct wording and mix of text-encoder deltas, and each row of a
denoiser call gets the encoding that its branch asks for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compose.errors import BackendError, RequestError
from compose.plan import Mix
from compose.sites import Layout
from compose.words import token_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a branch has its prompt encoded: under which deltas, and in which words (None: as it was given)."""

    mix: Mix
    prompt: str | None = None

    def key(self) -> Hashable:
        return (self.mix.key(), self.prompt)


class Encoded:
    """One call of `encode_prompt` and what it returned for each reading asked for so far."""

    def __init__(self, run: Callable[[Reading], Any]) -> None:
        self._run = run
        self._outputs: dict[Hashable, tuple[Any, ...]] = {}

    def under(self, reading: Reading) -> tuple[Any, ...]:
        key = reading.key()
        if key not in self._outputs:
            self._outputs[key] = self._run(reading)
        return self._outputs[key]


class Texts:
    """The encodings of the current request.

    `encode` is called in place of the pipeline's `encode_prompt`; `swap` puts other encodings into a denoiser call.
    Which prompt a row belongs to is told by its content, so every pipeline's way of joining them will do.
    """

    def __init__(self) -> None:
        self._calls: list[Encoded] = []
        self._used = False
        self.prompt: str | Sequence[str] | None = None  # of the first encoding: that of the picture itself
        self._found: dict[tuple[int, int], tuple[Any, tuple[int, int, int]]] = {}

    def encode(
        self, run: Callable[[Reading], Any], reading: Reading, prompt: str | Sequence[str] | None
    ) -> Any:
        if self._used:
            self._calls, self._found, self._used = [], {}, False
            self.prompt = None
        self._calls.append(Encoded(run))
        self.prompt = self.prompt or prompt
        self._base = reading
        return self._calls[-1].under(reading)

    def use(self) -> None:
        """A denoiser runs: what is encoded from now on belongs to the next picture."""
        self._used = True

    def is_first(self) -> bool:
        """Whether the next call of `encode_prompt` is the first of its picture: that of the prompt itself."""
        return self._used or not self._calls

    def share_of(self, pipe: Any, layout: Layout, words: str) -> Tensor:
        """(text tokens,): which of them `words` of the prompt became; all prompts of the call must agree."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or ())
        shares = [token_share(pipe, layout, prompt, words) for prompt in dict.fromkeys(prompts)]
        if not shares or any(not torch.equal(share, shares[0]) for share in shares):
            raise RequestError(
                f"the words '{words}' of a region need one prompt, the same for all pictures of a call"
            )
        return shares[0]

    def swap(self, value: Any, readings: Sequence[Reading | None]) -> Any:
        """`value` (a tensor of rows, a list of them, or a dict of tensors) with row n as readings[n] has it encoded, or
        as it is where that is None."""
        if not self._calls or all(each is None or each.key() == self._base.key() for each in readings):
            return value
        if isinstance(value, Mapping):
            return {key: self._in_dict(item, readings) for key, item in value.items()}
        rows = [value[n] if each is None else self._row(value, n, each) for n, each in enumerate(readings)]
        return torch.stack(rows) if isinstance(value, Tensor) else rows

    def _in_dict(self, value: Any, readings: Sequence[Reading | None]) -> Any:
        known = (
            isinstance(value, Tensor) and value.shape[0] == len(readings) and self._find(value, 0) is not None
        )
        return self.swap(value, readings) if known else value

    def _row(self, value: Any, row: int, reading: Reading) -> Tensor:
        place = self._find(value, row)
        if place is None:
            raise BackendError(
                "the text in a denoiser call is not what encode_prompt returned, so adapters of the text encoder "
                "and regions cannot act on it; give the prompt as words, or leave those out"
            )
        call, output, n = place
        found = self._calls[call].under(reading)[output][n]
        return found.to(device=value[row].device, dtype=value[row].dtype)

    def _find(self, value: Any, row: int) -> tuple[int, int, int] | None:
        """(call, output, row) of the encoding that equals this row; remembered while the same object comes again."""
        key = (id(value) if isinstance(value, Tensor) else id(value[row]), row)
        if key not in self._found:
            self._found[key] = (value, self._search(value[row]))
        return self._found[key][1]

    def _search(self, wanted: Tensor) -> tuple[int, int, int] | None:
        for place, held in self._held():
            if held.shape == wanted.shape and torch.equal(held.to(wanted), wanted):
                return place
        return None

    def _held(self) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
        for c, call in enumerate(self._calls):
            for o, output in enumerate(call.under(self._base)):
                if isinstance(output, (Tensor, list)):
                    yield from (
                        ((c, o, n), held) for n, held in enumerate(output) if isinstance(held, Tensor)
                    )


def reworded(args: tuple, kwargs: dict, prompt: str) -> tuple[tuple, dict]:
    """The arguments of an `encode_prompt` with this prompt for every picture, in all text encoders."""
    first = args[0] if args else kwargs.get("prompt")
    said = prompt if isinstance(first, str) else [prompt] * len(first)
    others = {name: None for name in ("prompt_2", "prompt_3") if kwargs.get(name) is not None}
    if args:
        return (said, *args[1:]), {**kwargs, **others}
    return args, {**kwargs, **others, "prompt": said}
