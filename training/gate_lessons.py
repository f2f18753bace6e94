"""What a gate learns from: adapters, pictures of what each brings alone, and (where somebody can draw them) pictures of
what several bring together.

Adapters come from a folder: files of their own, or a zoo's shards. A user's pictures stand in a folder beside the file,
under its name; adapters without any draw their own.
"""

from __future__ import annotations

import inspect
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from compose import bases
from compose.adapter import Adapter
from compose.backends.base import check_adapters
from compose.engine import composed
from compose.errors import AdapterError, TrainingError
from compose.formats import load
from compose.gates import embed
from compose.policies import make
from compose.request import Request
from compose.sites import sites_of

from .bank import reason_against
from .examples import Examples, encode
from .objectives import objective_of
from .pictures import Picture, read_folder

T = TypeVar("T")
MOST = 3  # adapters that one lesson puts together
GOOD = 0.5  # of a zoo adapter's pictures show what it should
THINGS = ("a house", "a tree", "a dog", "a cup", "a car", "a flower", "a book", "a fish", "a chair", "a boat")
COLOURS = ("white", "gray", "blue", "green", "yellow", "red", "pink", "beige")
TOGETHER = 8  # pictures drawn in one call


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One adapter that the gate meets in training. `subject`: what it brings, by the picture set's name for it."""

    adapter: Adapter
    role: str
    trigger: str
    subject: str = ""


def read_members(folder: Path) -> list[Member]:
    """The adapters of a folder by name, each under a name of its own. Raises TrainingError where there are fewer than
    two that a gate can learn from."""
    if not folder.is_dir():
        raise TrainingError(f"'{folder}' is no folder; give --adapters a folder of .safetensors files")
    shards = sorted(folder.glob("zoo-*.safetensors"))
    found = list(_of_zoo(folder)) if shards else []
    found += [_of_file(path) for path in sorted(folder.glob("*.safetensors")) if path not in shards]
    kept = [member for member in found if member.trigger and not reason_against(member.adapter)]
    if len(kept) < 2:
        raise TrainingError(
            f"'{folder}' holds {len(kept)} low-rank adapters with a trigger; a gate needs two or more to learn from"
        )
    return kept


def _of_file(path: Path) -> Member:
    adapter = load(path)
    said = adapter.metadata
    return Member(
        adapter=adapter,
        role=said.get("compose.role", ""),
        trigger=said.get("compose.trigger", ""),
        subject=adapter.name,
    )


def _of_zoo(folder: Path) -> Iterable[Member]:
    from .zoo import adapter_of, read_shards

    for shard in read_shards(folder):
        for place, (job, share) in enumerate(zip(shard.jobs, shard.shares, strict=True)):
            if job.part == "train" and (share is None or share >= GOOD):
                role, subject = job.subject.role, job.subject.name
                adapter = adapter_of(shard, place)
                yield Member(adapter=adapter, role=role, trigger=job.trigger, subject=subject)


def fitting(members: Sequence[Member], pipe: Any) -> list[Member]:
    """Those that fit the base; with the reason, one line each, for those that do not."""
    sites, kept = sites_of(pipe), []
    for member in members:
        try:
            check_adapters([member.adapter], sites)
            kept.append(member)
        except AdapterError as error:
            print(f"left out: {error}", flush=True)
    if len(kept) < 2:
        raise TrainingError(f"{len(kept)} of {len(members)} adapters fit this base; a gate needs two or more")
    return kept


