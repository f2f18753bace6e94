"""Train a SHiRA adapter (arXiv 2406.13175): a mask picks 1-2 % of the entries of the base's weights; only those learn.

The chosen entries are overwritten inside the weights, so a forward pass is the base's own, and nothing is cloned.
A LoRA needs a low-precision copy of each layer's input besides; here the input that autograd holds anyway is enough.
The gradient of scattered entries is read out of the layer's full gradient, which is dropped at once: on an H100 that
product is faster than sampling the entries, whose columns would have to be fetched one by one (1 % of a 3072 x 3072
weight and 4608 tokens: 87 GFLOP at tensor-core speed, against 1.7 GB of gathers), and it costs one weight's worth of
memory for a moment (90 MiB for the largest of FLUX.1). Whole rows and a diagonal, the struct mask, need no such
product: their gradients are computed alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline
from peft.tuners import shira as peft_shira
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from compose.adapter import Sparse
from compose.backends.base import quantised
from compose.bases import BUNDLED, Kind
from compose.errors import TrainingError, unknown
from compose.formats import canonical, load
from compose.formats.sparse import HEADER, header, parts_of
from compose.sparse import DRAWN, LIMIT, SCOPES, Recipe, check_any, check_percent, check_share, choose
from compose.training.lora import (
    KERNELS,
    BaseFacts,
    Inserted,
    Place,
    Settings,
    Source,
    Watch,
    check_whole,
    fit,
    frozen,
    step_generator,
    targets_of,
)
from compose.training.objectives import Loss

MaskFn = Callable[[nn.Linear, int], Tensor]
"""peft's own: (layer, r) -> ones where it learns, shaped like the weight; r (rows + columns) are about `percent`."""

MASKS = (*DRAWN, "magnitude", "gradient", "snip")
_CALIBRATED = ("gradient", "snip")
_NAME = "compose"  # of the adapter inside its layers
_CALIBRATION = -1  # the turn of a step that calibration draws in: no training step has it


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiraSettings(Settings):
    """Settings of a SHiRA adapter.

    `mask`: random and struct (rows and a diagonal) follow from `mask_seed`, so files need no places; magnitude takes
    the largest weights, gradient those with the largest loss gradient over `calibration` batches, snip those with the
    largest |weight * gradient|. `percent` of each weight, or of all together (`scope` global, where a mask ranks).
    `member` of a `family`: adapters of one family, percent and seed never overlap; `avoid` names adapter files whose
    entries are left alone.
    """

    mask: str = "random"
    percent: float = 2.0
    scope: str = "layer"
    mask_seed: int = 0
    member: int = 0
    family: int = 1
    avoid: tuple[str, ...] = ()
    calibration: int = 16

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        object.__setattr__(self, "avoid", tuple(self.avoid))
        for name, choices in (("mask", MASKS), ("scope", SCOPES)):
            if getattr(self, name) not in choices:
                raise TrainingError(unknown(name, str(getattr(self, name)), choices))
        check_percent(self.percent)
        check_share(self.member, self.family, self.percent)
        check_whole("calibration", self.calibration)
        if self.family > 1 and self.mask in _CALIBRATED:
            raise TrainingError(
                f"a {self.mask} mask is its own for each adapter, so a family would overlap; "
                "give --avoid the adapters trained before"
            )

    @property
    def recipe(self) -> Recipe | None:
        """What a drawn mask follows from; none for masks that rank entries."""
        if self.mask not in DRAWN:
            return None
        return Recipe(
            mask=self.mask,
            percent=self.percent,
            seed=self.mask_seed,
            member=self.member,
            family=self.family,
        )


# What a base of 13 M parameters wants, where the general default suits one of billions.
_LEARNS: dict[str, dict[str, Any]] = {BUNDLED: {"steps": 400, "batch": 8, "lr": 2e-3}}


def settings_for(kind: Kind, given: Mapping[str, Any]) -> ShiraSettings:
    """The settings `given`, on top of what learns well on this kind of base. Raises TrainingError."""
    return ShiraSettings.from_dict(_LEARNS.get(kind.name, {}) | dict(given))


