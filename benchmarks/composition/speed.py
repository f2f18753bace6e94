"""The rows that need no trained adapter: time at the shape of FLUX.1-dev, shared base work, and that off is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from benchmarks.composition.studio import Stopwatch
from benchmarks.results import Row
from benchmarks.timing import Timing, summary, where
from compose.adapter import Adapter, LowRank
from compose.cache import FeatureCache
from compose.engine import Composition
from compose.plan import Policy
from compose.policies import Cached, Composite, Merge

COUNT = 4  # adapters
RANK = 16
LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0")
IDS = (
    "cached_over_base_time", "cached_dense_over_base_time", "cached_renewed_over_base_time", "composite_over_base_time", "cached_over_composite_time_flux",
    "shared_base_error", "shared_base_over_composite_time", "shared_base_approximate_error",
    "shared_base_approximate_over_composite_time", "cache_off_identical", "cache_peak_mib",
)  # fmt: skip


def flux(device: torch.device, small: bool) -> FluxPipeline:
    """FLUX.1-dev's transformer with random weights (12 billion, bf16), or a toy of the same build in float32."""
    shape = (
        {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 16,
         "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
        if small
        else {"guidance_embeds": True}
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
        try:
            transformer = FluxTransformer2DModel(**({"guidance_embeds": True} | shape))
        finally:
            torch.set_default_dtype(before)
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler=scheduler, transformer=transformer.eval().requires_grad_(False), **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapters(pipe: FluxPipeline, count: int = COUNT) -> list[Adapter]:
    """Random rank-16 deltas of a tenth of the weights' size on every attention projection."""
    return [_adapter(pipe, f"a{n}", n) for n in range(count)]


def _adapter(pipe: FluxPipeline, name: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for path, layer in pipe.transformer.named_modules():
        if path.endswith(LAYERS):
            down = torch.randn(RANK, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, RANK, generator=generator)
            scale = 0.1 * float(layer.weight.float().std()) / RANK**0.5
            deltas[f"transformer.{path}"] = LowRank(down=down, up=up, scale=scale)
    return Adapter(name=name, family="flux", deltas=deltas)


def drawing(
    pipe: FluxPipeline, device: torch.device, side: int, text: int, steps: int
) -> Callable[[], Tensor]:
    """One picture from fixed noise and fixed text, as latents."""
    config = pipe.transformer.config
    like = {"dtype": pipe.transformer.dtype, "device": device}
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, text, config.joint_attention_dim, generator=generator).to(**like)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=generator).to(**like)
    latents = torch.randn(1, (side // 16) ** 2, config.in_channels, generator=generator).to(**like)

    def draw() -> Tensor:
        return pipe(
            prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=latents, height=side, width=side,
            num_inference_steps=steps, guidance_scale=3.5, output_type="latent",
        ).images  # fmt: skip

    return draw


def weights(found: list[Adapter]) -> dict[str, float]:
    return {adapter.name: 1.0 for adapter in found}


def measure(device: torch.device, quick: bool) -> Iterator[Row]:
    """All rows of this module. Times at FLUX.1-dev's shape need a card with 40 GB and are left out without one;
    `quick` times a toy instead."""
    if quick or _has_room(device):
        yield from _times(device, quick, runs=2 if quick else 3)
    yield from _shared(device, quick)
    yield _off_identical(device)


def _has_room(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= 40 * 2**30


def _times(device: torch.device, small: bool, runs: int) -> Iterator[Row]:
    pipe, cache = flux(device, small), FeatureCache()
    found = adapters(pipe)
    mine = weights(found)
    ways: dict[str, tuple[Policy, FeatureCache | None]] = {
        "cached": (Cached(weights=mine), cache),
        "cached_dense": (Cached(weights=mine, intervals=1), FeatureCache()),
        "cached_renewed": (Cached(weights=mine, renew=5), FeatureCache()),
        "composite": (Composite(weights=mine), None),
    }

    def calls(steps: int) -> dict[str, Timed]:
        draw = drawing(pipe, device, *((64, 8) if small else (1024, 512)), steps)
        made = {"base": _plainly(draw, device)}
        return made | {name: _under(pipe, found, *way, draw) for name, way in ways.items()}

    taken = in_turns(calls(8 if small else 28), runs, calls(2))
    place = where(device) + (" toy" if small else "")
    target = None if small else 1.5
    yield _ratio("cached_over_base_time", taken, "cached", "base", place, target)
    yield _ratio("cached_dense_over_base_time", taken, "cached_dense", "base", place, None)
    yield _ratio("cached_renewed_over_base_time", taken, "cached_renewed", "base", place, None)
    yield _ratio("composite_over_base_time", taken, "composite", "base", place, None)
    yield _ratio("cached_over_composite_time_flux", taken, "cached", "composite", place, None)
    yield Row(id="cache_peak_mib", value=cache.peak / 2**20, unit="MiB", direction="min", n=1, where=place)


Timed = Callable[[], tuple[Tensor, float]]


def in_turns(calls: Mapping[str, Timed], runs: int, brief: Mapping[str, Timed]) -> dict[str, Timing]:
    """Seconds of each, `runs` times in turns after one round of the `brief` ones, which is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in brief.values():
        call()
    for _ in range(runs):
        for name, call in calls.items():
            taken[name].append(call()[1])
            print(f"{name}: {taken[name][-1]:.3f} s", flush=True)
    return {name: summary(times) for name, times in taken.items()}


def _plainly(draw: Callable[[], Tensor], device: torch.device) -> Timed:
    """(picture, seconds) of the base alone."""

    def work() -> tuple[Tensor, float]:
        watch = Stopwatch(device)
        return watch(draw), watch.seconds

    return work


def _under(
    pipe: FluxPipeline,
    found: list[Adapter],
    policy: Policy,
    cache: FeatureCache | None,
    draw: Callable[[], Tensor],
    shared: str | None = None,
) -> Timed:
    """(picture, seconds) under a policy; attaching comes before and is not counted."""
    work = _plainly(draw, pipe.transformer.device)

    def composed() -> tuple[Tensor, float]:
        with Composition(pipe, found, policy, "torch", cache=cache, shared=shared):
            return work()

    return composed


def _ratio(
    id_: str, taken: dict[str, Timing], ours: str, theirs: str, place: str, target: float | None
) -> Row:
    value = taken[ours].median / taken[theirs].median
    spread = value * (taken[ours].spread / taken[ours].median + taken[theirs].spread / taken[theirs].median)
    return Row(
        id=id_, value=value, spread=spread, unit="x", target=target, direction="min", n=taken[ours].n, where=place
    )  # fmt: skip


def _shared(device: torch.device, small: bool) -> Iterator[Row]:
    """Exact and approximate sharing against plain composite, in float32, adapters on the single blocks' second half:
    the share that is equal for all branches depends on where adapters act, and that is said in docs/caching.md."""
    pipe = flux(device, True) if small else _deep(device)
    large = (512, 128, 8) if device.type == "cuda" else (128, 32, 2)
    draw = drawing(pipe, device, *((64, 8, 2) if small else large))
    found = [_late(pipe, adapter) for adapter in adapters(pipe)]
    policy = Composite(weights=weights(found))
    calls = {
        mode or "plain": _under(pipe, found, policy, None, draw, mode)
        for mode in (None, "exact", "approximate")
    }
    wanted = calls["plain"]()[0]
    errors = {mode: _error(calls[mode]()[0], wanted) for mode in ("exact", "approximate")}
    taken = in_turns(calls, 5, calls)
    place = where(device) + (" toy" if small else "")
    yield Row(
        id="shared_base_error",
        value=errors["exact"],
        unit="relative",
        target=1e-5,
        direction="min",
        n=1,
        where=place,
    )
    yield _ratio("shared_base_over_composite_time", taken, "exact", "plain", place, None if small else 1.0)
    yield Row(
        id="shared_base_approximate_error",
        value=errors["approximate"],
        unit="relative",
        direction="min",
        n=1,
        where=place,
    )
    yield _ratio("shared_base_approximate_over_composite_time", taken, "approximate", "plain", place, None)


def _deep(device: torch.device) -> FluxPipeline:
    """FLUX's full depth at a third of its width (on a CPU a twelfth): float32 fits, and its rounding is measured."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = FluxTransformer2DModel(
            num_attention_heads=8 if device.type == "cuda" else 2,
            joint_attention_dim=1024,
            pooled_projection_dim=256,
            guidance_embeds=True,
        )
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler=scheduler, transformer=transformer.eval().requires_grad_(False), **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _late(pipe: FluxPipeline, adapter: Adapter) -> Adapter:
    """The adapter's deltas in the second half of the single blocks, where style adapters mostly act."""
    half = len(pipe.transformer.single_transformer_blocks) // 2
    names = tuple(f"transformer.single_transformer_blocks.{n}." for n in range(half, 2 * half + 1))
    kept = {site: delta for site, delta in adapter.deltas.items() if site.startswith(names)}
    return Adapter(name=adapter.name, family=adapter.family, deltas=kept)


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def _off_identical(device: torch.device) -> Row:
    """Whether a cache that keeps nothing draws the bits that no cache draws, for merge and composite."""
    pipe = flux(device, True)
    draw = drawing(pipe, device, 64, 8, 6)
    found = adapters(pipe)
    mine, same = weights(found), []
    for policy in (Merge(weights=mine), Composite(weights=mine)):
        plain = _under(pipe, found, policy, None, draw)()[0]
        for cache in (FeatureCache(), FeatureCache(limit=0)):
            same.append(torch.equal(plain, _under(pipe, found, policy, cache, draw)()[0]))
    return Row(
        id="cache_off_identical", value=float(all(same)), unit="truth", target=1, direction="max", n=len(same), where=where(device)
    )  # fmt: skip
