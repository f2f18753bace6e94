"""What a restoration adapter says of itself in its file: the tasks it learned, the prompt that calls each, and how it
wants to be drawn with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from compose.errors import AdapterError, RequestError, unknown

KEY = "compose.restore"
TELLER = ".tasks"  # ending of the file beside an adapter that tells defects apart (`compose.defects`)
NONE = "none"  # what a picture without a defect is called
PROMPTS = {
    "noise": "remove the noise from the image",
    "rain": "remove the rain from the image",
    "haze": "remove the haze from the image",
    "blur": "remove the blur from the image",
    "jpeg": "remove the jpeg artifacts from the image",
    "low-light": "brighten the image",
    "inpaint": "fill in the missing parts of the image",
}
RECOLOURS = ("haze", "low-light")  # tasks whose result must not keep the colours it was given


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoration:
    """`tasks` maps a task's name to its prompt. `steps` and `guidance` are those it was validated with, `side` the
    pixels it was trained at, `pairs` the pairs of each task; `defects` says which were made on purpose
    (`noise:15-50`), empty for real pairs; `seed` fixes both."""

    tasks: Mapping[str, str]
    steps: int
    guidance: float
    side: int
    pairs: Mapping[str, int] = field(default_factory=dict)
    defects: tuple[str, ...] = ()
    seed: int = 0

    def to_text(self) -> str:
        """The file's entry under `KEY`."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, metadata: Mapping[str, str], name: str) -> Self:
        """What the adapter `name` says. Raises AdapterError: not a restoration adapter, or a damaged entry."""
        if KEY not in metadata:
            raise AdapterError(
                f"adapter '{name}' was not trained to restore: it names no tasks; give one that `compose train restore` "
                "wrote"
            )
        try:
            told: dict[str, Any] = json.loads(metadata[KEY])
            made = cls(**told | {"defects": tuple(told.get("defects", ()))})
            whole = made.steps >= 1 and made.side >= 1 and made.guidance >= 0
            texts = all(isinstance(text, str) and text for text in made.tasks.values())
        except (ValueError, TypeError, AttributeError) as error:
            raise AdapterError(f"the tasks of adapter '{name}' cannot be read: {error}") from None
        if not (whole and texts and made.tasks):
            raise AdapterError(
                f"the tasks of adapter '{name}' are damaged; train it again, or fetch it again"
            )
        return made

    def task_of(self, text: str) -> str:
        """The task that a name or a prompt means. Raises RequestError, which names the known ones."""
        said = " ".join(text.lower().split()).rstrip(".")
        for name, prompt in self.tasks.items():
            if said in (name.lower(), " ".join(prompt.lower().split())):
                return name
        known = [*self.tasks, *self.tasks.values()]
        raise RequestError(unknown("task", text, known))
