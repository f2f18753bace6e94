"""The oracle: a naive float64 interpreter of plans, held against every denoiser call of a composition."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from compose.adapter import Adapter
from compose.engine import Composition, composed
from compose.plan import Area, Step
from compose.policies import Blocks, Composite, Merge, Regions, Schedule, Switch, window
from tests.support import tiny

FAMILIES = ["sd15", "sdxl", "sd3", "flux"]
WEIGHTS = {"a": 0.8, "b": -0.5}
BLOCK = {
    "sd15": "unet.mid_block",
    "sdxl": "unet.mid_block",
    "sd3": "transformer_blocks.1",
    "flux": "transformer_blocks.1",
    "kontext": "transformer_blocks.1",
    "qwen-image": "transformer_blocks.1",
    "z-image": "layers.1",
}
CALLS = {"sd3": 1, "sd15": 1, "sdxl": 1, "flux": 1, "kontext": 1, "qwen-image": 2, "z-image": 1}  # per step
POLICIES = {
    "merge": lambda family: Merge(weights=WEIGHTS),
    "switch": lambda family: Switch(weights=WEIGHTS),
    "composite": lambda family: Composite(weights=WEIGHTS),
    "regions": lambda family: Regions(weights=WEIGHTS | {"c": 0.3}, regions={"a": LEFT, "b": CORNER}),
    "schedule": lambda family: Schedule(
        policy=Merge(weights=WEIGHTS), curves={"a": window(0.5, 1.0), "b": ((0, 1), (1, 0))}
    ),
    "blocks": lambda family: Blocks(policy=Composite(weights=WEIGHTS), factors={"a": {BLOCK[family]: 0.25}}),
}
LEFT, CORNER = Area(box=(0.0, 0.0, 0.5, 1.0)), Area(box=(0.25, 0.5, 1.0, 1.0))


def adapters_for(pipe) -> list[Adapter]:
    """Adapters a (all layers), b (attention) and c (linear layers), none of them zero."""
    return [
        tiny.random_adapter(pipe, "a", rank=2, seed=1, convolutions=True),
        tiny.random_adapter(
            pipe, "b", rank=3, seed=2, match=lambda site: "attn" in site or "attention" in site
        ),
        tiny.random_adapter(pipe, "c", rank=1, seed=3),
    ]


@contextmanager
def recorded() -> Iterator[list]:
    """Every denoiser call of compositions inside: (args, kwargs, output)."""
    seen: list = []
    denoise = Composition._denoise

    def recording(self, original, args, kwargs):
        kept = copy.deepcopy((args, kwargs))
        output = denoise(self, original, args, kwargs)
        seen.append((*kept, copy.deepcopy(output[0])))
        return output

    with patch.object(Composition, "_denoise", recording):
        yield seen


def errors(pipe, adapters, family: str, policy, backend: str) -> list[float]:
    """Relative error of each denoiser call of a picture of two steps, against the interpreter."""
    with recorded() as calls, composed(pipe, adapters, policy, backend):
        tiny.image(pipe, family)
    steps = [Step(index=n // CALLS[family], count=2, sigma=0.0) for n in range(len(calls))]
    with torch.no_grad():
        return [
            error(output, interpret(pipe, family, adapters, policy, step, args, kwargs), family)
            for step, (args, kwargs, output) in zip(steps, calls, strict=True)
        ]


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: double(item) for key, item in value.items()}
    return type(value)(map(double, value)) if isinstance(value, (list, tuple)) else value


def explicit(denoiser, component: str, adapters: list[Adapter], weights) -> torch.nn.Module:
    """The denoiser in float64 with W + sum of w * scale * up @ down written out."""
    model = copy.deepcopy(denoiser).double()
    for adapter in adapters:
        for site, delta in adapter.deltas.items():
            path = site.removeprefix(component + ".")
            weight = weight_at(weights.get(adapter.name, 0.0), path)
            matrix = delta.up.double().flatten(1) @ delta.down.double().flatten(1)
            parameter = model.get_submodule(path).weight
            parameter.data += weight * delta.scale * matrix.view(parameter.shape)
    return model


def weight_at(weight, path: str) -> float:
    """Only what these tests use: a number, or `**` and one block whose name a path starts with."""
    if not isinstance(weight, dict):
        return weight
    found = [
        w
        for pattern, w in weight.items()
        if pattern == "**" or f"{path}.".startswith(f"{pattern.removeprefix('unet.')}.")
    ]
    return found[-1]


def shares(branch, size: tuple[int, int]) -> torch.Tensor | float:
    """A branch's share on a grid, from LEFT and CORNER by sampling 8 x 8 points in each cell."""
    if not isinstance(branch.share, str):
        return branch.share
    y, x = torch.meshgrid(
        *[(torch.arange(8 * n, dtype=torch.float64) + 0.5) / (8 * n) for n in size], indexing="ij"
    )
    covers = [area.box for area in (LEFT, CORNER)]
    cell = [
        torch.nn.functional.avg_pool2d(
            ((x > left) & (x < right) & (y > top) & (y < bottom)).double()[None], 8
        )[0]
        for left, top, right, bottom in covers
    ]
    total = sum(cell)
    parts = {
        "a": cell[0] / total.clamp(min=1),
        "b": cell[1] / total.clamp(min=1),
        "rest": (1 - total).clamp(min=0),
    }
    return parts[branch.share]


def in_shape(share, family: str, output: torch.Tensor):
    if isinstance(share, float):
        return share
    if output.dim() == 3 and family != "z-image":
        tokens = torch.zeros(output.shape[1], 1, dtype=torch.float64)
        tokens[: share.numel(), 0] = share.flatten()
        return tokens
    return share


def interpret(pipe, family: str, adapters, policy, step: Step, args, kwargs):
    """What the plan says, branch by branch, in float64."""
    name = tiny.denoiser_name(pipe)
    side = tiny.SIDE // 4 if family in ("flux", "kontext", "qwen-image") else tiny.SIDE // 2
    total = None
    for branch in policy.plan(step, 0):
        model = explicit(getattr(pipe, name), name, adapters, branch.mix.weights)
        output = model(*double(args), **double(kwargs))[0]
        output = torch.stack(output) if isinstance(output, list) else output
        part = output * in_shape(shares(branch, (side, side)), family, output)
        total = part if total is None else total + part
    return total


def error(got, wanted: torch.Tensor, family: str) -> float:
    got = torch.stack(got) if isinstance(got, list) else got
    if family == "kontext":  # the tokens of the reference picture are cut off by the pipeline
        own = (tiny.SIDE // 4) ** 2
        got, wanted = got[:, :own], wanted[:, :own]
    return ((got.double() - wanted).norm() / wanted.norm()).item()
