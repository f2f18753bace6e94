"""What sparse adapters cost and save: python -m benchmarks.shira [--rows id,...] [--quick].

Rivals (peft's LoRA and SHiRA) are measured in the same run, in turns. Rows about FLUX.1 need a GPU and are left out
without one; the judged rows (benchmarks.fused) draw with the bundled base and the starter adapters.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import itertools
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLora
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks import fused
from benchmarks.results import Row, merge
from benchmarks.timing import Timing, measure, rivals, where
from compose.adapter import Adapter, LowRank, Sparse
from compose.backends import BACKENDS, Job
from compose.engine import Composition, composed
from compose.formats import save
from compose.formats.sparse import HEADER, header
from compose.plan import Mix
from compose.policies import Merge
from compose.sites import Site, Sites, weight_shape
from compose.sparse import Recipe
from compose.training.lora import KERNELS
from compose.training.shira import SparseLinear
from tests.support import tiny

PERCENT = 1.0
RANK = 64  # of the LoRAs that the paper's switching times are compared with
GIB = 2**30


def random_sparse(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    device: torch.device,
    percent: float = PERCENT,
) -> Adapter:
    """A random mask with random bf16 values at every site."""
    recipe, deltas = Recipe(mask="random", percent=percent, seed=seed), {}
    for site, shape in shapes.items():
        index = recipe.draw(site, shape, device)
        value = torch.randn(index.numel(), device=device, dtype=torch.bfloat16) * 0.01
        deltas[site] = Sparse(index=index, value=value, shape=shape)
    return Adapter(name=name, family="", deltas=deltas)


def switching(
    layers: Mapping[str, nn.Module], device: torch.device, percent: float = PERCENT
) -> Callable[[], None]:
    """Each call goes on to the other of two sparse adapters, weighted, its originals kept."""
    shapes = {name: weight_shape(layer) for name, layer in layers.items()}
    sites = Sites(
        Site(name=name, component="net", module=layer, shape=shapes[name], group=name)
        for name, layer in layers.items()
    )
    backend = BACKENDS["fold"]()
    adapters = [random_sparse(name, shapes, seed, device, percent) for seed, name in enumerate("ab")]
    backend.attach(Job(sites=sites, adapters=adapters, roots=list(layers.values()), device=device))
    mixes = itertools.cycle([[Mix(weights={name: 0.7})] for name in "ab"])
    return lambda: backend.apply(next(mixes))


# Switching on a CPU


@contextmanager
def one_thread() -> Iterator[None]:
    """Both rivals on one thread: on a busy machine, several wait for each other longer than a switch takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_tensor(device: torch.device, quick: bool) -> Iterator[Row]:
    """One adapter to another in one weight, beside folding a LoRA in by one product that adds in place.

    The rival is the fastest way that torch has. Two usual ones, which build the delta first, are given beside it: the
    product added to the weight, and peft's own.
    """
    side, runs = (256, 3) if quick else (4096, 30)
    layer = nn.Linear(side, side, bias=False).requires_grad_(False)
    up, down = torch.randn(side, RANK), torch.randn(RANK, side)
    folded = layer.weight.detach().clone()
    peft = PeftLora(copy.deepcopy(layer), "a", config=LoraConfig(r=RANK, init_lora_weights=False), r=RANK)

    def fuse() -> None:
        folded.addmm_(up, down, alpha=1e-6)

    def fuse_product() -> None:
        folded.add_(up @ down, alpha=1e-6)

    def fuse_peft() -> None:
        peft.merge()
        peft.merged_adapters.clear()

    calls = {
        "sparse": switching({"net.a": layer}, torch.device("cpu")),
        "fuse": fuse,
        "product": fuse_product,
        "peft": fuse_peft,
    }
    with one_thread():
        found = rivals(calls, runs=runs)
    yield quotient("switch_tensor_speedup", found["fuse"], found["sparse"], 16)
    yield quotient("switch_tensor_speedup_product", found["product"], found["sparse"])
    yield quotient("switch_tensor_speedup_peft", found["peft"], found["sparse"])
    yield milliseconds("switch_tensor_ms", found["sparse"])
    yield milliseconds("switch_tensor_ms_fuse", found["fuse"])


