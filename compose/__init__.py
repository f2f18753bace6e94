"""lora-compose: finds the LoRAs that help a prompt and composes them inside the denoising loop.

Names are resolved lazily (PEP 562), so that `import compose` and `compose --help` import no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "ComposePipeline": "compose.pipeline",
    "Request": "compose.request",
    "Result": "compose.record",
    "Adapter": "compose.adapter",
    "composed": "compose.engine",
    "ComposeError": "compose.errors",
}
__all__ = sorted(_LAZY)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'compose' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
