"""Gates: what decides inside the model how much of each adapter gets through (AutoLoRA, arXiv 2508.02107).

The full form opens per layer, channel and token; the light form is one number per layer, stretch of the denoising and
adapter. One file per base holds either or both.
"""

from __future__ import annotations

from compose.gates.files import GATES, USER_GATES, Gates, find, load, save
from compose.gates.full import VECTORS, FullGate, gated
from compose.gates.light import LightGate, LightShape, embed, sizes_of

__all__ = [
    "GATES",
    "USER_GATES",
    "VECTORS",
    "FullGate",
    "Gates",
    "LightGate",
    "LightShape",
    "embed",
    "find",
    "gated",
    "load",
    "save",
    "sizes_of",
]
