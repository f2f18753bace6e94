"""Does teaching FLUX.1 Kontext to restore fit one card? FLUX.1's own shape with random weights, rank 64, 1024 px, batch 1.

    python -m benchmarks.restore_kontext [--rows id,...] [--quick]

Beside it stands diffusers' example (examples/dreambooth/train_dreambooth_lora_flux_kontext.py) with the same settings:
bf16, gradient checkpointing, torch's AdamW, cached latents and prompts, both encoders gone. Ours is `compose train
restore` as it is asked for at this size, with the base's weights kept in float8 (`--base-bits 8`); the rows that end in
`_bf16` keep them in bfloat16 as the example does.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig
from torch import Tensor

from benchmarks.results import Row, merge
from benchmarks.timing import where
from compose.training import lora
from compose.training.lora import LoraSettings
from compose.training.objectives import Batch
from compose.training.restore import even_moments

GIB = 2**30
SHAPE = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True}  # fmt: skip
SMALL = {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 4096, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}  # fmt: skip
# what the example adapts where --lora_layers is not given
LAYERS = (
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
)  # fmt: skip
IDS = (
    "kontext_step_s", "kontext_peak_gib", "kontext_peak_ratio", "kontext_step_s_bf16", "kontext_peak_gib_bf16",
    "kontext_peak_ratio_bf16", "kontext_step_s_recipe", "kontext_peak_gib_recipe",
)  # fmt: skip
TARGET = 0.9


@dataclass(frozen=True, slots=True)
class Setup:
    """Sizes of the measurement: latents (channels, side), text tokens, rank, steps timed after two of warming up."""

    shape: dict[str, Any]
    side: int
    tokens: int
    rank: int
    steps: int

    @property
    def channels(self) -> int:
        return self.shape["in_channels"] // 4

    def latents(self, generator: torch.Generator) -> Tensor:
        return torch.randn(1, self.channels, self.side, self.side, generator=generator)


@dataclass(frozen=True, slots=True)
class Seen:
    """Median seconds of a step, bytes at the peak, and trained parameters."""

    seconds: float
    peak: int
    trained: int


def model(setup: Setup, device: torch.device) -> FluxTransformer2DModel:
    """The denoiser in bfloat16, made on the device: 24 GB there, nothing in main memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            made = FluxTransformer2DModel(**setup.shape)
    finally:
        torch.set_default_dtype(before)
    return made.requires_grad_(False)


