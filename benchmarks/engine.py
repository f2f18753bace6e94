"""What the composition engine costs and how exact it is: python -m benchmarks.engine [--rows id,...] [--quick].

Rivals (peft, a dense SVD, plain merging) are measured in the same run. The rows about regions draw with the bundled base
and are judged by benchmarks.judge; their verdicts are kept in results/engine_verdicts.jsonl.xz.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from benchmarks import bleeding
from benchmarks.results import RESULTS, Row, merge
from benchmarks.timing import Timing, rivals, where
from compose.adapter import Adapter, LowRank
from compose.algebra import compress, stack
from compose.engine import Composition, composed
from compose.loading import weights_in_memory
from compose.plan import Mix
from compose.policies import Merge, Switch
from tests.support import parity, tiny

LOADED = 64  # adapters; peft's users report that each one loaded makes every switch slower
RANK = 4
BURST = 200


def quick_or(quick: bool, small: int, full: int) -> int:
    return small if quick else full


# Switching a weight


def deep_flux(quick: bool) -> FluxPipeline:
    """A FLUX of the real depth (19 double and 38 single blocks) and a toy width: what counts is how many layers."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=quick_or(quick, 1, 19), num_single_layers=quick_or(quick, 1, 38), in_channels=4,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **none)


def attention_adapter(pipe: FluxPipeline, name: str, seed: int) -> Adapter:
    """Random rank-4 deltas on the layers that peft's `to_q`, `to_k`, `to_v` mean."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for path, layer in pipe.transformer.named_modules():
        if path.endswith((".to_q", ".to_k", ".to_v")):
            down = torch.randn(RANK, layer.in_features, generator=generator)
            deltas[f"transformer.{path}"] = LowRank(
                down=down, up=torch.randn(layer.out_features, RANK, generator=generator), scale=0.1
            )
    return Adapter(name=name, family="flux", deltas=deltas)


def load_peft(pipe: FluxPipeline, count: int) -> None:
    """The same layers under peft, `count` adapters loaded."""
    config = LoraConfig(r=RANK, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    with warnings.catch_warnings(
        action="ignore", category=UserWarning
    ):  # that a second adapter joins the first
        for n in range(count):
            pipe.transformer.add_adapter(config, f"a{n}")


def set_peft(pipe: FluxPipeline) -> Callable[[], None]:
    """Another weight of one adapter with each call, as diffusers' users set it."""
    weights = itertools.cycle((0.3, 0.9))
    return lambda: pipe.transformer.set_adapters(["a0"], [next(weights)])


def set_ours(composition: Composition) -> Callable[[], None]:
    """The same, `BURST` times: one switch alone is shorter than what the clock and cold caches add."""
    mixes = itertools.cycle([[Mix(weights={"a0": weight})] for weight in (0.3, 0.9)])

    def burst() -> None:
        for _ in range(BURST):
            composition.backend.apply(next(mixes))

    return burst


def settled(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The call until the device has done it; switching is the host's work, so wall time is what counts."""
    if device.type != "cuda":
        return call
    return lambda: (call(), torch.cuda.synchronize())


def measure_weight_switch(device: torch.device, quick: bool) -> Iterator[Row]:
    """Time to change one adapter's weight with 1 and with 64 adapters loaded."""
    runs, place = quick_or(quick, 3, 30), where(device)
    few, many = ours_switched(device, quick, runs)
    few_peft, many_peft = peft_switched(device, quick, runs)
    yield Row(
        id="weight_switch_64_over_1", **ratio(many, few), target=1.2, direction="min", n=runs, where=place
    )
    yield Row(
        id="weight_switch_64_over_1_peft", **ratio(many_peft, few_peft), direction="min", n=runs, where=place
    )
    for name, time, share in (
        ("weight_switch_64_ms", many, BURST),
        ("weight_switch_64_ms_peft", many_peft, 1),
    ):
        yield Row(
            id=name, value=1e3 * time.median / share, spread=1e3 * time.spread / share, unit="ms", direction="min", n=runs, where=place
        )  # fmt: skip


def ours_switched(device: torch.device, quick: bool, runs: int) -> list[Timing]:
    """Times of `BURST` switches with 1 and with many adapters attached, taken in turns."""
    with ExitStack() as opened:
        calls = {}
        for count in (1, quick_or(quick, 4, LOADED)):
            pipe = deep_flux(quick).to(device)
            adapters = [attention_adapter(pipe, f"a{n}", n) for n in range(count)]
            composition = opened.enter_context(
                Composition(pipe, adapters, Merge(weights={"a0": 1.0}), "torch")
            )
            calls[str(count)] = settled(set_ours(composition), device)
        return list(rivals(calls, runs=runs, warmup=2).values())


def peft_switched(device: torch.device, quick: bool, runs: int) -> list[Timing]:
    """Times of one switch by peft with 1 and with many adapters loaded, taken in turns."""
    calls = {}
    for count in (1, quick_or(quick, 4, LOADED)):
        pipe = deep_flux(quick).to(device)
        load_peft(pipe, count)
        calls[str(count)] = settled(set_peft(pipe), device)
    return list(rivals(calls, runs=runs, warmup=2).values())


def ratio(above: Timing, below: Timing) -> dict[str, float | str]:
    """Value, spread and unit of a quotient of two times; relative spreads add up."""
    value = above.median / below.median
    spread = value * (above.spread / above.median + below.spread / below.median)
    return {"value": value, "spread": spread, "unit": "times"}


# Squeezing


def measure_squeeze(device: torch.device, quick: bool) -> Iterator[Row]:
    """The sum of four adapters of rank 64 at 3072 x 3072 cut to rank 64, beside the dense SVD of the same matrix."""
    side, rank, runs = quick_or(quick, 256, 3072), quick_or(quick, 8, 64), quick_or(quick, 1, 3)
    total = stack([(random_delta(side, rank, seed, device), 1.0) for seed in range(4)])
    full = matrix(total)
    calls = {
        "core": lambda: compress(total, rank=rank).up.cpu(),
        "dense": lambda: torch.linalg.svd(full.float(), full_matrices=False)[1].cpu(),
    }
    found = rivals(calls, runs=runs, warmup=1)
    best = truncated(full, rank)
    off = matrix(compress(total, rank=rank)) - best
    error = float(torch.linalg.norm(off) / torch.linalg.norm(best))
    place = where(device)
    yield Row(
        id="squeeze_rel_error", value=error, unit="relative", target=1e-5, direction="min", n=1, where=place
    )
    speedup = ratio(found["dense"], found["core"])
    yield Row(id="squeeze_speedup", **speedup, target=10, direction="max", n=runs, where=place)
    for name, key in (("squeeze_s", "core"), ("squeeze_s_dense", "dense")):
        time = found[key]
        yield Row(
            id=name, value=time.median, spread=time.spread, unit="s", direction="min", n=runs, where=place
        )


def random_delta(side: int, rank: int, seed: int, device: torch.device) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, side, generator=generator), torch.randn(side, rank, generator=generator)
    return LowRank(down=down.to(device), up=up.to(device), scale=0.1)


