"""A file of any spelling -> `Adapter`; whatever is not understood is named, never dropped in silence."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compose.adapter import Adapter, Delta, LowRank
from compose.digest import file_digest
from compose.errors import AdapterError
from compose.formats import files
from compose.formats.bfl import Split
from compose.formats.family import detect, from_metadata, from_widths
from compose.formats.kinds import Change, Scaling, change, shape_of, take_rows
from compose.formats.names import canonical, locate, split
from compose.formats.sparse import placed

_REFUSED = re.compile(
    r"\.(oft_\w+|boft_\w+|[abr][12]\.weight|glora_\w+|on_input|lora_embedding_[AB]|ia3_l)(?:\.|$)"
)
_REPEATS = re.compile(r"\)[*+{]")  # a repeated group can take forever to match, and files are not trusted
_PEFT_CONFIG = (
    "lora_adapter_metadata"  # written by diffusers: one peft config per component, keys prefixed by it
)


@dataclass(frozen=True, slots=True)
class Report:
    """How much of an adapter fits a base: `matched` of `total` modules, and what did not, each with its reason."""

    matched: int
    total: int
    unmatched: tuple[str, ...]

    def __str__(self) -> str:
        line = f"{self.matched} of {self.total} modules matched"
        return f"{line}; not matched: {_some(self.unmatched)}" if self.unmatched else line


def _plain(text: str) -> str:
    """A name from a file as it may be shown: one line, nothing that a terminal acts on."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 160 else f"{text[:160]}..."


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def load(path: str | Path, *, name: str | None = None, strict: bool = False) -> Adapter:
    """The adapter in a .safetensors file (or in a diffusers or peft folder that holds one).

    Raises AdapterError for pickles (never opened), damaged files, NaN or infinite weights, and files without one
    usable delta; with `strict` also if any key is not understood. Tensors stay on the CPU in their stored dtype.
    """
    path = files.resolve(path)
    metadata = files.read_metadata(path)
    tensors = files.read_tensors(path)
    modules, strange = group(tensors)
    beside = _peft_config(path)
    try:
        modules = placed(modules, metadata, beside)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    spelled = detect(tensors).family or from_metadata(metadata)
    deltas, biases, reasons = _changes(modules, spelled, Scalings(metadata, beside))
    unmatched = tuple(strange + reasons)
    if not deltas and not biases:
        raise AdapterError(_nothing(path, tensors, unmatched))
    if strict and unmatched:
        raise AdapterError(f"{path}: {len(unmatched)} modules are not understood: {_some(unmatched)}")
    return Adapter(
        name=name or path.stem,
        family=_family(spelled, deltas),
        deltas=deltas,
        biases=biases,
        metadata=metadata,
        path=str(path),
        sha256=file_digest(path),
        unmatched=unmatched,
    )


def _family(spelled: str, deltas: Mapping[str, Delta]) -> str:
    """The family as spelled; widths tell SD1.5 from SD2, whose keys are alike, and where keys say nothing at all."""
    if spelled not in ("", "sd15"):
        return spelled
    shapes = {site: shape for site, delta in deltas.items() if (shape := shape_of(delta))}
    return from_widths({site: shape[1] for site, shape in shapes.items() if len(shape) > 1}) or spelled


def _nothing(path: Path, tensors: Mapping[str, Tensor], unmatched: tuple[str, ...]) -> str:
    if not tensors:
        return f"{path} holds no tensors"
    why = _some(unmatched, 2)
    return (
        f"{path} is not an adapter this program knows: none of its {len(tensors)} keys gives a delta ({why})"
    )


