"""Fetch emoji artwork as npm packages and rasterise it into one archive of 128 px WebP pictures with alpha.

The archive (`pictures.zip`) holds `style/concept.webp` and `index.json`: for every picture its style, concept,
package and licence, and for every concept its label, tags, other names and emoji subgroup.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from compose.errors import ComposeError

SIZE = 128
QUALITY = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """One vendor's artwork: its npm package, licence, and the words a caption may use for it."""

    name: str
    package: str
    version: str
    licence: str
    phrases: tuple[str, ...]
    supersample: int = 1


STYLES: tuple[Style, ...] = (
    Style(
        name="noto",
        package="@iconify-json/noto",
        version="1.2.9",
        licence="Apache-2.0",
        phrases=("noto", "noto emoji", "google noto"),
    ),
    Style(
        name="twemoji",
        package="@iconify-json/twemoji",
        version="1.2.5",
        licence="CC-BY-4.0",
        phrases=("twemoji", "twitter emoji", "twemoji flat"),
    ),
    Style(
        name="fluent-flat",
        package="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        licence="MIT",
        phrases=("fluent flat", "flat fluent", "microsoft fluent flat"),
    ),
    Style(
        name="emojione",
        package="@iconify-json/emojione",
        version="1.2.3",
        licence="CC-BY-4.0",
        phrases=("emojione", "emoji one", "emojione color"),
    ),
    Style(
        name="streamline",
        package="@iconify-json/streamline-emojis",
        version="1.2.4",
        licence="CC-BY-4.0",
        phrases=("streamline", "streamline outline", "outlined streamline"),
    ),
    Style(
        name="fluent-3d",
        package="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        licence="MIT",
        phrases=("fluent 3d", "glossy 3d", "3d fluent"),
    ),
    Style(
        name="fluent-gradient",
        package="@iconify-json/fluent-emoji",
        version="1.2.7",
        licence="MIT",
        phrases=("fluent gradient", "soft gradient fluent"),
        supersample=2,
    ),
    Style(
        name="high-contrast",
        package="@iconify-json/fluent-emoji-high-contrast",
        version="1.2.6",
        licence="MIT",
        phrases=("high contrast", "black line high contrast"),
    ),
    Style(
        name="noto-v1",
        package="@iconify-json/noto-v1",
        version="1.2.5",
        licence="Apache-2.0",
        phrases=("noto v1", "old noto blob"),
    ),
    Style(
        name="emojione-mono",
        package="@iconify-json/emojione-monotone",
        version="1.2.1",
        licence="CC-BY-4.0",
        phrases=("emojione mono", "monotone emojione"),
    ),
)
STYLE = {style.name: style for style in STYLES}
NAMES_PACKAGE = ("emojibase-data", "17.0.0", "MIT")
GROUPS = {
    0: "smileys-emotion",
    3: "animals-nature",
    4: "food-drink",
    5: "travel-places",
    6: "activities",
    7: "objects",
}


def fetch(folder: Path) -> Path:
    """Install the artwork and name packages into `folder` with npm; returns `folder/node_modules`."""
    if shutil.which("npm") is None:
        raise ComposeError("npm was not found; install Node.js with npm, it brings the artwork packages")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"name": "pictures", "private": true}\n')
    wanted = [f"{style.package}@{style.version}" for style in STYLES] + ["@".join(NAMES_PACKAGE[:2])]
    command = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        "--prefix",
        str(folder),
        *wanted,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ComposeError(f"npm could not install the artwork: {done.stderr.strip().splitlines()[-1:]}")
    return folder / "node_modules"


def slug(label: str) -> str:
    """`Mrs. Claus’s hat` -> `mrs-clauss-hat`, the spelling that the icon sets use."""
    plain = label.lower().translate(
        str.maketrans({"’": "", "'": "", ".": "", "!": "", "ñ": "n", "å": "a", "é": "e", "&": "and"})
    )
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def concepts(modules: Path) -> dict[str, dict]:
    """All drawable concepts by slug: label, hexcode, subgroup, tags, other names.

    Left out: people, symbols, flags, components, and clock faces (24 pictures that differ only in their hands).
    """
    data = json.loads((modules / "emojibase-data/en/data.json").read_text())
    subgroups = json.loads((modules / "emojibase-data/meta/groups.json").read_text())["subgroups"]
    codes = [
        json.loads((modules / f"emojibase-data/en/shortcodes/{name}.json").read_text())
        for name in ("cldr", "github", "iamcal", "joypixels", "emojibase")
    ]
    found = {}
    for entry in data:
        clock = re.search(r"o’clock|-thirty", entry["label"])
        if entry.get("group") not in GROUPS or clock:
            continue
        found[slug(entry["label"])] = {
            "label": entry["label"].replace("’", "'"),
            "hexcode": entry["hexcode"],
            "subgroup": subgroups[str(entry["subgroup"])],
            "tags": entry.get("tags", []),
            "names": _names(entry["hexcode"], codes),
        }
    return found