class Clock:
    """Times steps, and the memory from the first on."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, []
        self.begun = 0.0

    def tick(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.begun:
            self.times.append(now - self.begun)
        self.begun = now

    def seen(self, trained: int) -> Seen:
        steps = sorted(self.times[2:] or self.times)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return Seen(steps[len(steps) // 2], peak, trained)


def ours(setup: Setup, device: torch.device, bits: int) -> Seen:
    """Steps of `compose.training.lora.fit` on restoration batches; prompts and latents wait on the CPU, as there."""
    transformer = model(setup, device)
    if bits == 8:
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    pipe = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    text = {
        "prompt_embeds": torch.randn(
            1, setup.tokens, setup.shape["joint_attention_dim"], generator=generator
        ),
        "pooled_prompt_embeds": torch.randn(1, setup.shape["pooled_projection_dim"], generator=generator),
    }

    def source(dice: torch.Generator) -> Batch:
        clean, spoilt = setup.latents(dice), setup.latents(dice)
        return Batch(latents=clean, reference=spoilt, text=text, moments=even_moments(1, dice))

    settings = LoraSettings(
        trigger="the image", rank=setup.rank, targets=",".join(f"transformer.**.{name}" for name in LAYERS),
        steps=setup.steps + 2, batch=1, lr=1e-4, gradient_checkpointing=True, precision="bf16", size=16 * setup.side // 2,
    )  # fmt: skip
    clock, trained = Clock(device), []
    clock.tick()

    def watch(done: int, loss: float) -> None:
        clock.tick()
        trained[:] = [sum(p.numel() for p in transformer.parameters() if p.requires_grad)]

    with tempfile.TemporaryDirectory() as folder:
        lora.fit(
            settings, pipe, source, Path(folder) / "a.safetensors", lora.adapted, watch=watch, progress=False
        )
    return clock.seen(trained[0])


def recipe(setup: Setup, device: torch.device) -> Seen:
    """Steps as the example takes them."""
    accelerator = Accelerator(mixed_precision="bf16")
    transformer = model(setup, device)
    transformer.enable_gradient_checkpointing()
    transformer.add_adapter(
        LoraConfig(
            r=setup.rank, lora_alpha=setup.rank, init_lora_weights="gaussian", target_modules=list(LAYERS)
        )
    )
    learns = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    step = _recipe_step(setup, device, transformer, optimizer, accelerator)
    clock = Clock(device)
    transformer.train()
    clock.tick()
    for _ in range(setup.steps + 2):
        step()
        clock.tick()
    return clock.seen(sum(parameter.numel() for parameter in learns))


def _recipe_step(
    setup: Setup, device: torch.device, transformer: Any, optimizer: Any, accelerator: Accelerator
) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    half = {"device": device, "dtype": torch.bfloat16}
    prompt = torch.randn(1, setup.tokens, setup.shape["joint_attention_dim"], generator=generator).to(**half)
    pooled = torch.randn(1, setup.shape["pooled_projection_dim"], generator=generator).to(**half)
    ids = FluxKontextPipeline._prepare_latent_image_ids(1, setup.side // 2, setup.side // 2, **half)
    beside = ids.clone()
    beside[..., 0] = 1
    schedule = FlowMatchEulerDiscreteScheduler()
    pack = FluxKontextPipeline._pack_latents
    unpack = FluxKontextPipeline._unpack_latents

    def step() -> None:
        clean, spoilt = (setup.latents(generator).to(**half) for _ in range(2))
        noise = torch.randn_like(clean)
        level = compute_density_for_timestep_sampling("none", batch_size=1, logit_mean=0.0, logit_std=1.0)
        place = (level * schedule.config.num_train_timesteps).long()
        time_ = schedule.timesteps[place].to(device)
        sigma = schedule.sigmas[place].to(**half).view(1, 1, 1, 1)
        noisy = (1 - sigma) * clean + sigma * noise
        shown = torch.cat(
            [pack(each, 1, setup.channels, setup.side, setup.side) for each in (noisy, spoilt)], 1
        )
        out = transformer(
            hidden_states=shown, timestep=time_ / 1000, guidance=torch.tensor([3.5], device=device),
            pooled_projections=pooled, encoder_hidden_states=prompt, txt_ids=torch.zeros(setup.tokens, 3, **half),
            img_ids=torch.cat([ids, beside]), return_dict=False,
        )[0][:, : shown.shape[1] // 2]  # fmt: skip
        drawn = unpack(out, height=8 * setup.side, width=8 * setup.side, vae_scale_factor=8)
        loss = F.mse_loss(drawn.float(), (noise - clean).float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def alone(call: Callable[[], Seen], name: str, device: torch.device) -> Seen:
    """One measurement from an empty card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        print(f"{name}: {torch.cuda.memory_allocated(device) / GIB:.2f} GiB held before", flush=True)
    seen = call()
    print(f"{name}: {seen.seconds:.3f} s a step, peak {seen.peak / GIB:.2f} GiB, {seen.trained / 1e6:.1f} M trained", flush=True)  # fmt: skip
    return seen


def measure(setup: Setup, device: torch.device) -> Iterator[Row]:
    """The example's rows, then ours beside it, each as soon as it is known."""
    example = alone(lambda: recipe(setup, device), "diffusers' example", device)
    yield from rows("_recipe", example, example, setup, device)
    for end, bits, name in (("", 8, "float8"), ("_bf16", 16, "bfloat16")):
        seen = alone(lambda bits=bits: ours(setup, device, bits), f"ours, base in {name}", device)
        if seen.trained != example.trained:
            raise SystemExit(
                f"ours trains {seen.trained} parameters, the example {example.trained}; the comparison would not be fair"
            )
        yield from rows(end, seen, example, setup, device)


def rows(end: str, seen: Seen, example: Seen, setup: Setup, device: torch.device) -> Iterator[Row]:
    place = where(device)
    for what, value, unit in (("step_s", seen.seconds, "s"), ("peak_gib", seen.peak / GIB, "GiB")):
        yield Row(
            id=f"kontext_{what}{end}", value=value, unit=unit, direction="min", n=setup.steps, where=place
        )
    if seen is not example:
        ratio = seen.peak / max(1, example.peak)
        target = TARGET if end == "" else None
        yield Row(id=f"kontext_peak_ratio{end}", value=ratio, unit="times", target=target, direction="min", n=setup.steps, where=place)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="ids, comma-separated (default: all)")
    parser.add_argument("--quick", action="store_true", help="a small model; nothing is kept")
    args = parser.parse_args()
    wanted = set(args.rows.split(",")) if args.rows else set(IDS)
    if wanted - set(IDS):
        parser.error(f"row '{sorted(wanted - set(IDS))[0]}' is unknown; choose from {', '.join(IDS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not args.quick:
        parser.error("FLUX.1's shape needs a GPU of 40 GiB or more; --quick runs a small one anywhere")
    setup = Setup(SMALL, 8, 12, 2, 2) if args.quick else Setup(SHAPE, 128, 512, 64, 8)
    for row in measure(setup, device):
        if row.id in wanted:
            print(f"{row.id}: {row.value:.4g} {row.unit}" + ("" if row.met else f" (target {row.target:g} missed)"), flush=True)  # fmt: skip
            if not args.quick:
                merge([row], "restore")


if __name__ == "__main__":
    main()