def sdxl_layers(quick: bool) -> dict[str, nn.Linear]:
    """The attention layers of SDXL's UNet, which its LoRAs change, at their real sizes (0.7 B weights, float32)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    shapes = {
        name: weight_shape(module)
        for name, module in unet.named_modules()
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    }
    chosen = itertools.islice(shapes.items(), 4 if quick else None)
    return {f"net.{name}": nn.Linear(s[1], s[0], bias=False).requires_grad_(False) for name, s in chosen}


def measure_sdxl(device: torch.device, quick: bool) -> Iterator[Row]:
    """One adapter to another in a whole model, beside peft taking one LoRA out and putting another in."""
    layers, runs = sdxl_layers(quick), 2 if quick else 5
    switch = switching(layers, torch.device("cpu"))
    config = LoraConfig(r=RANK, init_lora_weights=False)
    peft = [PeftLora(layer, "a", config=config, r=RANK) for layer in layers.values()]

    def fuse_and_unfuse() -> None:
        for each in peft:
            each.merge()
        for each in peft:
            each.unmerge()

    with one_thread():
        found = rivals({"sparse": switch, "peft": fuse_and_unfuse}, runs=runs, warmup=1)
    yield quotient("switch_sdxl_speedup", found["peft"], found["sparse"], 6)
    yield milliseconds("switch_sdxl_ms", found["sparse"])
    yield milliseconds("switch_sdxl_ms_peft", found["peft"])


def quotient(id_: str, above: Timing, below: Timing, target: float | None = None, place: str = "cpu") -> Row:
    value = above.median / below.median
    spread = value * (above.spread / above.median + below.spread / below.median)
    return Row(
        id=id_,
        value=value,
        spread=spread,
        unit="times",
        target=target,
        direction="max",
        n=below.n,
        where=place,
    )


def milliseconds(id_: str, time: Timing, target: float | None = None, place: str = "cpu") -> Row:
    return Row(
        id=id_, value=1e3 * time.median, spread=1e3 * time.spread, unit="ms", target=target, direction="min", n=time.n, where=place
    )  # fmt: skip


# Switching on a GPU


def flux_pipeline(quick: bool, device: torch.device) -> FluxPipeline:
    """FLUX.1-dev's transformer with random bf16 weights, and nothing else."""
    small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
             "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}  # fmt: skip
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True, **(small if quick else {}))
    transformer = transformer.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.normal_(std=0.02)
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **none)


def measure_flux(device: torch.device, quick: bool) -> Iterator[Row]:
    """One adapter to another in all 2-D weights, weighted, originals kept; beside peft folding one LoRA in."""
    pipe, runs = flux_pipeline(quick, device), 3 if quick else 30
    layers = {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}
    shapes = {f"transformer.{name}": weight_shape(layer) for name, layer in layers.items()}
    adapters = [random_sparse(name, shapes, seed, device) for seed, name in enumerate("ab")]
    with Composition(pipe, adapters, Merge(weights={"a": 1.0}), "fold") as composition:
        mixes = itertools.cycle([[Mix(weights={name: 0.7})] for name in "ab"])
        found = measure(lambda: composition.backend.apply(next(mixes)), device=device, runs=runs)
    yield milliseconds("switch_flux_ms", found, 8, where(device))
    blocks = [name for name in layers if "transformer_blocks" in name]
    config = LoraConfig(r=16, target_modules=blocks, init_lora_weights=False)
    inject_adapter_in_model(config, pipe.transformer, "a")

    def fuse() -> None:
        pipe.transformer.fuse_lora()
        for module in pipe.transformer.modules():
            if isinstance(module, PeftLora):
                module.merged_adapters.clear()

    yield milliseconds(
        "switch_flux_ms_peft", measure(fuse, device=device, runs=max(3, runs // 5)), None, where(device)
    )


# Training on a GPU


class Stack(nn.Module):
    """Double and single blocks of FLUX.1's width, as its transformer runs them: what an adapter is trained through."""

    def __init__(self, width: int, head: int, double: int, single: int, checkpointed: bool) -> None:
        super().__init__()
        heads = {"dim": width, "num_attention_heads": width // head, "attention_head_dim": head}
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(**heads) for _ in range(double))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(**heads) for _ in range(single)
        )
        self.checkpointed = checkpointed

    def forward(self, picture: Tensor, text: Tensor, time: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
            inputs = (picture, text, time, rotation)
            text, picture = (
                checkpoint(block, *inputs, use_reentrant=False) if self.checkpointed else block(*inputs)
            )
        return picture


def insert(kind: str, net: Stack, rank: int) -> list[nn.Parameter]:
    """Put a LoRA, or a SHiRA of that mask with as many parameters, on every linear layer; returns what learns."""
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    if kind == "lora":
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(layers)), net, "a")
        learns = [parameter for name, parameter in net.named_parameters() if "lora_" in name]
    else:
        learns = [_scattered(kind, net, name, layer, rank) for name, layer in layers.items()]
    for parameter in learns:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return learns


