"""What community files say about an adapter, turned into one card.

An adapter file `name.safetensors` speaks through its header (kohya's `ss_*`, `modelspec.*`, our trainer's
`compose.*`) and through files beside it: `name.civitai.info`, `name.metadata.json`, `name.json`, `name.txt`,
preview pictures, and the model card `README.md` of a hub repository. Each source gives partial facts; the first
source that knows a fact wins, in the order of `_facts`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from compose.digest import hash_file
from compose.errors import AdapterError, LibraryError
from compose.header import Header, read_header
from compose.retrieval.card import ROLES, UNKNOWN, Card, from_dict
from compose.retrieval.licences import civitai_licence, licence_id

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_TEXTS = (".civitai.info", ".metadata.json", ".json", ".txt")
_SHARED = ("README.md", "adapter_config.json")
_MOST_TEXT = 1_000_000  # bytes of a sidecar that are read; larger ones are left alone
_MOST_TAGS = 32
_KEPT = ("compose.", "modelspec.", "ss_network_", "ss_base_model_version", "ss_output_name", "format")
_MOST_VALUE = 500  # characters of a metadata value that are kept

# How base models are named in the wild; the first pattern that occurs decides.
_FAMILY_NAMES = (
    ("compose-mini", r"compose-mini"),
    ("kontext", r"kontext"),
    ("flux2", r"flux\W?2|klein"),
    ("flux", r"flux"),
    ("sd3", r"sd\W?3|stable.diffusion.(v)?3"),
    ("sdxl", r"sd\W?xl|xl.base|stable.diffusion.xl|pony|illustrious|noobai|animagine"),
    ("qwen-image", r"qwen"),
    ("z-image", r"z.?image"),
    ("sd15", r"sd\W?v?1|stable.diffusion.(v)?1|^1\.[45]$"),
    ("sd2", r"sd\W?v?2|stable.diffusion.(v)?2"),
)
_ADAPTER_KEY = re.compile(r"lora|lokr|hada_|\.oft_|glora|\.diff(_b)?$|dora_scale|shira|\.sparse\.|ia3", re.I)
_ROLE_WORDS = (
    ("style", r"styles?|aesthetics?|artstyle|artists?|painting|illustration style"),
    ("background", r"backgrounds?|sceneries|scenery|landscapes?|environments?|backdrops?"),
    ("clothing", r"clothing|clothes|outfits?|costumes?|uniforms?"),
    ("character", r"characters?|celebrity|celebrities|person|people"),
    ("pose", r"poses?|actions?|gestures?"),
    ("detail", r"details?|tools?|enhancers?|sliders?|quality"),
    ("concept", r"concepts?|objects?|animals?|vehicles?|buildings?|food|assets?|plants?"),
)
Facts = dict[str, Any]


def read_card(path: Path, source: str = "", beside: Sequence[Path] | None = None) -> Card:
    """The card of an adapter file. `beside` are the files that speak about it (found here when not given).

    Raises AdapterError: pickle, damaged file, or a safetensors file that holds no adapter.
    """
    header = read_header(path)
    if not is_adapter(header):
        some = ", ".join(list(header.shapes)[:2]) or "no tensors"
        raise AdapterError(
            f"'{path.name}' holds no adapter: none of its {len(header.shapes)} keys names one ({some})"
        )
    beside = speaking(path, gather(listed(path.parent))) if beside is None else beside
    facts = _merge(_facts(path, header, beside))
    name = _name(path, source)
    return Card(
        name=name,
        path=str(path),
        family=facts.get("family") or family_of_keys(header),
        role=facts.get("role") or guess_role(facts.get("tags", ()), name, facts.get("description", "")),
        triggers=tuple(facts.get("triggers", ())),
        description=facts.get("description", ""),
        tags=tuple(facts.get("tags", ())),
        licence=facts.get("licence") or UNKNOWN,
        sha256=_digest(path),
        size=header.size,
        previews=tuple(str(p) for p in _previews(beside)),
        source=source or str(path.parent),
        metadata=_kept(header.metadata) | facts.get("metadata", {}),
    )


def _digest(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise AdapterError(f"cannot read '{path}': {error.strerror or error}") from error


def _name(path: Path, source: str) -> str:
    """The file's name, or the folder's (or repository's) where every such file has the same name."""
    if path.stem not in ("pytorch_lora_weights", "adapter_model", "lora", "model"):
        return path.stem
    return source.rpartition("/")[2] if source.startswith("hub:") else path.parent.name or path.stem


def read_card_file(path: Path) -> list[Card]:
    """Cards without weights from a JSON file: one card, a list of cards, or {"cards": [...]}.

    Raises LibraryError: unreadable, or an entry that is no card.
    """
    try:
        entry = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LibraryError(f"cannot read cards from '{path}': {error}") from error
    entries = entry.get("cards", [entry]) if isinstance(entry, dict) else entry
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries) or not entries:
        raise LibraryError(
            f"'{path}' holds no cards: expected a card, a list of cards, or {{\"cards\": [...]}}"
        )
    return [from_dict({"source": str(path)} | e) for e in entries]


