"""The picture set: emoji artwork in ten styles, split by concept, composed into captioned scenes."""

import platformdirs

CACHE = platformdirs.user_cache_path("lora-compose") / "data"  # where `compose data build` writes
ARCHIVE = CACHE / "pictures.zip"
PHRASES = CACHE / "phrases.safetensors"
