"""Adapters of a hub repository: only safetensors and what describes them are fetched, into the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from compose.errors import LibraryError

_WANTED = ("*.safetensors", "README.md", "adapter_config.json", "*.png", "*.webp", "*.jpg", "*.jpeg")
_MOST_BYTES = 8 * 2**30  # adapters of whole repositories stay far below; full models do not
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(text: str) -> bool:
    """Whether `text` is shaped like 'user/name' (and not like a path to a file)."""
    return (
        bool(_ID.fullmatch(text))
        and not text.startswith(".")
        and not text.endswith((".safetensors", ".json"))
    )


def download(repository: str) -> list[Path]:
    """Fetch a repository's adapter files; their paths in the hub's cache.

    Raises LibraryError: no network, unknown or closed repository, a whole pipeline, or no safetensors in it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        files = {
            f.rfilename: f.size or 0
            for f in HfApi().model_info(repository, files_metadata=True).siblings or ()
        }
        _refuse_models(repository, files)
        folder = snapshot_download(repository, allow_patterns=list(_WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LibraryError(
            f"cannot fetch '{repository}' from the hub ({reason}); download its .safetensors and add the file"
        ) from error
    return sorted(Path(folder).rglob("*.safetensors"))


def _refuse_models(repository: str, files: dict[str, int]) -> None:
    weights = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    if "model_index.json" in files:
        raise LibraryError(f"'{repository}' is a whole pipeline, not an adapter; give it to --base")
    if not weights:
        held = (
            "only pickles, which are never opened"
            if any(n.endswith((".bin", ".pt", ".ckpt")) for n in files)
            else "none"
        )
        raise LibraryError(f"'{repository}' holds no .safetensors adapter ({held})")
    if sum(weights.values()) > _MOST_BYTES:
        raise LibraryError(
            f"'{repository}' holds {sum(weights.values()) / 2**30:.0f} GiB of weights: that is no adapter"
        )