def train(
    settings: ShiraSettings,
    pipe: DiffusionPipeline,
    source: Source,
    out: Path,
    *,
    mask_fn: MaskFn | None = None,
    base: BaseFacts | None = None,
    loss: Loss | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    progress: bool = True,
) -> Path:
    """Train one sparse adapter and write it to `out`; everything as in `compose.training.lora.train`.

    `mask_fn` replaces the settings' mask by one of peft's kind. Raises RequestError or TrainingError for a mask that
    selects nothing or more than half of a weight, and for weights that are stored quantised.
    """
    insert = functools.partial(inserted, mask_fn=mask_fn)
    return fit(
        settings,
        pipe,
        source,
        out,
        insert,
        base=base,
        loss=loss,
        resume=resume,
        watch=watch,
        progress=progress,
    )


@contextmanager
def inserted(place: Place, settings: ShiraSettings, mask_fn: MaskFn | None = None) -> Iterator[Inserted]:
    """Put sparse layers in the place of those that learn, and the layers with their own weights back."""
    parts = place.parts(settings)
    with frozen(place, settings, parts):
        layers = _layers(place, settings, parts)
        index = _index(place, settings, layers, mask_fn)
        tuned = {site: SparseLinear(layers[site], places) for site, places in index.items()}
        try:
            _exchange(parts, {id(layers[site]): layer for site, layer in tuned.items()})
            yield _described(tuned, settings.recipe if mask_fn is None else None)
        finally:
            for layer in tuned.values():
                layer.unmerge()
            _exchange(parts, {id(layer): layer.get_base_layer() for layer in tuned.values()})


