"""Gate files: safetensors whose header names the base; found by that, never by a path that a stranger gave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from compose.assets import ROOT
from compose.digest import file_digest, write_atomic
from compose.errors import RequestError, unknown
from compose.gates.full import VECTORS, FullGate
from compose.gates.light import LightGate, LightShape
from compose.header import read_header
from compose.policies.gated import FORMS
from compose.sites import Sites

GATES = ROOT / "gates"  # shipped
USER_GATES = Path(platformdirs.user_data_path("lora-compose")) / "gates"  # what `compose train gate` wrote
KIND = "compose.gate"  # in the header: the forms inside, comma-separated
_HOW = "train one with 'compose train gate', or choose another --policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """What one file holds. `base_sha256` is the base it was trained on."""

    name: str
    family: str
    base_sha256: str
    sha256: str = ""
    full: FullGate | None = None
    light: LightGate | None = None

    def check(self, form: str, sites: Sites) -> None:
        """Raises RequestError for a form that the file lacks, and for layers of other widths than the base's."""
        if form not in FORMS:
            raise RequestError(unknown("form of policy 'gated'", form, FORMS))
        if getattr(self, form) is None:
            has = " and ".join(each for each in FORMS if getattr(self, each) is not None)
            raise RequestError(f"gate '{self.name}' has no {form} form, only {has}; {_HOW}")
        known = self.full.sites if form == "full" else self.light.shape.sites
        if not any(site in sites for site in known):
            raise RequestError(
                f"gate '{self.name}' does not fit this base: none of its layers is here; {_HOW}"
            )
        for site in self.full.sites if form == "full" else ():
            width = self.full.vectors(site).shape[1]
            if site in sites and width != sites[site].shape[0]:
                raise RequestError(
                    f"gate '{self.name}' does not fit this base: {width} channels at {site}, the base has "
                    f"{sites[site].shape[0]}; {_HOW}"
                )


def find(families: Sequence[str], base_sha256: str, name: str = "") -> Path:
    """The gate file for a base: one trained on these very weights, else one of its family, the user's own first.

    `name` asks for one file by its stem. Raises RequestError where there is none.
    """
    known = {path.stem: path for path in reversed(list(_files()))}
    if name:
        if name not in known:
            raise RequestError(unknown("gate", name, known or ["(none)"]))
        return known[name]
    headers = [(path, read_header(path).metadata) for path in _files()]
    exact = [path for path, said in headers if said.get("compose.base_sha256") == base_sha256 != ""]
    alike = [path for path, said in headers if said.get("compose.family") == families[0]]
    if not exact and not alike:
        have = ", ".join(sorted({said.get("compose.family", "unknown") for _, said in headers})) or "no base"
        raise RequestError(
            f"policy 'gated' has no gate for {families[0]}; the gates here are for {have}: {_HOW}"
        )
    return (exact or alike)[0]


def _files() -> Iterator[Path]:
    """Every gate file, newest of the user's own first, then the shipped ones."""
    for folder in (USER_GATES, GATES):
        paths = [path for path in folder.glob("*.safetensors") if KIND in read_header(path).metadata]
        yield from sorted(paths, key=lambda path: (-path.stat().st_mtime, path.name))


def save(
    path: Path,
    *,
    family: str,
    base_sha256: str = "",
    full: Mapping[str, Tensor] | None = None,
    light: LightGate | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a gate of either or both forms in float16. `notes` go into the header."""
    tensors = {f"full.{site}": vectors for site, vectors in (full or {}).items()}
    header = {
        "format": "pt",
        KIND: ",".join(form for form, part in (("full", full), ("light", light)) if part),
        "compose.family": family,
        "compose.base_sha256": base_sha256,
        **(notes or {}),
    }
    if light is not None:
        tensors |= {f"light.{key}": value for key, value in light.state_dict().items()}
        header["compose.light"] = json.dumps(asdict(light.shape))
    small = {key: value.detach().half().cpu().contiguous() for key, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_bytes(small, header))
    return path


def load(path: Path) -> Gates:
    """Read a gate file. Raises RequestError for one that is damaged or no gate, AdapterError for an unsafe one."""
    said = read_header(path).metadata
    if KIND not in said:
        raise RequestError(f"'{path}' is no gate; {_HOW}")
    try:
        tensors = {key: value.float() for key, value in load_file(path).items()}
        full = {key.removeprefix("full."): v for key, v in tensors.items() if key.startswith("full.")}
        light = _light(said, tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise RequestError(f"gate '{path}' is damaged: {error}; {_HOW}") from error
    for site, vectors in full.items():
        if vectors.dim() != 2 or len(vectors) != len(VECTORS) or not torch.isfinite(vectors).all():
            raise RequestError(f"gate '{path}' is damaged at {site}; {_HOW}")
    return Gates(
        name=path.stem,
        family=said.get("compose.family", ""),
        base_sha256=said.get("compose.base_sha256", ""),
        sha256=file_digest(path),
        full=FullGate(full) if full else None,
        light=light,
    )


def _light(said: Mapping[str, str], tensors: Mapping[str, Tensor]) -> LightGate | None:
    if "compose.light" not in said:
        return None
    shape = json.loads(said["compose.light"])
    gate = LightGate(LightShape(**(shape | {"sites": tuple(shape["sites"])})))
    gate.load_state_dict(
        {key.removeprefix("light."): v for key, v in tensors.items() if key.startswith("light.")}
    )
    return gate.eval().requires_grad_(False)
