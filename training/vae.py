"""The bundled autoencoder: an f8, 16-channel AutoencoderKL on 128 px scenes, trained on a loss that keeps edges.

It sees base concepts in base styles only, recoloured, flipped and shaded at random so that it also carries
artwork it has never seen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from . import loop
from .data.concepts import BASE_STYLES
from .data.scenes import Composer, Pictures, Sampler

CONFIG = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (48, 64, 96, 96), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 16,
    "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 128, "scaling_factor": 1.0, "shift_factor": 0.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSettings:
    batch: int = 160
    rate: float = 1.2e-3
    steps: int = 60_000
    seconds: float = 420.0
    kl: float = 2e-5
    seed: int = 11
    every: int = 1000


def recolor(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures get a random colour matrix, a flip and smooth shading; range stays [-1, 1]."""
    n, device = len(pictures), pictures.device
    rand = lambda *shape: torch.rand(*shape, device=device, generator=generator)  # noqa: E731
    matrix = torch.eye(3, device=device) + (rand(n, 3, 3) - 0.5) * 0.9
    shading = torch.nn.functional.interpolate(
        rand(n, 3, 3, 3) - 0.5, pictures.shape[-2:], mode="bilinear", align_corners=True
    )
    changed = (
        torch.einsum("nij,njhw->nihw", matrix, pictures) + 0.7 * shading * (rand(n, 1, 1, 1) < 0.5)
    ).clamp(-1, 1)
    pictures = torch.where(rand(n, 1, 1, 1) < 0.5, changed, pictures)
    return torch.where(rand(n, 1, 1, 1) < 0.5, pictures.flip(-1), pictures)


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """Squared error for PSNR, absolute error and absolute error of the gradients for edges."""
    out, target = out.float(), target.float()
    error = out - target
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    return 4 * error.square().mean() + 0.5 * error.abs().mean() + 0.5 * (across + down)


class Forward(torch.nn.Module):
    """pictures -> loss and its reconstruction part; one module, so that it compiles as one graph."""

    def __init__(self, vae: AutoencoderKL, kl: float):
        super().__init__()
        self.vae, self.kl = vae, kl

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.vae.encoder(pictures).float().chunk(2, dim=1)
        logvar = logvar.clamp(-12, 4)
        latents = mean + (0.5 * logvar).exp() * noise
        out = self.vae.decoder(latents).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(out, pictures) + self.kl * kl, (out.clamp(-1, 1) - pictures).square().mean(
            (1, 2, 3)
        )


def train(settings: VaeSettings, archive: Path, out: Path) -> None:
    """Train and write `out/vae` (diffusers folder, fp16); resumes from `out/vae.checkpoint`."""
    world = loop.join()
    torch.manual_seed(settings.seed)
    vae = AutoencoderKL(**CONFIG).to(world.device)
    loop.share_weights([vae], world)
    vae.to(memory_format=torch.channels_last)
    forward = Forward(vae, settings.kl)
    step_fn = torch.compile(forward) if world.device.type == "cuda" else forward
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=world.device.type == "cuda"
    )
    schedule = loop.Schedule(peak=settings.rate, steps=settings.steps, seconds=settings.seconds)
    average = loop.Average({"vae": vae}, 0.999)
    checkpoint = out / "vae.checkpoint"
    if checkpoint.exists():
        loop.load_checkpoint(checkpoint, {"vae": vae}, optimizer, schedule, average)
    pictures = Pictures(archive, BASE_STYLES)
    composer = Composer(pictures, world.device)
    sampler = Sampler(pictures, styles=BASE_STYLES, seed=settings.seed * 1000 + world.rank + schedule.step)
    generator = torch.Generator(world.device).manual_seed(settings.seed * 1000 + world.rank + schedule.step)
    began = time.monotonic()
    while not schedule.ended(world):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate()
        batch = composer.draw(
            [sampler.text_to_image().scene for _ in range(settings.batch)],
            seed=sampler.rng.randrange(1 << 31),
        )
        batch = recolor(batch, generator).to(memory_format=torch.channels_last)
        noise = torch.randn(len(batch), 16, 16, 16, device=world.device, generator=generator)
        with loop.half(world.device):
            loss, squared = step_fn(batch, noise)
        loss.backward()
        loop.average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step += 1
        average.update(schedule.step)
        if schedule.step % settings.every == 0 or schedule.step == 20:
            psnr = (10 * torch.log10(4 / squared)).mean()
            world.say(
                f"vae {schedule.step} progress {schedule.known[0]:.3f} loss {loss.item():.4f} psnr {psnr:.2f} {schedule.step * settings.batch * world.size / (time.monotonic() - began):.0f}/s"
            )
    if world.first:
        loop.save_checkpoint(checkpoint, {"vae": vae}, optimizer, schedule, average)
        average.swap()
        finish(vae, composer, sampler, out)
    loop.leave()


@torch.no_grad()
def finish(vae: AutoencoderKL, composer: Composer, sampler: Sampler, out: Path) -> None:
    """Give every latent channel unit variance (exactly, inside the first and last convolutions), set the scaling
    factor, and save in half precision."""
    pictures = composer.draw([sampler.text_to_image().scene for _ in range(512)], seed=1)
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pictures.split(64)])
    spread = means.std((0, 2, 3)).clamp_min(1e-4)
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    channels = len(spread)
    last.weight[:channels] /= spread.view(-1, 1, 1, 1)
    last.bias[:channels] /= spread
    last.bias[channels:] -= 2 * spread.log()
    first.weight *= spread.view(1, -1, 1, 1)
    scaled = means / spread.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=float(1 / scaled.std()), shift_factor=float(scaled.mean()))
    vae.to(torch.float16).save_pretrained(out / "vae")
    save_file({"spread": spread.cpu()}, out / "vae_spread.safetensors")


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """PSNR in dB of each picture's reconstruction from its latent mean; pictures (n, 3, h, w) in [-1, 1]."""
    scores = []
    for chunk in pictures.split(batch):
        out = vae.decode(vae.encode(chunk).latent_dist.mean).sample.clamp(-1, 1)
        scores.append(10 * torch.log10(4 / (out - chunk).square().mean((1, 2, 3))))
    return torch.cat(scores)
