"""Train the judge on real renders: python -m benchmarks.judge.train --archive pictures.zip --out FOLDER."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.judge import FOLDER, GROUND_NAMES, STYLE_CLASS, STYLE_NAMES, Judge
from compose.training import loop
from compose.training.data.pictures import STYLES
from compose.training.data.scenes import SIZES, Composer, Item, Pictures, Sampler, Scene

WINDOW = 64  # pixels: half of a picture, what the two-object rows look at


class Renders:
    """Single objects of any size and place, and halves of pictures with two; with their labels."""

    def __init__(self, pictures: Pictures, device: torch.device, seed: int):
        self.sampler = Sampler(
            pictures, parts=("base", "zoo", "test"), styles=[s.name for s in STYLES], seed=seed, patterns=0.3
        )
        self.composer, self.device = Composer(pictures, device), device
        self.concept = {slug: i for i, slug in enumerate(sorted(pictures.concepts))}

    def scene(self) -> tuple[Scene, int | None]:
        """(scene, half that is looked at or None for the whole)."""
        rng, sampler = self.sampler.rng, self.sampler
        style = rng.choices(sampler.styles, sampler.weights)[0]
        ground = sampler.ground(style)
        if rng.random() < 0.25:
            items = sampler.row(rng.sample(sampler.have[style], 2), False)
            return Scene(style=style, items=items, ground=ground), rng.randrange(2)
        size = rng.choice((0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7))
        slack = (128 - SIZES[size]) // 2 + 3
        x, y = (
            (64 + rng.randint(-slack, slack) for _ in range(2))
            if rng.random() < 0.5
            else (64 + rng.randint(-5, 5), 64 + rng.randint(-5, 5))
        )
        item = Item(concept=rng.choice(sampler.have[style]), size=size, x=x, y=y)
        return Scene(style=style, items=(item,), ground=ground), None

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Pictures (n, 3, 128, 128) and labels (n, 4): concept, style, background top and bottom (-1: not asked)."""
        drawn = [self.scene() for _ in range(count)]
        pictures = self.composer.draw([scene for scene, _ in drawn], seed=self.sampler.rng.randrange(1 << 31))
        for side in (0, 1):
            if rows := [i for i, (_, half) in enumerate(drawn) if half == side]:
                pictures[rows] = look_at_half(pictures[rows], side)
        return pictures, torch.tensor([self.label(*d) for d in drawn], device=self.device)

    def label(self, scene: Scene, half: int | None) -> tuple[int, int, int, int]:
        style, ground = STYLE_NAMES.index(STYLE_CLASS[scene.style]), scene.ground
        top, bottom = (GROUND_NAMES.index(ground.pattern or end) for end in (ground.top, ground.bottom))
        if half is not None:
            same = ground.top == ground.bottom
            return self.concept[scene.items[half].concept], style, top if same else -1, bottom if same else -1
        return self.concept[scene.items[0].concept], style, top, bottom


def look_at_half(pictures: Tensor, half: int) -> Tensor:
    """The middle window of the left (0) or right (1) half, enlarged to the full side; (n, 3, 128, 128)."""
    left = half * (pictures.shape[-1] - WINDOW)
    top = (pictures.shape[-2] - WINDOW) // 2
    window = pictures[..., top : top + WINDOW, left : left + WINDOW]
    return F.interpolate(
        window, size=pictures.shape[-2:], mode="bilinear", align_corners=False, antialias=True
    )


