"""How sparse adapters (SHiRA) lie in a file: values, and the places they belong to in as few bytes as can be.

A module has `shira_weight` (n,). Its places are not stored at all where they follow from the recipe in the header;
else `shira_gaps` (bytes) holds them; peft's own layout is `shira_indices` (2, n), row and column. The header entry
`compose.sparse` gives the recipe and the shape of every weight.

`shira_gaps` codes rising places in the way of Elias and Fano: the low bits of each as they are, the high ones by their
differences in unary. That is within half a bit of the least possible, 7.6 bits a place at 2 % and 8.6 at 1 %.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compose.adapter import Sparse
from compose.errors import AdapterError, ComposeError
from compose.formats.names import canonical
from compose.sparse import Recipe, count_of, in_order

HEADER = "compose.sparse"
_LARGEST = 1 << 36  # entries of one weight; a header that claims more is not believed
_SPARE = 1 << 20

Modules = Mapping[str, Mapping[str, Tensor]]


def pack(index: Tensor, size: int) -> Tensor:
    """Rising places (n,) below `size` as bytes, uint8."""
    places, low = index.cpu().numpy().astype(np.int64), _low_bits(index.numel(), size)
    marks = np.zeros(len(places) + ((size - 1) >> low) + 1, dtype=np.uint8)
    marks[(places >> low) + np.arange(len(places))] = 1
    lows = ((places[:, None] >> np.arange(low)) & 1).astype(np.uint8)
    return torch.from_numpy(np.concatenate([np.packbits(lows), np.packbits(marks)]))


def unpack(code: Tensor, count: int, size: int) -> Tensor:
    """The `count` places (int64) that `pack` wrote. Raises AdapterError (one clause) for other bytes."""
    low = _low_bits(count, size)
    held, marked = (count * low + 7) // 8, (count + ((size - 1) >> low) + 8) // 8
    if code.dtype != torch.uint8 or code.numel() != held + marked:
        raise AdapterError(f"{code.numel()} bytes of places where {held + marked} belong")
    raw = code.numpy()
    marks = np.flatnonzero(np.unpackbits(raw[held:]))
    if len(marks) != count:
        raise AdapterError(f"its bytes hold {len(marks)} places for {count} values")
    lows = np.unpackbits(raw[:held], count=count * low).reshape(count, low).astype(np.int64)
    return torch.from_numpy((marks - np.arange(count) << low) + (lows << np.arange(low)).sum(1))


def _low_bits(count: int, size: int) -> int:
    return max(0, (size // max(1, count)).bit_length() - 1)


# Reading


def placed(
    modules: Modules, metadata: Mapping[str, str], peft: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """`modules` with the places of every sparse one as `shira_flat` (int64, rising) and its `shira_shape`.

    `peft` is the config beside a peft file. Where nothing tells the shape of a weight, its pairs stay as they are.
    Raises AdapterError, naming the module, for places that cannot be.
    """
    told = _told(metadata)
    found = {}
    for module, parts in modules.items():
        found[module] = dict(parts)
        if "shira_weight" not in parts:
            continue
        try:
            found[module] |= _places(module, parts, told, peft)
        except ComposeError as error:
            raise AdapterError(f"sparse weights of {module} are damaged: {error}") from error
    return found


def _told(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        told = json.loads(metadata.get(HEADER, "{}"))
    except ValueError as error:
        raise AdapterError(f"the header entry {HEADER} is not JSON: {error}") from error
    if not isinstance(told, dict) or not isinstance(told.get("shapes", {}), dict):
        raise AdapterError(f"the header entry {HEADER} is not what it should be")
    return told


def _places(
    module: str, parts: Mapping[str, Tensor], told: Mapping[str, Any], peft: Mapping[str, Any]
) -> dict[str, Tensor]:
    value = parts["shira_weight"].flatten()
    shape = _shape(module, parts, told, peft)
    if shape is None:
        return {}
    if "shira_gaps" in parts:
        index = unpack(parts["shira_gaps"], value.numel(), math.prod(shape))
    elif "shira_indices" in parts:
        index = _from_pairs(parts["shira_indices"], value.numel(), shape)
    else:
        index = _drawn(module, value.numel(), shape, told)
    delta = in_order(Sparse(index=index, value=value, shape=shape))
    return {"shira_flat": delta.index, "shira_weight": delta.value, "shira_shape": torch.tensor(shape)}


def _shape(
    module: str, parts: Mapping[str, Tensor], told: Mapping[str, Any], peft: Mapping[str, Any]
) -> tuple[int, ...] | None:
    shape = told.get("shapes", {}).get(module)
    if shape is None and "shira_shape" in parts:
        shape = parts["shira_shape"].tolist()
    if shape is None:
        return _guessed(parts, peft)
    whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    if not whole or not 2 <= len(shape) <= 5 or math.prod(shape) > _LARGEST:
        raise AdapterError(f"no weight has the shape {shape}")
    return tuple(shape)


def _guessed(parts: Mapping[str, Tensor], peft: Mapping[str, Any]) -> tuple[int, int] | None:
    """peft stores no shape, but r * (rows + columns) values: where the highest places agree with that, they tell it."""
    pairs, rank = parts.get("shira_indices"), peft.get("r")
    if pairs is None or pairs.dim() != 2 or not pairs.numel() or not isinstance(rank, int):
        return None
    rows, columns = (int(place) + 1 for place in pairs.amax(1))
    return (rows, columns) if rank * (rows + columns) == parts["shira_weight"].numel() else None


def _from_pairs(pairs: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    if pairs.shape != (2, count):
        raise AdapterError(f"indices of shape {tuple(pairs.shape)} for {count} values")
    rows, columns = shape[0], math.prod(shape[1:])
    row, column = pairs.long()
    if bool((pairs < 0).any() or (row >= rows).any() or (column >= columns).any()):
        raise AdapterError(f"indices lie outside {rows} x {columns}")
    return row * columns + column


def _drawn(module: str, count: int, shape: tuple[int, ...], told: Mapping[str, Any]) -> Tensor:
    """The places of a drawn mask; a header that asks for far more of them than there are values is not followed."""
    recipe = _recipe(told)
    if recipe is None:
        raise AdapterError("neither places nor a recipe for them")
    size = math.prod(shape)
    index = torch.empty(0)
    if (
        count_of(size, recipe.percent) <= 2 * count + _SPARE
        and max(shape) <= _SPARE
        and recipe.family <= _SPARE
    ):
        index = recipe.draw(canonical(module), shape)
    if index.numel() != count:
        raise AdapterError(f"its recipe gives other than {count} places of {'x'.join(map(str, shape))}")
    return index


# Writing


def parts_of(deltas: Mapping[str, Sparse], metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], str]:
    """Tensors and header entry of sparse deltas by module name.

    Places are left out where the recipe that `metadata` holds, if any, draws exactly these. Raises AdapterError.
    """
    deltas = {module: _checked(module, delta) for module, delta in deltas.items()}
    recipe = recipe_of(metadata)
    drawn = recipe is not None and all(_follows(recipe, *item) for item in deltas.items())
    tensors = {f"{module}.shira_weight": delta.value for module, delta in deltas.items()}
    if not drawn:
        tensors |= {
            f"{module}.shira_gaps": pack(delta.index, math.prod(delta.shape))
            for module, delta in deltas.items()
        }
    return tensors, header(deltas, recipe if drawn else None)


def header(deltas: Mapping[str, Sparse], recipe: Recipe | None = None) -> str:
    """The header entry `compose.sparse`."""
    told: dict[str, Any] = {"shapes": {module: list(delta.shape) for module, delta in deltas.items()}}
    if recipe is not None:
        told["recipe"] = dataclasses.asdict(recipe)
    return json.dumps(told, sort_keys=True)


def recipe_of(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe that a file's header holds."""
    return _recipe(_told(metadata))