def _scattered(kind: str, net: Stack, name: str, layer: nn.Linear, rank: int) -> nn.Parameter:
    shape = tuple(layer.weight.shape)
    recipe = Recipe(mask=kind, percent=100 * rank * sum(shape) / (shape[0] * shape[1]))
    tuned = SparseLinear(layer, recipe.draw(name, shape, layer.weight.device))
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, tuned)
    return tuned.shira_weight["compose"]


def stepping(
    kind: str, checkpointed: bool, device: torch.device, quick: bool
) -> tuple[Callable[[], None], int]:
    """One training step on a stack of FLUX.1's blocks (1024 px, batch 1, bf16), and the bytes of its frozen weights."""
    width, head, double, single, tokens = (64, 16, 1, 1, 8) if quick else (3072, 128, 2, 4, 4096)
    torch.manual_seed(0)
    with device:
        net = Stack(width, head, double, single, checkpointed).to(torch.bfloat16).requires_grad_(False)
        inputs = [torch.randn(1, *size, width).bfloat16() for size in ((tokens,), (tokens // 8,), ())]
        rotation = tuple(torch.randn(tokens + tokens // 8, head) for _ in range(2))
    frozen = sum(parameter.nbytes for parameter in net.parameters())
    learns = insert(kind, net, rank=2 if quick else 16)
    optimizer = torch.optim.AdamW(learns, lr=1e-4)
    sparse = [module for module in net.modules() if isinstance(module, SparseLinear)]
    inputs[0].requires_grad_()

    def step() -> None:
        with sdpa_kernel(KERNELS), torch.autocast(device.type, torch.bfloat16):
            loss = net(*inputs, rotation).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer in sparse:
            layer.merge()

    return step, frozen


def measure_training(device: torch.device, quick: bool) -> Iterator[Row]:
    """Peak memory and time of a step, SHiRA (random and struct masks) beside a LoRA of equal parameters."""
    for checkpointed in (False, True):
        found = {kind: observed(kind, checkpointed, device, quick) for kind in ("lora", "random", "struct")}
        frozen, lora, lora_time = found["lora"]
        end, place = "_checkpointed" if checkpointed else "", where(device)
        for kind, (_, peak, time) in found.items():
            yield Row(
                id=f"train_gib_{kind}{end}", value=peak / GIB, unit="GiB", direction="min", n=1, where=place
            )
            if kind == "lora":
                continue
            mask, aim = "" if kind == "random" else f"_{kind}", kind == "random" and not checkpointed
            above = (peak - frozen) / (lora - frozen)
            yield Row(
                id=f"train_memory_ratio{mask}{end}", value=above, unit="times", target=0.84 if aim else None, direction="min", n=1, where=place
            )  # fmt: skip
            ratio = quotient(f"train_time_ratio{mask}{end}", time, lora_time, 1.05 if aim else None, place)
            yield replace(ratio, direction="min")


def observed(kind: str, checkpointed: bool, device: torch.device, quick: bool) -> tuple[int, int, Timing]:
    """Bytes of frozen weights, bytes at the peak of a step, and its time."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    step, frozen = stepping(kind, checkpointed, device, quick)
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    peak = torch.cuda.max_memory_allocated(device) - before
    return frozen, peak, measure(step, device=device, runs=3 if quick else 20)


# Files


def measure_files(device: torch.device, quick: bool) -> Iterator[Row]:
    """File sizes at equal parameters and equal precision (bf16 values both), attention of FLUX.1's double blocks."""
    side, blocks, rank = (128, 1, 2) if quick else (3072, 19, 32)
    sites = [f"transformer.transformer_blocks.{n}.attn.{part}" for n in range(blocks) for part in ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip
    shapes, percent = dict.fromkeys(sites, (side, side)), 100 * rank * 2 * side / side**2
    drawn = random_sparse("a", shapes, 0, torch.device("cpu"), percent)
    told = {HEADER: header({}, Recipe(mask="random", percent=percent, seed=0))}
    low = {
        site: LowRank(down=torch.randn(rank, side).bfloat16(), up=torch.randn(side, rank).bfloat16())
        for site in sites
    }
    with tempfile.TemporaryDirectory() as folder:
        lora = size(Adapter(name="l", family="flux", deltas=low), Path(folder))
        stored = size(Adapter(name="s", family="flux", deltas=drawn.deltas), Path(folder))
        seeded = size(Adapter(name="s", family="flux", deltas=drawn.deltas, metadata=told), Path(folder))
        peft = size(
            Adapter(name="p", family="flux", deltas=drawn.deltas), Path(folder), "peft", torch.float32
        )
        lora32 = size(Adapter(name="l", family="flux", deltas=low), Path(folder), "peft", torch.float32)
    found = (("file_ratio_seeded", seeded / lora, 1.0), ("file_ratio", stored / lora, 1.5))
    for id_, value, target in (*found, ("file_ratio_peft", peft / lora32, None)):
        yield Row(id=id_, value=value, unit="times", target=target, direction="min", n=len(sites))


def size(adapter: Adapter, folder: Path, to: str = "diffusers", dtype: torch.dtype | None = None) -> int:
    return save(adapter, folder / "a.safetensors", to, dtype=dtype).stat().st_size


# Restoring


def measure_restore(device: torch.device, quick: bool) -> Iterator[Row]:
    """1,000 random switches among three overlapping adapters, in bf16 and float32: then the base's own bits."""
    turns, right, dice = 20 if quick else 1000, 0, random.Random(0)
    for dtype in (torch.float32, torch.bfloat16):
        pipe = tiny.flux(0).to(device, dtype)
        before = digest(pipe.transformer)
        layers = {
            f"transformer.{n}": m for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)
        }
        shapes = {name: weight_shape(layer) for name, layer in layers.items()}
        adapters = [random_sparse(name, shapes, seed, device, 10.0) for seed, name in enumerate("abc")]
        with composed(pipe, adapters, Merge(weights={"a": 1.0}), _kept("fold", kept := [])):
            for _ in range(turns):
                chosen = {name: dice.uniform(-1, 1) for name in "abc" if dice.random() < 0.6}
                kept[0].apply([Mix(weights=chosen)])
        right += digest(pipe.transformer) == before
    yield Row(
        id="restore_exact", value=float(right == 2), unit="truth", target=1, direction="max", n=2 * turns, where=where(device)
    )  # fmt: skip


def _kept(name: str, place: list) -> Callable[[], object]:
    """Makes the backend `name` and leaves it in `place` for the caller."""

    def make() -> object:
        place.append(BACKENDS[name]())
        return place[0]

    return make


def digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for parameter in module.parameters():
        found.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


TRAINING = tuple(
    f"train_{what}{end}"
    for end in ("", "_checkpointed")
    for what in (
        "memory_ratio", "time_ratio", "memory_ratio_struct", "time_ratio_struct", "gib_lora", "gib_random", "gib_struct"
    )
)  # fmt: skip
QUESTIONS: tuple[tuple[tuple[str, ...], Callable[[torch.device, bool], Iterator[Row]], bool], ...] = (
    (("switch_tensor_speedup", "switch_tensor_speedup_product", "switch_tensor_speedup_peft", "switch_tensor_ms", "switch_tensor_ms_fuse"), measure_tensor, False),
    (("switch_sdxl_speedup", "switch_sdxl_ms", "switch_sdxl_ms_peft"), measure_sdxl, False),
    (("file_ratio_seeded", "file_ratio", "file_ratio_peft"), measure_files, False),
    (("restore_exact",), measure_restore, False),
    (("switch_flux_ms", "switch_flux_ms_peft"), measure_flux, True),
    (TRAINING, measure_training, True),
    (fused.IDS, fused.measure, True),
)  # fmt: skip
"""The ids of its rows, what measures them, and whether it needs a GPU."""


def measured(ids: Sequence[str] | None, device: torch.device, quick: bool) -> Iterator[Row]:
    """Rows of the questions asked for, or of all that this machine can answer."""
    for own, question, needs_gpu in QUESTIONS:
        if ids is not None and not set(ids) & set(own):
            continue
        if needs_gpu and device.type != "cuda":
            print(f"left out, for want of a GPU: {', '.join(own)}")
            continue
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # peft on merging twice
            yield from (row for row in question(device, quick) if ids is None or row.id in ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="ids, comma-separated (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes; the numbers are not kept")
    args = parser.parse_args()
    known = [id_ for own, *_ in QUESTIONS for id_ in own]
    ids = args.rows.split(",") if args.rows else None
    strange = sorted(set(ids or ()) - set(known))
    if strange:
        parser.error(f"row '{strange[0]}' is unknown; choose from {', '.join(known)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for row in measured(ids, device, args.quick):
        print(f"{row.id}: {row.value:.4g} {row.unit}" + ("" if row.met else f" (target {row.target:g} missed)"), flush=True)  # fmt: skip
        if not args.quick:
            merge([row], "shira")


if __name__ == "__main__":
    main()
