"""Teach a small net to tell defects apart, on the very pictures that the restoration adapter learned from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from compose.defects import PATCH, DefectNet
from compose.loading import threads
from compose.restoration import NONE
from compose.training.degrade import DEFECTS, Defect
from compose.training.lora import step_generator
from compose.training.pairs import Pair, cut

STEPS, BATCH, RATE = 400, 32, 3e-3
_FRESH = 0.5  # share of the examples whose defect is made anew, where it can be


def teach(
    pairs: Sequence[Pair],
    defects: Sequence[Defect] = (),
    *,
    seed: int = 0,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> DefectNet:
    """A net for the tasks of `pairs`, and for sound pictures; ten seconds of one CPU core.

    Where the defects were made on purpose, half of the examples are made anew from the clean pictures.
    """
    steps, tasks = steps or STEPS, list(dict.fromkeys(pair.task for pair in pairs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DefectNet([NONE, *tasks]).to(device)
    pool = _pool(pairs, tasks, defects, seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    with threads("1" if str(device) == "cpu" else None):  # so small that a second thread only waits
        for step in tqdm(range(steps), "telling defects apart", disable=not progress, leave=False):
            generator = step_generator(seed, step)
            labels = torch.randint(len(pool), (BATCH,), generator=generator)
            patches = torch.stack([_patch(pool[label], generator) for label in labels.tolist()]).to(device)
            loss = F.cross_entropy(net(patches), labels.to(device), label_smoothing=0.02)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.cpu().eval()


def _pool(
    pairs: Sequence[Pair], tasks: Sequence[str], defects: Sequence[Defect], seed: int
) -> list[list[Tensor]]:
    """Pictures of every class: the sound ones first."""
    pool = [[pair.clean for pair in pairs]]
    pool += [[pair.degraded for pair in pairs if pair.task == task] for task in tasks]
    made = {defect.task: defect for defect in defects}
    for place, task in enumerate(tasks, start=1):
        if task in made and task in DEFECTS:
            count = round(len(pool[place]) * _FRESH / (1 - _FRESH))
            clean = pool[0][:count] if len(pool[0]) > count else pool[0]
            pool[place] += [made[task](each, step_generator(seed, n, place)) for n, each in enumerate(clean)]
    return pool


def _patch(pictures: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A random square of a random picture, mirrored half of the time."""
    chosen = int(torch.randint(len(pictures), (), generator=generator))
    patch = cut([pictures[chosen]], PATCH, generator)[0]
    return patch.flip(2) if torch.rand((), generator=generator) < 0.5 else patch