def _layers(place: Place, settings: ShiraSettings, parts: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """The layers to adapt by site, as files name it. Raises TrainingError for quantised ones."""
    layers = {}
    for name, part in parts.items():
        for path in targets_of(part, name, settings.targets, place.objective):
            layers[canonical(f"{name}.{path}")] = part.get_submodule(path)
    stored = next((f"{site} ({kind})" for site, layer in layers.items() if (kind := quantised(layer))), None)
    if stored is not None:
        raise TrainingError(
            f"{stored} is stored quantised, so its entries cannot learn; load the base unquantised"
        )
    return layers


def _exchange(parts: Mapping[str, nn.Module], others: Mapping[int, nn.Module]) -> None:
    """Put other modules in the place of those with these ids."""
    for part in parts.values():
        found = [
            (parent, name, others[id(child)])
            for parent in part.modules()
            for name, child in parent.named_children()
            if id(child) in others
        ]
        for parent, name, other in found:
            setattr(parent, name, other)


def _described(tuned: Mapping[str, SparseLinear], recipe: Recipe | None) -> Inserted:
    deltas = {site: layer.delta() for site, layer in tuned.items()}
    told = {HEADER: header(deltas, recipe)} if recipe else {}
    tensors, entry = parts_of(deltas, told)

    def settle() -> None:
        for layer in tuned.values():
            layer.merge()

    return Inserted(
        kind="shira",
        weights={f"{site}.shira_weight": layer.shira_weight[_NAME] for site, layer in tuned.items()},
        header={HEADER: entry},
        beside={key: tensor for key, tensor in tensors.items() if key.endswith(".shira_gaps")},
        kept={site: layer.places for site, layer in tuned.items()},
        settle=settle,
    )


# Masks


def _index(
    place: Place, settings: ShiraSettings, layers: Mapping[str, nn.Linear], mask_fn: MaskFn | None
) -> dict[str, Tensor]:
    """site -> the places that learn: those of the checkpoint, else chosen anew."""
    if place.saved is not None:
        kept = {
            name.removeprefix("kept/"): t
            for name, t in place.saved.tensors.items()
            if name.startswith("kept/")
        }
        return {site: kept[site] for site in layers if site in kept}
    if mask_fn is not None:
        return _from_function(mask_fn, layers, settings.percent)
    taken = _taken(settings.avoid)
    if settings.recipe is not None:
        return _drawn(settings.recipe, layers, taken)
    if settings.mask == "magnitude":
        scores = {site: layer.weight.detach for site, layer in layers.items()}
    else:
        scores = {site: (lambda t=t: t) for site, t in _calibrated(place, settings, layers).items()}
    return choose(
        scores,
        percent=settings.percent,
        scope=settings.scope,
        member=settings.member,
        family=settings.family,
        taken=taken,
    )


def _taken(files: Sequence[str]) -> dict[str, Tensor]:
    """Per site the entries that sparse adapters in `files` own. Raises AdapterError."""
    found: dict[str, list[Tensor]] = {}
    for path in files:
        for site, delta in load(path).deltas.items():
            if isinstance(delta, Sparse):
                found.setdefault(site, []).append(delta.index.long())
    return {site: torch.cat(parts).unique() for site, parts in found.items()}


def _drawn(recipe: Recipe, layers: Mapping[str, nn.Linear], taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    index = {site: recipe.draw(site, tuple(layer.weight.shape)) for site, layer in layers.items()}
    for site in index.keys() & taken.keys():
        index[site] = index[site][~torch.isin(index[site], taken[site])]
    index = {site: places for site, places in index.items() if places.numel()}
    check_any(index, recipe.percent)
    return index


def _from_function(mask_fn: MaskFn, layers: Mapping[str, nn.Linear], percent: float) -> dict[str, Tensor]:
    index = {}
    for site, layer in layers.items():
        rows, columns = layer.weight.shape
        mask = mask_fn(layer, max(1, round(percent / 100 * rows * columns / (rows + columns))))
        if mask.shape != layer.weight.shape:
            raise TrainingError(
                f"the mask of {site} has shape {tuple(mask.shape)}, its weight {(rows, columns)}"
            )
        index[site] = mask.flatten().nonzero().flatten()
        if index[site].numel() * 100 > LIMIT * mask.numel():
            raise TrainingError(f"the mask of {site} selects more than {LIMIT:g} percent of the weight")
    check_any(index, percent)
    return {site: places for site, places in index.items() if places.numel()}


def _calibrated(place: Place, settings: ShiraSettings, layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """Sum over batches of |gradient| (times |weight| for snip), float32, shaped like the weights.

    Each batch takes the loss at noise levels spread evenly over all of them. One gradient lives at a time; the scores
    need 4 bytes an entry of the layers that learn.
    """
    scores = {site: torch.zeros_like(layer.weight, dtype=torch.float32) for site, layer in layers.items()}

    def gather(weight: nn.Parameter, score: Tensor) -> None:
        score += weight.grad.abs()
        weight.grad = None

    hooks = []
    try:
        for site, layer in layers.items():
            layer.weight.requires_grad_(True)
            hook = functools.partial(gather, score=scores[site])
            hooks.append(layer.weight.register_post_accumulate_grad_hook(hook))
        for number in range(settings.calibration):
            _backward(place, settings, number)
    finally:
        for layer in layers.values():
            layer.weight.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    for site, score in scores.items():
        if settings.mask == "snip":
            score *= layers[site].weight.abs()
        if not bool(score.isfinite().all()):
            raise TrainingError(f"the gradient at {site} is no number; use --precision no, or another mask")
        if place.accelerator.num_processes > 1:
            scores[site] = broadcast(score)
    return scores


def _backward(place: Place, settings: ShiraSettings, number: int) -> None:
    """One calibration batch; row i of batch n takes a noise level of stratum n + i * batches."""
    generator = step_generator(settings.seed, number, _CALIBRATION)
    batch = place.on_device(place.source(generator))
    count = len(batch.latents)
    stratum = number + torch.arange(count) * settings.calibration
    inside = torch.rand(count, generator=generator, dtype=torch.float64) * 0.998 + 0.001
    batch = dataclasses.replace(batch, moments=(stratum + inside) / (count * settings.calibration))
    with sdpa_kernel(KERNELS), place.accelerator.autocast():
        value = place.loss(batch, generator)
    place.accelerator.backward(value)


# The layer


class SparseLinear(peft_shira.Linear):
    """peft's SHiRA layer with the places given, and without its dense copy: values live in the weight.

    `merge` writes kept + scale * value into the entries, `unmerge` puts the kept ones back, bit for bit. The layer is
    merged whenever it acts. One adapter, called `compose`; `places` are flat, rising.
    """

    def __init__(self, base_layer: nn.Linear, places: Tensor) -> None:
        nn.Module.__init__(self)
        peft_shira.ShiraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = _NAME
        weight = base_layer.weight
        small = weight.numel() < 2**31
        self.places = places.to(weight.device, torch.int32 if small else torch.int64)
        self.kept = weight.detach().flatten().index_select(0, self.places)
        self.scaling[_NAME] = 1.0
        self.shira_weight[_NAME] = nn.Parameter(torch.zeros(len(places), device=weight.device))
        self.gradient = _gradient_of(self.places, *weight.shape)

    @property
    def _flat(self) -> Tensor:
        return self.base_layer.weight.data.view(-1)

    def delta(self) -> Sparse:
        """What the layer has learned, on the CPU."""
        value = self.shira_weight[_NAME].detach() * self.scaling[_NAME]
        return Sparse(
            index=self.places.long().cpu(), value=value.cpu(), shape=tuple(self.base_layer.weight.shape)
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight as a sparse tensor, (rows, columns)."""
        columns = self.in_features
        pairs = torch.stack([self.places // columns, self.places % columns])
        value = self.shira_weight[adapter] * self.scaling[adapter]
        return torch.sparse_coo_tensor(pairs, value, (self.out_features, columns), check_invariants=False)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the values into the weight, whatever was written before. `safe_merge` refuses what is not finite."""
        value = torch.add(self.kept, self.shira_weight[_NAME], alpha=self.scaling[_NAME]).to(self.kept.dtype)
        if safe_merge and not bool(value.isfinite().all()):
            raise ValueError("the adapter holds values that are no numbers")
        self._flat.index_copy_(0, self.places.long(), value)
        self.merged_adapters = [_NAME]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own entries back."""
        if self.merged:
            self._flat.index_copy_(0, self.places.long(), self.kept)
            self.merged_adapters = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            self.unmerge()
            return self.base_layer(x)
        if not self.merged:
            self.merge()
        value, weight = self.shira_weight[_NAME], self.base_layer.weight
        if not (torch.is_grad_enabled() and value.requires_grad):
            return self.base_layer(x)
        scaled = value if self.scaling[_NAME] == 1.0 else value * self.scaling[_NAME]
        return _Overwritten.apply(x, scaled, weight, self.base_layer.bias, self.gradient)


class _Overwritten(torch.autograd.Function):
    """x W^T + b, where entries of W hold kept + value: gradients go to x and to the values, never to all of W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, gradient: Gradient
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            back = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            flat = x.to(grad.dtype).flatten(0, -2)
            found = ctx.gradient(grad.flatten(0, -2), flat) if ctx.needs_input_grad[1] else None
        return back, found, None, None, None


Gradient = Callable[[Tensor, Tensor], Tensor]
"""(gradient of the output (T, rows), input (T, columns)) -> gradient of the chosen entries, float32."""


def _gradient_of(places: Tensor, rows: int, columns: int) -> Gradient:
    """The cheaper way to the gradient of these entries: alone where they are whole rows and little else, else out of
    the full one."""
    row, column = places // columns, places % columns
    whole = torch.bincount(row, minlength=rows) == columns
    inside = whole[row]
    if int((~inside).sum()) > rows + columns:
        return functools.partial(_gathered, places=places)
    return functools.partial(
        _by_rows, rows=whole.nonzero().flatten(), inside=inside, row=row[~inside], column=column[~inside]
    )


def _gathered(grad: Tensor, x: Tensor, *, places: Tensor) -> Tensor:
    return (grad.mT @ x).flatten().index_select(0, places).float()


def _by_rows(grad: Tensor, x: Tensor, *, rows: Tensor, inside: Tensor, row: Tensor, column: Tensor) -> Tensor:
    found = torch.empty(len(inside), device=grad.device)
    found[inside] = (grad.index_select(1, rows).mT @ x).flatten().float()
    found[~inside] = (grad.index_select(1, row) * x.index_select(1, column)).sum(0, dtype=torch.float32)
    return found
