"""Draws a set of adapters under one variant, and measures what that costs."""

from __future__ import annotations

import functools
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
from compose.backends import Budget
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
CACHED = 8 * 2**30  # bytes of kept features: hundreds of pictures at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Pictures (n, 3, height, width) in [0, 1] on the CPU and their cost. `seconds`: per picture, without the VAE;
    `skipped`: share of denoiser blocks in [0, 1]; `memory`: MiB above what was held before, at the peak (0 on a CPU);
    `chose`: what `auto` picked, empty for the others. Sets drawn together have no time and no memory of their own."""

    pictures: Tensor
    seconds: float | None
    skipped: float
    memory: float | None
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

    @cached_property
    def _encode(self) -> Callable[[str], list[float]]:
        return functools.cache(lambda text: self.clip.text([text])[0].tolist())

    def _context(self, case: Case, variant: Variant) -> Context:
        """What the variant's policy may know of this set."""
        known = case.elements if variant.caches else ()
        return Context(
            prompts=[case.prompt],
            triggers={element.name: element.trigger for element in case.elements},
            encode=self._encode,
            profiles={element.name: self.profile(element) for element in known},
        )

    def policy(self, case: Case, variant: Variant) -> Policy:
        """The variant's policy for this set, prepared."""
        made = variant.make({element.name: 1.0 for element in case.elements}, case)
        return made.prepare(self._context(case, variant))

    @contextmanager
    def composed(
        self, cases: Sequence[Case], variant: Variant, rows: int = 1, backend: str = "auto"
    ) -> Iterator[tuple[Composition, FeatureCache | None]]:
        """The pipeline under the variant's policies, one for each set, and their cache. Up to `rows` may differ."""
        elements = {element.name: element for case in cases for element in case.elements}
        adapters = [self.adapter(element) for element in elements.values()]
        policies = [self.policy(case, variant) for case in cases]
        cache = FeatureCache(limit=CACHED) if variant.caches else None
        with Composition(
            self.pipe, adapters, policies if len(cases) > 1 else policies[0], backend,
            cache=cache, shared=variant.shared, budget=Budget(rows=max(Budget().rows, rows)),
        ) as composition:  # fmt: skip
            yield composition, cache

    def draw(self, case: Case, variant: Variant, seeds: Sequence[int], *, steps: int | None = None) -> Drawn:
        """One picture per seed, in one batch: as the product draws it, and timed. `steps` None means the studio's."""
        with self.composed([case], variant) as (composition, cache):
            (pictures, seconds), memory = self._peak(lambda: self._timed(case.prompt, seeds, steps))
        return Drawn(
            pictures=pictures,
            seconds=seconds / len(seeds),
            skipped=_skipped(cache),
            memory=memory,
            chose=self._choice(composition.policies[0]),
        )

    def draw_together(self, cases: Sequence[Case], variant: Variant, seeds: Sequence[int]) -> list[Drawn]:
        """The pictures of several sets of one size in one batch, every row under its own set's policy; not timed. Plain
        torch carries any number of rows that differ."""
        prompts = [
            case.prompt for _ in seeds for case in cases
        ]  # the n-th row belongs to picture n % len(cases)
        each = [seed for seed in seeds for _ in cases]
        branches = max(len(case.elements) for case in cases) if variant.shared else 1
        with self.composed(cases, variant, len(prompts) * branches, "torch") as (composition, cache):
            pictures = self._pictures(prompts, each, "pt").float().cpu()
        own = pictures.unflatten(0, (len(seeds), len(cases))).unbind(1)
        return [
            Drawn(pictures=own[n], seconds=None, skipped=_skipped(cache), memory=None, chose=self._choice(policy))
            for n, policy in enumerate(composition.policies)
        ]  # fmt: skip

    def _choice(self, policy: Policy) -> str:
        return policy.choice(self.steps)[0] if isinstance(policy, Auto) else ""

    def flops(self, case: Case, variant: Variant) -> float:
        """Floating-point operations of one picture, without the VAE; those of our own kernels are counted in torch."""
        with self.composed([case], variant) as (composition, _):
            chosen = composition.backend_name
        backend = "torch" if chosen == "triton" else chosen
        with (
            self.composed([case], variant, backend=backend),
            FlopCounterMode(display=False) as counter,
        ):
            self._pictures([case.prompt], [0], "latent")
        return float(counter.get_total_flops())

    def _timed(self, prompt: str, seeds: Sequence[int], steps: int | None) -> tuple[Tensor, float]:
        decoding = Stopwatch(self.device)
        whole = Stopwatch(self.device)
        with rerouted({self.pipe.vae.decoder: lambda own, args, kwargs: decoding(own, *args, **kwargs)}):
            pictures = whole(self._pictures, [prompt] * len(seeds), seeds, "pt", steps)
        return pictures.float().cpu(), whole.seconds - decoding.seconds

    def _pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], output: str, steps: int | None = None
    ) -> Tensor:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        call = self.call("-") | {"prompt": list(prompts), "num_inference_steps": steps or self.steps}
        return self.pipe(**call, generator=generators, output_type=output).images

    def _peak(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """(what `work` gives, peak MiB on the card above what it held before)."""
        if self.device.type != "cuda":
            return work(), 0.0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = work()
        return result, (torch.cuda.max_memory_allocated(self.device) - before) / MIB


def _skipped(cache: FeatureCache | None) -> float:
    return 0.0 if cache is None else cache.counts.skipped_share


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