def group(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by module and part, and the keys that are no part of any adapter format."""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    strange = []
    for key, tensor in tensors.items():
        part = split(key)
        if part is None:
            match = _REFUSED.search(key)
            reason = f"{match[1]} is not supported" if match else "not an adapter key"
            strange.append(f"{_plain(key)}: {reason}")
        else:
            modules[part.module][part.part] = tensor
    return dict(modules), strange


def _changes(
    modules: Mapping[str, Mapping[str, Tensor]], family: str, scalings: Scalings
) -> tuple[dict[str, Delta], dict[str, Tensor], list[str]]:
    deltas: dict[str, Delta] = {}
    biases: dict[str, Tensor] = {}
    reasons = []
    for module, parts in modules.items():
        try:
            pieces = _pieces(module, parts, family, scalings)
        except AdapterError as error:
            reasons.append(f"{_plain(module)}: {error}")
            continue
        for site, piece in pieces:
            if site in deltas or site in biases:
                reasons.append(f"{_plain(module)}: names {_plain(site)} a second time")
                continue
            if piece.delta is not None:
                deltas[site] = piece.delta
            if piece.bias is not None:
                biases[site] = piece.bias
    return deltas, biases, reasons


def _pieces(
    module: str, parts: Mapping[str, Tensor], family: str, scalings: Scalings
) -> list[tuple[str, Change]]:
    targets = locate(module, family)
    if not targets:
        raise AdapterError("no such module in any known base")
    changed = change(parts, scalings.of(targets[0].site, parts))
    if len(targets) == 1 and targets[0].split is Split.WHOLE:
        return [(targets[0].site, changed)]
    rows, columns = _rows_columns(changed)
    pieces = [(target.site, take_rows(changed, target.rows(rows, columns))) for target in targets]
    return [(site, piece) for site, piece in pieces if not _is_zero(piece)] or pieces


def _is_zero(piece: Change) -> bool:
    """A share of a fused module that was filled with zeros because the adapter does not touch that site."""
    return piece.bias is None and isinstance(piece.delta, LowRank) and not bool(piece.delta.up.any())


def _rows_columns(changed: Change) -> tuple[int, int | None]:
    if changed.shape:
        return changed.shape[0], math.prod(changed.shape[1:])
    if changed.bias is None:
        raise AdapterError("its shape is not told")
    return changed.bias.shape[0], None


class Scalings:
    """The alpha of each module, applied exactly once: its own key first, then the header's peft config, else none."""

    def __init__(self, metadata: Mapping[str, str], beside: Mapping[str, Any]) -> None:
        configs = _components(metadata) or ({"": beside} if beside else {})
        self._configs = {component: _Config.read(config) for component, config in configs.items()}

    def of(self, site: str, parts: Mapping[str, Tensor]) -> Scaling:
        """The scaling of the module at `site` (component.path) whose tensors are `parts`."""
        if "alpha" in parts:
            return Scaling(float(parts["alpha"].float().mean()))
        component, _, path = site.partition(".")
        config = self._configs.get(component) or self._configs.get("")
        return config.scaling(path) if config else Scaling()


Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True, slots=True)
class _Config:
    """What a peft config says about scale; `rank` is None where the tensors tell it (LoRA)."""

    alpha: float | None
    stabilised: bool
    rank: float | None
    alphas: Patterns
    ranks: Patterns

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> _Config:
        lora = "lora_alpha" in config
        alpha = config.get("lora_alpha", config.get("alpha"))
        return cls(
            alpha=alpha if isinstance(alpha, int | float) else None,
            stabilised=bool(config.get("use_rslora")),
            rank=None if lora else config.get("r", 8),
            alphas=_patterns(config.get("alpha_pattern")),
            ranks=_patterns(config.get("rank_pattern")),
        )

    def scaling(self, path: str) -> Scaling:
        if self.alpha is None:
            return Scaling()
        rank = None if self.rank is None else int(_first(self.ranks, path, self.rank))
        return Scaling(float(_first(self.alphas, path, self.alpha)), self.stabilised, rank)


def _first(patterns: Patterns, path: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _patterns(table: Any) -> Patterns:
    """peft's rule: a pattern is matched with the end of a module's path, from a dot on."""
    found = []
    for pattern, value in table.items() if isinstance(table, dict) else ():
        if _REPEATS.search(pattern) or len(re.findall(r"(?<!\\)[*+{]", pattern)) > 3:
            raise AdapterError(
                f"the pattern '{_plain(pattern)}' in the file's peft config repeats too much to be tried"
            )
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), float(value)))
        except (re.error, TypeError, ValueError) as error:
            raise AdapterError(
                f"the file's peft config cannot be used: '{_plain(pattern)}': {error}"
            ) from error
    return tuple(found)


def _components(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """diffusers' header entry, `{"transformer.lora_alpha": 8, ...}`, as one peft config per component."""
    configs: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in _json_object(metadata.get(_PEFT_CONFIG, "{}")).items():
        component, dot, name = key.partition(".")
        configs[component if dot else ""][name if dot else component] = value
    return dict(configs)


def _peft_config(path: Path) -> dict[str, Any]:
    """`adapter_config.json` beside a peft file, or nothing."""
    beside = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not beside.is_file():
        return {}
    return _json_object(beside.read_text(encoding="utf-8", errors="replace"))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise AdapterError(f"the file's peft config is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def report(adapter: Adapter | str | Path, modules: Iterable[str] | Mapping[str, Any]) -> Report:
    """How `adapter` (or the file at that path) fits a base whose site names are `modules`.

    `modules` may map each site to its weight's shape, or to anything with a `shape`, as `compose.sites.Sites` does;
    then shapes are compared too. A site is `component.module.path`; CLIP's `text_model.` level may be there or not.
    """
    if not isinstance(adapter, Adapter):
        adapter = load(adapter)
    shapes = (
        {canonical(site): getattr(shape, "shape", shape) for site, shape in modules.items()}
        if isinstance(modules, Mapping)
        else {}
    )
    known = set(shapes) or {canonical(site) for site in modules}
    sites = sorted({canonical(site) for site in (*adapter.deltas, *adapter.biases)})
    reasons = {site: why for site in sites if (why := _misfit(adapter, site, known, shapes))}
    unmatched = tuple(f"{site}: {why}" for site, why in reasons.items()) + adapter.unmatched
    return Report(len(sites) - len(reasons), len(sites) + len(adapter.unmatched), unmatched)


def _misfit(
    adapter: Adapter, site: str, known: set[str], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    if site not in known:
        return "the base has no such module"
    shape = shape_of(adapter.deltas[site]) if site in adapter.deltas else None
    base = shapes.get(site)
    if shape and base and not _same_shape(shape, base):
        return f"made for {'x'.join(map(str, shape))}, the base has {'x'.join(map(str, base))}"
    return None


def _same_shape(ours: tuple[int, ...], base: tuple[int, ...]) -> bool:
    """Equal, or equal once flattened as files flatten kernels: (out, in) beside (out, in, 1, 1)."""
    return tuple(ours) == tuple(base) or (ours[0] == base[0] and math.prod(ours) == math.prod(base))
