"""Where the bundled files lie: base model, CLIP, starter adapters."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent
BASE = ROOT / "compose-mini"  # a plain diffusers folder
CLIP = ROOT / "clip"  # open-clip model config, weights, tokenizer
ADAPTERS = ROOT / "adapters"  # starter library: *.safetensors with previews and cards beside them
RESTORE = (
    ROOT / "restore" / "restore.safetensors"
)  # the adapter that `compose restore` takes where none is named
ENCODER = ROOT / "encoder.safetensors"  # weights of an adapter -> vector in the CLIP's space