def is_adapter(header: Header) -> bool:
    """Whether any key looks like part of an adapter (a full checkpoint, VAE or embedding does not)."""
    return any(_ADAPTER_KEY.search(key) for key in header.shapes)


def listed(folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name. Raises LibraryError when it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise LibraryError(f"cannot list '{folder}': {error.strerror or error}") from error


def gather(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of one folder by the adapter (its name without ending) that they speak about; '' for all adapters.

    One pass over the folder, since a folder may hold thousands of adapters.
    """
    stems = {p.stem for p in files if p.suffix == ".safetensors"}
    found: dict[str, list[Path]] = {"": [p for p in files if p.name in _SHARED]}
    for path in files:
        owner = next((stem for stem in _owners(path) if stem in stems), None)
        if owner is not None and path.name.isprintable():
            found.setdefault(owner, []).append(path)
    return found


def speaking(path: Path, gathered: Mapping[str, Sequence[Path]]) -> list[Path]:
    """The files that speak about the adapter file `path`."""
    return [*gathered.get(path.stem, ()), *gathered.get("", ())]


def _owners(path: Path) -> Iterator[str]:
    """Names of adapters that this file may speak about, the longest first (`a-1.preview.png`: `a-1`, then `a`)."""
    name = path.name
    yield from (name.removesuffix(ending) for ending in _TEXTS if name.endswith(ending))
    if path.suffix.lower() in PICTURES:
        stem = path.stem
        yield stem
        yield (stem := re.sub(r"\.preview$", "", stem))
        yield (stem := re.sub(r"[.-]\d{1,2}$", "", stem))
        yield re.sub(r"\.preview$", "", stem)


def _previews(beside: Iterable[Path]) -> list[Path]:
    found = (p for p in beside if p.suffix.lower() in PICTURES)
    return sorted(found, key=lambda p: (len(p.name), p.name))


def _facts(path: Path, header: Header, beside: Iterable[Path]) -> list[Facts]:
    """Partial facts, the most trusted source first."""
    by_name = {p.name: p for p in beside}

    def table(ending: str) -> Mapping[str, Any]:
        file = by_name.get(path.stem + ending)
        entry = _json_text(_text(file)) if file else None
        return entry if isinstance(entry, dict) else {}

    readme, config, text = (by_name.get(name) for name in (*_SHARED, path.stem + ".txt"))
    return [
        _own(header.metadata),
        _hand_written(table(".json")),
        _civitai(table(".civitai.info")),
        _manager(table(".metadata.json")),
        _modelspec(header.metadata),
        _kohya(header.metadata),
        _model_card(_text(readme)) if readme else {},
        _peft(_json_text(_text(config))) if config else {},
        {"description": _text(text).strip()[:2000]} if text else {},
    ]


def _merge(layers: Sequence[Facts]) -> Facts:
    """First non-empty value wins; tags are gathered from all, metadata merged."""
    merged: Facts = {"tags": [], "metadata": {}}
    for layer in layers:
        merged["tags"] += [tag for tag in layer.get("tags", ()) if tag not in merged["tags"]]
        merged["metadata"] = layer.get("metadata", {}) | merged["metadata"]
        for key, value in layer.items():
            if value and value != UNKNOWN and key not in ("tags", "metadata"):
                merged.setdefault(key, value)
    return merged | {"tags": merged["tags"][:_MOST_TAGS]}


def _own(metadata: Mapping[str, str]) -> Facts:
    """Our trainer's `compose.*` keys; lists are JSON or comma-separated."""
    role = metadata.get("compose.role", "")
    return {
        "family": metadata.get("compose.family"),
        "role": role if role in ROLES else None,
        "triggers": several(metadata.get("compose.trigger", "")),
        "description": metadata.get("compose.description"),
        "tags": several(metadata.get("compose.tags", "")),
        "licence": licence_id(metadata.get("compose.licence", "")),
    }


def _modelspec(metadata: Mapping[str, str]) -> Facts:
    """Stability's ModelSpec 1.0 keys."""
    tags = several(metadata.get("modelspec.tags", ""))
    return {
        "family": family_of_name(metadata.get("modelspec.architecture", "")),
        "triggers": several(metadata.get("modelspec.trigger_phrase", "")),
        "description": plain_text(metadata.get("modelspec.description", "")),
        "tags": tags,
        "licence": licence_id(metadata.get("modelspec.license", "")),
    }


def _kohya(metadata: Mapping[str, str]) -> Facts:
    """sd-scripts' training record: base version, caption tags by frequency, and the folders' concept words."""
    counts: dict[str, int] = {}
    folders = _json_text(metadata.get("ss_tag_frequency", ""))
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + (count if isinstance(count, int) else 0)
    frequent = sorted((t for t in counts if 0 < len(t) <= 60), key=lambda t: (-counts[t], t))[:16]
    concepts = (
        [re.sub(r"^\d+_", "", name).strip() for name in folders or ()] if isinstance(folders, dict) else []
    )
    return {
        "family": family_of_name(metadata.get("ss_base_model_version", "")),
        "triggers": [concept for concept in concepts if concept in frequent[:3]],
        "tags": frequent,
    }


def _civitai(info: Mapping[str, Any]) -> Facts:
    """A `.civitai.info` file: the site's answer for one model version."""
    model = info.get("model") if isinstance(info.get("model"), dict) else {}
    boxes = [info.get(key, model.get(key)) for key in _BOXES]
    return {
        "family": family_of_name(str(info.get("baseModel") or "")),
        "triggers": [str(word).strip(" ,") for word in _list(info.get("trainedWords"))],
        "description": plain_text(str(info.get("description") or model.get("description") or "")),
        "tags": [str(tag) for tag in _list(info.get("tags") or model.get("tags"))],
        "licence": civitai_licence(*boxes) if any(box is not None for box in boxes) else None,
        "metadata": _named(
            "civitai.name", " ".join(str(n) for n in (model.get("name"), info.get("name")) if n)
        ),
    }


_BOXES = ("allowCommercialUse", "allowDerivatives", "allowDifferentLicense")


def _manager(entry: Mapping[str, Any]) -> Facts:
    """A `.metadata.json` file, as library managers write it, with Civitai's answer inside."""
    inner = _civitai(entry.get("civitai") if isinstance(entry.get("civitai"), dict) else {})
    tips = _json_text(str(entry.get("usage_tips") or ""))
    strength = tips.get("strength") if isinstance(tips, dict) else None
    own = {
        "family": family_of_name(str(entry.get("base_model") or "")),
        "description": plain_text(str(entry.get("modelDescription") or "")),
        "tags": [str(tag) for tag in _list(entry.get("tags"))],
        "metadata": _named("compose.weight", strength),
    }
    return _merge([own, inner])


def _hand_written(entry: Mapping[str, Any]) -> Facts:
    """A `.json` file: the web UI's user metadata ("activation text", ...), or a card in our own words."""
    role = entry.get("role")
    return {
        "family": family_of_name(str(entry.get("family") or entry.get("sd version") or "")),
        "role": role if role in ROLES else None,
        "triggers": several(entry.get("triggers") or entry.get("activation text") or ""),
        "description": plain_text(str(entry.get("description") or "")),
        "tags": several(entry.get("tags") or ""),
        "licence": licence_id(str(entry.get("licence") or entry.get("license") or "")),
        "metadata": _named("compose.weight", entry.get("preferred weight") or entry.get("weight")),
    }


def _model_card(text: str) -> Facts:
    """A hub README: its YAML front matter, and the first paragraph of prose."""
    match = re.match(r"---\s*\n(.*?)\n---\s*\n?(.*)", text, re.S)
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        front = {}
    front = front if isinstance(front, dict) else {}
    tags = [str(tag) for tag in _list(front.get("tags")) if not _HUB_TAGS.fullmatch(str(tag))]
    bases = " ".join(str(base) for base in _list(front.get("base_model")))
    return {
        "family": family_of_name(bases),
        "triggers": several(front.get("instance_prompt") or ""),
        "description": _prose(match[2] if match else text),
        "tags": tags,
        "licence": licence_id(str(front.get("license_name") or front.get("license") or "")),
    }


_HUB_TAGS = re.compile(
    r"(text-to-image|image-to-image|diffusers|diffusers-training|lora|template:.*|safetensors|peft|.*base_model:.*)"
)


def _peft(config: Any) -> Facts:
    """peft's `adapter_config.json`."""
    return (
        {"family": family_of_name(str(config.get("base_model_name_or_path") or ""))}
        if isinstance(config, dict)
        else {}
    )


def _prose(text: str) -> str:
    paragraphs = (p.strip() for p in re.split(r"\n\s*\n", text))
    prose = (p for p in paragraphs if p and not re.match(r"[#<!|`\[>-]", p))
    return plain_text(next(prose, ""))[:1000]


def family_of_name(name: str) -> str:
    """The family that a base model's name speaks of ('SDXL 1.0', 'flux-1-dev/lora', ...), or 'unknown'."""
    plain = name.lower().replace("_", " ")
    return next((family for family, shape in _FAMILY_NAMES if plain and re.search(shape, plain)), UNKNOWN)


def family_of_keys(header: Header) -> str:
    """The family that key names tell (as the key formats know them), and the text width where names are alike."""
    from compose.formats.family import detect  # brings torch along, and most files name their family

    family = detect(header.shapes).family
    if family not in ("", "sd15"):
        return family
    wide = (shape[-1] for key, shape in header.shapes.items() if _TEXT_KEY.search(key) and len(shape) == 2)
    return {768: "sd15", 1024: "sd2", 2048: "sdxl"}.get(next(wide, 0)) or family or UNKNOWN


_TEXT_KEY = re.compile(r"attn2[._](to_k|processor[._]to_k).*(lora_down|lora_A|lora\.down|\.down\.)")


def guess_role(tags: Sequence[str], name: str, description: str) -> str:
    """One of `ROLES`, from tags first, then the name, then how the description begins; 'other' where nothing tells."""
    for text in ("\n".join(tags), re.sub(r"[_\W]+", " ", name), description[:200]):
        for role, words in _ROLE_WORDS:
            if re.search(rf"\b({words})\b", text.lower()):
                return role
    return "other"


def plain_text(text: str) -> str:
    """HTML as plain text: tags dropped, entities resolved, white space folded, at most 2,000 characters."""
    without = re.sub(r"<(br|/p|/li|/h\d)[^>]*>", ". ", text[:20_000])
    folded = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", without)).split())
    return re.sub(r"(\s*\.){2,}", ".", folded)[:2000]


def several(value: Any) -> list[str]:
    """A list of texts from a list, a JSON list, or a comma-separated text."""
    if isinstance(value, str):
        parsed = _json_text(value) if value.lstrip().startswith("[") else None
        value = parsed if isinstance(parsed, list) else value.split(",")
    return [word for word in (str(part).strip() for part in _list(value)) if word]


def _list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _named(key: str, value: Any) -> dict[str, str]:
    return {key: str(value)} if value else {}


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:_MOST_VALUE] for key, value in metadata.items() if key.startswith(_KEPT)}


def _text(path: Path) -> str:
    """What a text file holds; an unreadable or huge one says nothing, since the adapter is usable without it."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_TEXT).decode("utf-8-sig", errors="replace")
    except OSError:
        return ""


def _json_text(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
