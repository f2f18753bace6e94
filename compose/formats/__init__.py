"""Every spelling of LoRA keys <-> `Adapter`.

`load` reads diffusers, peft, kohya (SD1.5, SDXL, SD3, FLUX), XLabs, BFL / ai-toolkit and ComfyUI names, with LoRA,
LoCon, LoHa, LoKr, DoRA, full-difference and bias parts under any of them; `save` writes diffusers, peft or kohya.
"""

from compose.formats.family import FAMILIES, Kind, detect
from compose.formats.files import read_metadata, resolve
from compose.formats.kinds import dense, shape_of
from compose.formats.load import Report, load, report
from compose.formats.names import canonical
from compose.formats.save import family_told, save

__all__ = [
    "FAMILIES",
    "Kind",
    "Report",
    "canonical",
    "dense",
    "detect",
    "family_told",
    "load",
    "read_metadata",
    "report",
    "resolve",
    "save",
    "shape_of",
]