def roughen(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """What drawn pictures suffer: small zooms and shifts, blur, noise, colour drift."""
    n, device = len(pictures), pictures.device
    rand = lambda *shape: torch.rand(*shape, device=device, generator=generator)  # noqa: E731
    zoom, turn = torch.exp((rand(n) - 0.5) * 0.36), (rand(n) - 0.5) * 0.3
    shift = (rand(n, 2, 1) - 0.5) * 0.14
    cos, sin = zoom * torch.cos(turn), zoom * torch.sin(turn)
    theta = torch.cat(
        [torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1), shift], -1
    )
    moved = F.grid_sample(
        pictures,
        F.affine_grid(theta, list(pictures.shape), align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    pictures = torch.where(rand(n, 1, 1, 1) < 0.7, moved, pictures)
    small = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2.0, mode="bilinear")
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pick = rand(n, 1, 1, 1)
    pictures = torch.where(pick < 0.15, small, torch.where(pick < 0.35, soft, pictures))
    gain, lift = 1 + (rand(n, 3, 1, 1) - 0.5) * 0.12, (rand(n, 3, 1, 1) - 0.5) * 0.08
    noise = (
        torch.randn(pictures.shape, device=device, generator=generator)
        * rand(n, 1, 1, 1)
        * 0.12
        * (rand(n, 1, 1, 1) < 0.6)
    )
    return (pictures * gain + lift + noise).clamp(-1, 1)


def judge_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    weights = (1.0, 0.5, 0.25, 0.25)
    return sum(
        w * F.cross_entropy(x.float(), labels[:, i], ignore_index=-1, label_smoothing=0.05)
        for i, (w, x) in enumerate(zip(weights, logits, strict=True))
    )


def train(
    archive: Path, out: Path, *, batch: int, seconds: float, steps: int, rate: float = 2e-3, seed: int = 13
) -> None:
    """Write `out/judge.safetensors` and `out/classes.json`; resumes from `out/judge.checkpoint`."""
    world = loop.join()
    torch.manual_seed(seed)
    judge = Judge().to(world.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        judge.parameters(), lr=rate, weight_decay=0.05, fused=world.device.type == "cuda"
    )
    schedule = loop.Schedule(peak=rate, steps=steps, seconds=seconds)
    average = loop.Average({"judge": judge}, 0.999)
    out.mkdir(parents=True, exist_ok=True)
    if (checkpoint := out / "judge.checkpoint").exists():
        loop.load_checkpoint(checkpoint, {"judge": judge}, optimizer, schedule, average)
    renders = Renders(Pictures(archive), world.device, seed + schedule.step)
    generator = torch.Generator(world.device).manual_seed(seed + schedule.step)
    logits_of = torch.compile(judge.logits) if world.device.type == "cuda" else judge.logits
    began = time.monotonic()
    while not schedule.ended(world):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate()
        pictures, labels = renders.batch(batch)
        with loop.half(world.device):
            logits = logits_of(roughen(pictures, generator).to(memory_format=torch.channels_last))
            loss = judge_loss(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step += 1
        average.update(schedule.step)
        if schedule.step % 500 == 0 or schedule.step == 20:
            world.say(
                f"judge {schedule.step} progress {schedule.known[0]:.3f} loss {loss.item():.3f} concept {(logits[0].argmax(1) == labels[:, 0]).float().mean():.3f} style {(logits[1].argmax(1) == labels[:, 1]).float().mean():.3f} {schedule.step * batch / (time.monotonic() - began):.0f}/s"
            )
    loop.save_checkpoint(checkpoint, {"judge": judge}, optimizer, schedule, average)
    average.swap()
    save_file(
        {k: v.detach().half().cpu().contiguous() for k, v in judge.state_dict().items()},
        out / "judge.safetensors",
    )
    (out / "classes.json").write_text(json.dumps(judge.concepts))
    world.say(
        f"judge on unseen renders: {accuracy(judge, Renders(Pictures(archive), world.device, seed=999_983))}"
    )


@torch.no_grad()
def accuracy(judge: Judge, renders: Renders, count: int = 4000) -> dict[str, float]:
    """Share of right answers on fresh whole renders."""
    judge.eval()
    right = torch.zeros(4)
    for _ in range(math.ceil(count / 200)):
        pictures, labels = renders.batch(200)
        logits = judge.logits(pictures)
        right += torch.tensor(
            [
                float(((x.argmax(1) == labels[:, i]) | (labels[:, i] < 0)).float().mean())
                for i, x in enumerate(logits)
            ]
        )
    return dict(
        zip(("concept", "style", "top", "bottom"), (right / math.ceil(count / 200)).tolist(), strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--steps", type=int, default=60_000)
    args = parser.parse_args()
    random.seed(0)
    train(args.archive, args.out, batch=args.batch, seconds=args.seconds, steps=args.steps)


if __name__ == "__main__":
    main()