def _names(hexcode: str, codes: list[dict]) -> list[str]:
    """Shortcodes of one emoji as phrases: `face_with_tears_of_joy` -> `face with tears of joy`."""
    raw = [code for table in codes for code in _as_list(table.get(hexcode, []))]
    phrases = {re.sub(r"[_\-]+", " ", code).strip().lower() for code in raw}
    return sorted(phrase for phrase in phrases if re.fullmatch(r"[a-z][a-z ]{2,}", phrase))


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _icon_names(modules: Path) -> dict[str, set[str]]:
    """Icon names that the vendors' code-point maps give, by hexcode without variation selectors."""
    names: dict[str, set[str]] = {}
    for path in modules.glob("@iconify-json/*/chars.json"):
        for code, name in json.loads(path.read_text()).items():
            names.setdefault(_bare(code), set()).add(name)
    return names


def _bare(hexcode: str) -> str:
    return re.sub(r"-fe0f", "", hexcode.lower())


def artwork(modules: Path, style: Style, wanted: dict[str, dict]) -> Iterator[tuple[str, bytes | str]]:
    """(concept, SVG text or picture bytes) for every concept that the style draws."""
    if style.name == "fluent-3d":
        files = {_bare(path.stem): path for path in (modules / style.package / "assets").glob("*.webp")}
        for name, concept in wanted.items():
            if (path := files.get(_bare(concept["hexcode"]))) is not None:
                yield name, path.read_bytes()
        return
    data = json.loads((modules / style.package / "icons.json").read_text())
    aliases = data.get("aliases", {})
    spellings = _icon_names(modules)
    for name, concept in wanted.items():
        for candidate in [name, *sorted(spellings.get(_bare(concept["hexcode"]), ()))]:
            icon = data["icons"].get(candidate) or data["icons"].get(aliases.get(candidate, {}).get("parent"))
            if icon:
                width, height = icon.get("width", data["width"]), icon.get("height", data["height"])
                box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
                yield (
                    name,
                    f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'.replace(
                        "currentColor", "#000000"
                    ),
                )
                break


def rasterise(source: bytes | str, supersample: int) -> Image.Image:
    """SVG text or picture bytes -> RGBA picture of 128 x 128, kept in proportion and centred."""
    if isinstance(source, str):
        import resvg_py

        side = SIZE * supersample
        source = bytes(resvg_py.svg_to_bytes(svg_string=source, width=side, height=side))
    picture = Image.open(io.BytesIO(source)).convert("RGBA")
    picture.thumbnail((SIZE, SIZE), Image.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    return canvas


def build(out: Path, cache: Path) -> dict[str, int]:
    """Write the archive to `out`; returns the number of pictures per style. Pixels that repeat within a style
    are kept once, under their first concept."""
    modules = fetch(cache)
    wanted = concepts(modules)
    index: dict = {"concepts": wanted, "styles": {}, "pictures": []}
    partial = out.with_suffix(".part")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive, ThreadPoolExecutor() as pool:
        for style in STYLES:
            items = list(artwork(modules, style, wanted))
            drawn = pool.map(lambda item, s=style: rasterise(item[1], s.supersample), items)
            seen: set[str] = set()
            for (concept, _), picture in tqdm(
                zip(items, drawn, strict=True), total=len(items), desc=f"render {style.name}"
            ):
                digest = hashlib.sha256(picture.tobytes()).hexdigest()
                if digest in seen or picture.getbbox() is None:
                    continue
                seen.add(digest)
                buffer = io.BytesIO()
                picture.save(buffer, "WEBP", quality=QUALITY, method=4)
                archive.writestr(f"{style.name}/{concept}.webp", buffer.getvalue())
                index["pictures"].append({"style": style.name, "concept": concept, "licence": style.licence})
            index["styles"][style.name] = {
                "package": style.package,
                "version": style.version,
                "licence": style.licence,
            }
        archive.writestr("index.json", json.dumps(index))
    partial.replace(out)
    return counts(out)


def counts(archive: Path) -> dict[str, int]:
    """The number of pictures of each style in an archive."""
    with zipfile.ZipFile(archive) as file:
        pictures = json.loads(file.read("index.json"))["pictures"]
    return {style.name: sum(p["style"] == style.name for p in pictures) for style in STYLES}