def _recipe(told: Mapping[str, Any]) -> Recipe | None:
    given, fields = told.get("recipe"), {field.name for field in dataclasses.fields(Recipe)}
    whole = isinstance(given, dict) and {"mask", "percent"} <= given.keys() <= fields
    return Recipe(**given) if whole else None


def _follows(recipe: Recipe, module: str, delta: Sparse) -> bool:
    return torch.equal(recipe.draw(canonical(module), delta.shape), delta.index.cpu().long())


def _checked(module: str, delta: Sparse) -> Sparse:
    try:
        return in_order(delta)
    except AdapterError as error:
        raise AdapterError(f"sparse weights of {module} cannot be written: {error}") from error


def peft_parts(deltas: Mapping[str, Sparse]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config in peft's SHiRA layout, by module path.

    peft fixes the number of values to r * (rows + columns); what is missing is filled up with zeros at free places.
    Raises AdapterError for weights that are no matrices.
    """
    odd = next((module for module, delta in deltas.items() if len(delta.shape) != 2), None)
    if odd is not None:
        raise AdapterError(f"{odd} is a convolution, which peft's SHiRA does not know: write diffusers")
    rank = max(math.ceil(delta.value.numel() / sum(delta.shape)) for delta in deltas.values())
    tensors = {}
    for module, delta in deltas.items():
        filled = _filled(module, _checked(module, delta), rank)
        columns = delta.shape[1]
        tensors[f"{module}.shira_weight"] = filled.value
        tensors[f"{module}.shira_indices"] = torch.stack(
            [filled.index // columns, filled.index % columns]
        ).int()
    return tensors, {"peft_type": "SHIRA", "r": rank, "mask_type": "random", "inference_mode": True}


def _filled(module: str, delta: Sparse, rank: int) -> Sparse:
    count, size = rank * sum(delta.shape), math.prod(delta.shape)
    if count > size:
        raise AdapterError(
            f"{module} of {'x'.join(map(str, delta.shape))} cannot hold peft's r = {rank}: write diffusers"
        )
    free = torch.ones(size, dtype=torch.bool)
    free[delta.index.long()] = False
    more = free.nonzero().flatten()[: count - delta.value.numel()]
    value = torch.cat([delta.value, delta.value.new_zeros(more.numel())])
    return in_order(Sparse(index=torch.cat([delta.index.long(), more]), value=value, shape=delta.shape))
