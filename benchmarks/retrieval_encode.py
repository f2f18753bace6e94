"""One adapter of FLUX.1-dev's size, rank 16 on every linear layer of the blocks, encoded on a CPU: seconds, and memory
above the loaded encoder. Weights and encoder are random; what counts is their size. Run in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from benchmarks.results import RESULTS, Row, merge
from compose.adapter import Adapter, LowRank
from compose.formats import load, save
from compose.retrieval.encoder import Encoder
from compose.training.encoder import Config, config_for, untrained

IDS = ("encode_s", "encode_memory", "encoder_flux_mib")
RANK, RUNS = 16, 3
SDXL = {
    "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True, "sample_size": 128,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def layers(family: str) -> dict[str, tuple[int, int]]:
    """site -> (out, in) of a full-size family's linear layers inside its blocks, without any weights."""
    with torch.device("meta"):
        model = (
            FluxTransformer2DModel(guidance_embeds=True) if family == "flux" else UNet2DConditionModel(**SDXL)
        )
    part = "transformer" if family == "flux" else "unet"
    return {
        f"{part}.{path}": (layer.out_features, layer.in_features)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "block" in path
    }


def random_adapter(shapes: dict[str, tuple[int, int]], rank: int, family: str) -> Adapter:
    """A LoRA of random numbers on these layers, fp16."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).half()

    deltas = {
        site: LowRank(down=drawn(rank, inner), up=drawn(out, rank)) for site, (out, inner) in shapes.items()
    }
    return Adapter(name="random", family=family, deltas=deltas)


def child(encoder: Path, adapter: Path) -> None:
    """Load, encode, and print seconds and bytes."""
    made = Encoder.load(encoder)
    made.encode(
        random_adapter({site: made.shape(site) for site in made.sites[:2]}, 2, "flux")
    )  # warm libraries
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest memory is counted anew from here
    before = _memory("VmRSS")
    loaded = load(adapter)
    began = time.perf_counter()
    made.encode(loaded)
    print(json.dumps({"seconds": time.perf_counter() - began, "bytes": _memory("VmHWM") - before}))


def _memory(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measure(quick: bool = False, config: Config | None = None) -> list[Row]:
    """The rows, medians over runs."""
    shapes = layers("flux")
    if quick:
        shapes = dict(list(shapes.items())[:20])
    with tempfile.TemporaryDirectory() as folder:
        encoder = untrained(shapes, config or config_for("flux"), ["flux"]).save(
            Path(folder, "encoder.safetensors")
        )
        adapter = save(random_adapter(shapes, RANK, "flux"), Path(folder, "adapter.safetensors"))
        command = [sys.executable, "-m", "benchmarks.retrieval_encode", "--child", str(encoder), str(adapter)]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(RUNS)
        ]
        size, own = adapter.stat().st_size, encoder.stat().st_size
    seconds, shares = [run["seconds"] for run in runs], [run["bytes"] / size for run in runs]
    return [
        Row(id="encode_s", value=median(seconds), spread=max(seconds) - min(seconds), unit="s", target=1.5, direction="min", n=RUNS),
        Row(id="encode_memory", value=median(shares), spread=max(shares) - min(shares), unit="x file", target=1.5, direction="min", n=RUNS),
        Row(id="encoder_flux_mib", value=own / 2**20, unit="MiB", direction="min", n=1),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help="ids, comma-separated")
    parser.add_argument("--quick", action="store_true", help="twenty layers, nothing recorded")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args(argv)
    if args.child:
        child(*args.child)
        return
    made = measure(args.quick)
    for row in made:
        print(f"{row.id}: {row.value:.4g} {row.unit} (target {row.target})", flush=True)
    wanted = set(args.rows.split(",")) if args.rows else set(IDS)
    if not args.quick:
        merge([row for row in made if row.id in wanted], "retrieval", args.out)


if __name__ == "__main__":
    main()
