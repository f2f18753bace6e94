"""Progress bars on stderr for the stages that a pipeline reports, and silence for the libraries below."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Bars:
    """The progress report of `compose.pipeline` as one tqdm bar per stage; leave the context to close the last."""

    def __init__(self, off: bool = False) -> None:
        self.off = off
        self._bar: tqdm | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.desc.strip(": ") != stage:
            self.close()
            self._bar = tqdm(
                total=total,
                desc=stage,
                disable=self.off,
                bar_format="{desc:<10} {bar:24} {n_fmt}/{total_fmt} {elapsed}",
            )
        self._bar.total = total
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def quiet_libraries() -> None:
    """Keep diffusers and transformers from writing bars and advice between ours; errors still come through."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
