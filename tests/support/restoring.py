"""A restoration adapter of a tiny Kontext pipeline, random but real, and the net that tells its tasks apart."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from compose.adapter import Adapter, LowRank
from compose.defects import DefectNet, beside, write
from compose.formats import save
from compose.restoration import KEY, NONE, PROMPTS, Restoration

TASKS = {name: PROMPTS[name] for name in ("noise", "haze")}


def restoration(**more) -> Restoration:
    given = {"tasks": TASKS, "steps": 2, "guidance": 1.0, "side": 32, "pairs": {"noise": 4, "haze": 4}}
    return Restoration(**given | more)


def adapter(folder: Path, pipe=None, name: str = "mend", told: Restoration | None = None) -> Path:
    """Write `name.safetensors` for the pipeline's base."""
    made = tiny.random_adapter(pipe or tiny.kontext(0), name, strength=0.3, seed=3)
    deltas = {site: LowRank(down=d.down, up=d.up * d.scale, scale=1.0) for site, d in made.deltas.items()}
    kept = Adapter(name=name, family="", deltas=deltas, metadata={KEY: (told or restoration()).to_text()})
    return Path(save(kept, folder / f"{name}.safetensors", "diffusers"))


def teller(path: Path, always: str | None = None) -> DefectNet:
    """Write the net of an adapter; `always` makes it say one thing."""
    torch.manual_seed(0)
    net = DefectNet([NONE, *TASKS])
    if always is not None:
        net.score.bias.data[net.names.index(always)] = 50.0
    write(net, beside(path))
    return net
