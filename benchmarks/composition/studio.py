"""Draws a set of adapters under one variant, and measures what that costs."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.composition.testbed import Case, Element
from benchmarks.composition.variants import Variant
from compose import bases, loading
from compose.adapter import Adapter
from compose.cache import FeatureCache
from compose.digest import write_atomic
from compose.engine import Composition
from compose.errors import AdapterError
from compose.formats import load
from compose.plan import Context, Policy
from compose.policies import Auto
from compose.profile import Profile
from compose.request import Request
from compose.retrieval.profile import STEPS, measure
from compose.routes import rerouted

if TYPE_CHECKING:  # its index needs FAISS, which drawing does not
    from compose.retrieval.index import Encoder

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Pictures (n, 3, height, width) in [0, 1] on the CPU and their cost. `seconds`: per picture, without the VAE;
    `skipped`: share of denoiser blocks in [0, 1]; `memory`: MiB above what was held before, at the peak (0 on a CPU);
    `chose`: what `auto` picked, empty for the others."""

    pictures: Tensor
    seconds: float
    skipped: float
    memory: float
    chose: str = ""


class Studio:
    """A base, the text side of a CLIP, and the adapters that were needed so far.

    `steps` and `side` (pixels) None mean the base's own. `folder` keeps measured profiles from run to run.
    """

    def __init__(
        self,
        base: str,
        clip: Encoder,
        device: torch.device,
        folder: Path,
        *,
        steps: int | None = None,
        side: int | None = None,
    ) -> None:
        self.source, self.clip, self.device = loading.find(base), clip, device
        asked = Request(prompt="-", base=base, steps=steps, width=side, height=side, seed=0)
        kind = self.source.kind
        self._filled = Request(**{**asked.to_json(), **bases.fill(kind, "text", asked), "strength": None})
        self._adapters: dict[str, Adapter] = {}
        self._profiles = folder / "profiles.json"

    @cached_property
    def pipe(self) -> Any:
        kind = self.source.kind
        pipe = loading.open_pipeline(self.source, loading.choose_dtype(None, self.device, kind))
        pipe.set_progress_bar_config(disable=True)
        loading.place(pipe, self.device, "none")
        return pipe

    @property
    def steps(self) -> int:
        return self._filled.steps

    def call(self, prompt: str) -> dict[str, Any]:
        """Arguments of one call of the pipeline, as the product makes them."""
        accepted = inspect.signature(self.pipe.__call__).parameters
        return bases.call_args(self.source.kind, self._filled, prompt, accepted)

    def adapter(self, element: Element) -> Adapter:
        if element.name not in self._adapters:
            self._adapters[element.name] = load(element.path, name=element.name)
        return self._adapters[element.name]

    def profile(self, element: Element) -> Profile | None:
        """The card's profile, or the one measured here on an earlier run or now; None where it cannot be measured."""
        if element.profile is not None:
            return element.profile
        known = json.loads(self._profiles.read_text()) if self._profiles.exists() else {}
        key = f"{element.name} {self.source.sha256[:12]}"
        if key not in known:
            known[key] = self._measured(element)
            self._profiles.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._profiles, json.dumps(known, indent=1).encode())
        return Profile.from_text(known[key]) if known[key] else None

    def _measured(self, element: Element) -> str:
        try:
            steps = min(STEPS, self.steps)
            return measure(
                self.pipe, self.adapter(element), self.call(element.trigger), steps=steps
            ).to_text()
        except AdapterError:
            return ""

    @contextmanager
    def composed(self, case: Case, variant: Variant) -> Iterator[tuple[Policy, FeatureCache | None]]:
        """The pipeline under the variant's policy for this set: the policy as prepared, and its cache."""
        weights = {element.name: 1.0 for element in case.elements}
        context = Context(
            prompts=[case.prompt],
            triggers={element.name: element.trigger for element in case.elements},
            encode=lambda text: self.clip.text([text])[0].tolist(),
            profiles={element.name: self.profile(element) for element in case.elements}
            if variant.caches
            else {},
        )
        adapters = [self.adapter(element) for element in case.elements]
        policy = variant.make(weights, case)
        cache = FeatureCache() if variant.caches else None
        with Composition(
            self.pipe, adapters, policy, "auto", context=context, cache=cache, shared=variant.shared
        ) as composition:
            yield composition.policies[0], cache

    def draw(self, case: Case, variant: Variant, seeds: Sequence[int]) -> Drawn:
        """One picture per seed, in one batch."""
        with self.composed(case, variant) as (policy, cache):
            (pictures, seconds), memory = self._peak(lambda: self._timed(case.prompt, seeds))
        return Drawn(
            pictures=pictures,
            seconds=seconds / len(seeds),
            skipped=0.0 if cache is None else cache.counts.skipped_share,
            memory=memory,
            chose=policy.choice(self.steps)[0] if isinstance(policy, Auto) else "",
        )

    def flops(self, case: Case, variant: Variant) -> float:
        """Floating-point operations of one picture, without the VAE."""
        with self.composed(case, variant), FlopCounterMode(display=False) as counter:
            self._pictures(case.prompt, [0], "latent")
        return float(counter.get_total_flops())

    def _timed(self, prompt: str, seeds: Sequence[int]) -> tuple[Tensor, float]:
        decoding = Stopwatch(self.device)
        whole = Stopwatch(self.device)
        with rerouted({self.pipe.vae.decoder: lambda own, args, kwargs: decoding(own, *args, **kwargs)}):
            pictures = whole(self._pictures, prompt, seeds, "pt")
        return pictures.float().cpu(), whole.seconds - decoding.seconds

    def _pictures(self, prompt: str, seeds: Sequence[int], output: str) -> Tensor:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return self.pipe(
            **self.call(prompt), num_images_per_prompt=len(seeds), generator=generators, output_type=output
        ).images

    def _peak(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """(what `work` gives, peak MiB on the card above what it held before)."""
        if self.device.type != "cuda":
            return work(), 0.0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = work()
        return result, (torch.cuda.max_memory_allocated(self.device) - before) / MIB


class Stopwatch:
    """Adds up the seconds of the calls made through it; waits for the device before and after."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __call__(self, work: Callable[..., Any], *args: Any, **kwargs: Mapping[str, Any]) -> Any:
        self._wait()
        begun = time.perf_counter()
        result = work(*args, **kwargs)
        self._wait()
        self.seconds += time.perf_counter() - begun
        return result