def choose(things: Sequence[T], role_of: Callable[[T], str], count: int, seed: int = 0) -> list[T]:
    """At most `count` of anything, the roles in turns, in an order that the seed decides."""
    by_role: dict[str, list[T]] = defaultdict(list)
    for thing in things:
        by_role[role_of(thing)].append(thing)
    rng = random.Random(seed)
    for group in by_role.values():
        rng.shuffle(group)
    turns = [group[n] for n in range(count) for group in by_role.values() if n < len(group)]
    return turns[:count]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Encoded pictures, and which members (by number) each of them shows."""

    examples: Examples
    members: Sequence[tuple[int, ...]]


def self_drawn(
    pipe: Any, members: Sequence[Member], folder: Path | None, count: int, device: torch.device, seed: int = 0
) -> Shown:
    """`count` pictures of what each member brings alone: those in `folder`/NAME where there are any, else drawn by the
    base under that adapter."""
    pictures: list[Picture] = []
    shows: list[tuple[int, ...]] = []
    for number, member in enumerate(members):
        own = folder / member.adapter.name if folder is not None else None
        given = read_folder(own, member.trigger)[:count] if own is not None and own.is_dir() else []
        found = given or _drawn(pipe, member, count, seed + number)
        pictures += found
        shows += [(number,)] * len(found)
        print(f"{member.adapter.name}: {len(found)} pictures {'read' if given else 'drawn'}", flush=True)
    return Shown(examples=encode(pipe, pictures, device=device, progress=False), members=shows)


def _drawn(pipe: Any, member: Member, count: int, seed: int) -> list[Picture]:
    """Pictures of one adapter alone, at full weight, with the prompts as their captions."""
    rng, drawn = random.Random(seed), []
    prompts = [prompt_for(member, rng) for _ in range(count)]
    with composed(pipe, [member.adapter], make("merge", {member.adapter.name: 1.0}), say=str):
        for start in range(0, count, TOGETHER):
            part = prompts[start : start + TOGETHER]
            generators = [torch.Generator().manual_seed(seed * 1000 + start + n) for n in range(len(part))]
            images = pipe(**{**arguments_of(pipe), "prompt": part}, generator=generators).images
            drawn += [Picture(source=image, caption=words) for image, words in zip(images, part, strict=True)]
    return drawn


def arguments_of(pipe: Any) -> dict[str, Any]:
    """Arguments of one call, as the product makes them."""
    kind, _ = objective_of(pipe)
    asked = Request(prompt="-", base=kind.name, seed=0)
    filled = replace(asked, **{**bases.fill(kind, "text", asked), "strength": None})
    return bases.call_args(kind, filled, "-", inspect.signature(pipe.__call__).parameters)


def prompt_for(member: Member, rng: random.Random) -> str:
    """Words that call one adapter, as its role asks for."""
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    if member.role == "style":
        return rng.choice(
            (f"{thing}, {member.trigger}", f"{thing} on a {colour} background, {member.trigger}")
        )
    if member.role == "background":
        behind = member.trigger if "background" in member.trigger else f"{member.trigger} background"
        return f"{thing} on a {behind}"
    return rng.choice((f"{member.trigger} on a {colour} background", f"a picture of {member.trigger}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """Everything on one device. latents (N, C, h, w) and `caption` (N,), rows of `text` (M, ..), whose first is empty;
    `said` (M, W) the captions as the light gate reads them, `triggers` (A + 1, W) likewise, the last zero.

    `alone` (A, K): pictures of each adapter; `together` (J,): pictures of several, `members` (J, MOST) of whom, A for
    nobody. `clash` (A, A): adapters that cannot be told apart in one prompt.
    """

    latents: Tensor
    caption: Tensor
    text: dict[str, Tensor]
    said: Tensor
    triggers: Tensor
    alone: Tensor
    together: Tensor
    members: Tensor
    clash: Tensor

    @property
    def adapters(self) -> int:
        return len(self.alone)


def lessons_of(pipe: Any, members: Sequence[Member], shown: Shown, device: torch.device) -> Lessons:
    """Shown pictures sorted for drawing batches. Raises TrainingError for a member without a picture of its own."""
    own: list[list[int]] = [[] for _ in members]
    joint = [n for n, who in enumerate(shown.members) if len(who) > 1]
    for n, who in enumerate(shown.members):
        if len(who) == 1:
            own[who[0]].append(n)
    for member, rows in zip(members, own, strict=True):
        if not rows:
            raise TrainingError(f"adapter '{member.adapter.name}' has no picture of its own to learn from")
    most, examples = max(map(len, own)), shown.examples
    half = torch.float16 if device.type == "cuda" else torch.float32
    triggers = embed_all(pipe, [member.trigger for member in members])
    words = [member.trigger.lower() for member in members]
    return Lessons(
        latents=examples.latents.to(device, half),
        caption=examples.rows.to(device),
        text={name: value.to(device, half) for name, value in examples.text.items()},
        said=embed_all(pipe, examples.captions).to(device),
        triggers=torch.cat([triggers, torch.zeros_like(triggers[:1])]).to(device),
        alone=torch.tensor([(rows * most)[:most] for rows in own], device=device),
        together=torch.tensor(joint, dtype=torch.long, device=device),
        members=torch.tensor(
            [_padded(shown.members[n], len(members)) for n in joint], dtype=torch.long, device=device
        ).view(-1, MOST),
        clash=torch.tensor([[a == b for b in words] for a in words], device=device),
    )


def _padded(who: tuple[int, ...], nobody: int) -> list[int]:
    return [*who, *[nobody] * (MOST - len(who))]


def embed_all(pipe: Any, texts: Sequence[str], batch: int = 500) -> Tensor:
    """(texts, width) on the text encoder's device."""
    return torch.cat([embed(pipe, texts[n : n + batch]) for n in range(0, len(texts), batch)])