def matrix(delta: LowRank) -> Tensor:
    """The whole delta in float64."""
    return delta.scale * (delta.up.double() @ delta.down.double())


def truncated(full: Tensor, rank: int) -> Tensor:
    """The optimal approximation of that rank (Eckart-Young), from a dense SVD in float64."""
    left, values, right = torch.linalg.svd(full, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


# Exactness


def measure_toggle(device: torch.device, quick: bool) -> Iterator[Row]:
    """Attach, compose, leave, 200 times: the weights' SHA-256 and the memory of the process stay where they were."""
    cycles, settling = quick_or(quick, 6, 200), quick_or(quick, 2, 60)
    pipe = tiny.PIPELINES["flux"](0).to(device)
    pipe.set_progress_bar_config(disable=True)
    adapters = [tiny.random_adapter(pipe, name, seed=seed) for seed, name in enumerate("ab")]
    before, backends = weights_in_memory(pipe), itertools.cycle(("torch", "fold"))
    part = max(1, cycles // 10)
    first, last = range(settling, settling + part), range(settling + cycles - part, settling + cycles)
    held: dict[int, int] = {}
    for n in range(settling + cycles):  # buffers of libraries grow during the first cycles
        with composed(pipe, adapters, Switch(weights={"a": 0.7, "b": -0.4}), next(backends)):
            tiny.image(pipe, "flux")
        if n in first or n in last:
            held[n] = memory(device)
    grown = (median(held[n] for n in last) - median(held[n] for n in first)) / 2**20
    same, place = weights_in_memory(pipe) == before, where(device)
    yield Row(
        id="toggle_200_cycles",
        value=float(same),
        unit="truth",
        target=1,
        direction="max",
        n=cycles,
        where=place,
    )
    yield Row(
        id="toggle_growth_mib", value=grown, unit="MiB", target=1, direction="min", n=cycles, where=place
    )


def memory(device: torch.device) -> int:
    """Bytes that this process holds: allocated on the card, or resident once the allocator gave back what is free."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_parity(device: torch.device, quick: bool) -> Iterator[Row]:
    """The largest relative error of any denoiser call, over policies x backends x families, in float32."""
    worst, count = 0.0, 0
    for family in parity.FAMILIES[: quick_or(quick, 1, 4)]:
        pipe = tiny.PIPELINES[family](0)
        adapters = parity.adapters_for(pipe)
        for policy, backend in itertools.product(parity.POLICIES.values(), ("torch", "fold", "peft")):
            found = parity.errors(pipe, adapters, family, policy(family), backend)
            worst, count = max(worst, *found), count + len(found)
    yield Row(id="parity_max_error", value=worst, unit="relative", target=1e-5, direction="min", n=count)


MEASURES: dict[str, tuple[Callable[[torch.device, bool], Iterator[Row]], tuple[str, ...]]] = {
    "weight switch": (
        measure_weight_switch,
        ("weight_switch_64_over_1", "weight_switch_64_over_1_peft", "weight_switch_64_ms", "weight_switch_64_ms_peft"),
    ),
    "squeeze": (measure_squeeze, ("squeeze_rel_error", "squeeze_speedup", "squeeze_s", "squeeze_s_dense")),
    "toggle": (measure_toggle, ("toggle_200_cycles", "toggle_growth_mib")),
    "parity": (measure_parity, ("parity_max_error",)),
    "regions": (bleeding.measure, bleeding.IDS),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rows asked for, print them, and (unless --quick) merge them into results/engine.csv."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="ids, comma-separated (default: all)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, nothing recorded")
    parser.add_argument("--device", help="cuda or cpu (default: the best there is)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known = [id_ for _, ids in MEASURES.values() for id_ in ids]
    wanted = set(args.rows.split(",") if args.rows else known)
    if wanted - set(known):
        parser.error(f"unknown rows {', '.join(sorted(wanted - set(known)))}; choose from {', '.join(known)}")
    for measure, ids in MEASURES.values():
        if not wanted & set(ids):
            continue
        rows = list(measure(device, args.quick))
        for row in rows:
            print(f"{row.id}: {row.value:.4g} {row.unit} (target {row.target})", flush=True)
        if not args.quick:
            merge(rows, "engine", args.out)


if __name__ == "__main__":
    main()
