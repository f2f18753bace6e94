"""Any adapter, or a fully fine-tuned model, as a sparse adapter: the largest entries of the change are kept.

How much is lost is known: `compose.algebra.error` of the result against the whole change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compose.adapter import Adapter, Delta, Dense, Sparse
from compose.errors import AdapterError
from compose.formats import dense, shape_of
from compose.sparse import choose


def sparsify(adapter: Adapter, *, percent: float, scope: str = "layer") -> Adapter:
    """`adapter` with each delta cut to its largest entries: `percent` of each weight, or of all (`scope` global).

    Values are float32. Biases and vectors are left out, since sparse adapters hold none (see `matrices`); deltas that
    read the base's weights must be `bound` first. One delta is in memory at a time, computed four times. Raises
    AdapterError and RequestError.
    """
    adapter = matrices(adapter)
    changes = {site: _change(site, delta) for site, delta in adapter.deltas.items()}
    chosen = choose(changes, percent=percent, scope=scope)
    deltas = {site: _cut(changes[site](), index) for site, index in chosen.items()}
    return replace(adapter, deltas=deltas, path=None, sha256=None)


def matrices(adapter: Adapter) -> Adapter:
    """The part of an adapter that sparse ones can hold: changes of linear layers and convolutions."""
    held = {site: delta for site, delta in adapter.deltas.items() if len(shape_of(delta) or (0, 0)) >= 2}
    if not held:
        raise AdapterError(f"{adapter.name} changes no matrix, so no sparse adapter can stand in for it")
    return replace(adapter, deltas=held, biases={})


def _change(site: str, delta: Delta) -> Callable[[], Tensor]:
    shape = shape_of(delta)
    if shape is None:
        raise AdapterError(f"the {delta.kind} delta at {site} depends on the base's weights; give --base")
    return partial(dense, delta, torch.zeros(()).expand(shape))


def _cut(change: Tensor, index: Tensor) -> Sparse:
    return Sparse(index=index, value=change.flatten()[index], shape=tuple(change.shape))


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a diffusers folder's denoiser, read one by one: shapes and files by name (`transformer.a.weight`)."""

    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, Path]

    @classmethod
    def open(cls, folder: str | Path) -> Weights:
        """Raises AdapterError for a folder that holds no denoiser in safetensors."""
        folder = Path(folder).expanduser()
        for component in ("transformer", "unet"):
            if found := sorted((folder / component).glob("*.safetensors")):
                return cls(*_listed(component, _plain(found)))
        raise AdapterError(f"'{folder}' is no diffusers folder with a denoiser in .safetensors")

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, as stored, on the CPU."""
        with _opened(self.files[name]) as file:
            return file.get_tensor(name.partition(".")[2])


def _listed(component: str, paths: list[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    shapes, files = {}, {}
    for path in paths:
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                shapes[f"{component}.{key}"] = tuple(file.get_slice(key).get_shape())
                files[f"{component}.{key}"] = path
    return shapes, files


def _plain(paths: list[Path]) -> list[Path]:
    """The weights without a variant ("fp16"), where both lie in the folder."""
    return [path for path in paths if path.name.count(".") == 1] or paths


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged or truncated: {error}") from error


def bound(adapter: Adapter, base: Weights) -> Adapter:
    """`adapter` with every delta that reads the base's weights (DoRA) tied to those of `base`. Raises AdapterError."""
    loose = [site for site, delta in adapter.deltas.items() if shape_of(delta) is None]
    missing = next((site for site in loose if f"{site}.weight" not in base.files), None)
    if missing is not None:
        raise AdapterError(f"adapter '{adapter.name}' does not fit this base, which has no {missing}")
    tied = {site: _tied(adapter.deltas[site], base, f"{site}.weight") for site in loose}
    return replace(adapter, deltas={**adapter.deltas, **tied})


def _tied(delta: Dense, base: Weights, name: str) -> Dense:
    return Dense(
        compute=lambda weight: delta.compute(base.read(name)), kind=delta.kind, shape=base.shapes[name]
    )


def difference(tuned: Weights, base: Weights, *, name: str, family: str) -> Adapter:
    """What full fine-tuning changed, by site, each change computed when it is asked for.

    A bias is a bias; of anything else that has no site (a table, a norm's vector) the name stands for the site.
    Raises AdapterError for models that differ in more than numbers, or not at all.
    """
    odd = sorted({key for key, _ in tuned.shapes.items() ^ base.shapes.items()})
    if odd:
        raise AdapterError(
            f"the two models are not of one architecture: {odd[0]} is {tuned.shapes.get(odd[0])} in the one, "
            f"{base.shapes.get(odd[0])} in the other"
        )
    changed = [key for key in base.shapes if not torch.equal(tuned.read(key).float(), base.read(key).float())]
    if not changed:
        raise AdapterError("the two models have the same weights; there is nothing to convert")
    deltas = {
        key.removesuffix(".weight"): _moved(tuned, base, key) for key in changed if not key.endswith(".bias")
    }
    biases = {
        key.removesuffix(".bias"): tuned.read(key).float() - base.read(key).float()
        for key in changed
        if key.endswith(".bias")
    }
    return Adapter(name=name, family=family, deltas=deltas, biases=biases)


def _moved(tuned: Weights, base: Weights, key: str) -> Dense:
    return Dense(
        compute=lambda weight: tuned.read(key).float() - base.read(key).float(),
        kind="diff",
        shape=base.shapes[key],
    )
