"""`ComposePipeline`: the one path from a request to pictures, for the command line, the studio, the server and Python.

It loads a base, finds the adapters, hands both to the engine, and calls an unmodified diffusers pipeline.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline

from compose import bases, loading
from compose.adapter import Adapter
from compose.arrange import check_policy, policy_for, readings_of
from compose.bases import Kind
from compose.cache import FeatureCache
from compose.digest import file_digest, weights_digest
from compose.engine import Composition
from compose.errors import AdapterError, RequestError
from compose.formats import load, read_metadata, resolve
from compose.formats.sparse import HEADER as SPARSE
from compose.gates import Gates, embed, sizes_of
from compose.gates import find as find_gate
from compose.gates import load as load_gate
from compose.pictures import Picture, as_uri, read_all, sized
from compose.plan import Context, Policy
from compose.policies.gated import Course
from compose.preview import Look, Sketcher, Watch, blank, unwatched
from compose.profile import KEY as PROFILE
from compose.profile import Profile, of_card
from compose.prompt import Pick, weave
from compose.record import Applied, Record, Result
from compose.request import Request
from compose.sites import sites_of

if TYPE_CHECKING:
    from compose.retrieval.card import Card
    from compose.retrieval.library import Library

Progress = Callable[[str, int, int], None]  # stage (loading, retrieval, denoising), done, total
CACHING = ("cached", "auto")  # policies whose branches may reuse features
PACKAGES = ("lora-compose", "torch", "diffusers", "transformers", "peft")


Keep = Callable[[Result], None]  # gets a Result of one picture


def forget(result: Result) -> None:
    """The keeper that keeps nothing."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress report that says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request made ready to draw: every field filled, adapters loaded, prompt woven, pictures read.

    `record` is what each picture will carry; `adapters` and `record.adapters` go in step; `gates` for policy 'gated'.
    """

    record: Record
    mode: str
    adapters: tuple[Adapter, ...]
    policy: Policy | None
    pictures: Mapping[str, PIL.Image.Image]
    gates: Gates | None = None

    @property
    def request(self) -> Request:
        return self.record.request


class ComposePipeline:
    """A base model in memory, ready to draw with any adapters; its weights are never changed for good.

    `ComposePipeline(pipe)` wraps a diffusers pipeline that is already loaded and placed; `from_pretrained` loads one.
    Calls from several threads are taken one after the other.
    """

    def __init__(self, pipe: DiffusionPipeline, base: str | None = None) -> None:
        """`base` is the name the record gives; default: where diffusers says the pipeline came from.

        Raises BaseModelError for a family that `compose.bases` has no row for.
        """
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        self.name = base or str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        self.kind: Kind = bases.identify(type(pipe).__name__, denoiser.config, self.name)
        self.offload = "none"
        self.source: loading.Source | None = None
        self._sha256 = ""
        self._options: dict[str, str] = {}
        self._loaded = pipe
        self._views: dict[type, DiffusionPipeline] = {type(pipe): pipe}
        self._placed: DiffusionPipeline = pipe
        self._files: dict[tuple[str, str], Adapter] = {}
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        base: str = bases.BUNDLED,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        offload: str = "none",
        config: str | None = None,
        variant: str | None = None,
        progress: Progress = silent,
    ) -> ComposePipeline:
        """Load `base`: 'compose-mini', a hub id, a diffusers folder, or one .safetensors file.

        `device` and `dtype` are chosen where left out; `offload` is none, model or sequential (for small cards);
        `config` is the folder that completes a single file; `variant` names other hub weights. Raises BaseModelError.
        """
        progress("loading", 0, 2)
        place = loading.choose_device(device)
        loading.check_offload(offload, place)
        source = loading.find(base, config, variant)
        pipe = loading.open_pipeline(source, loading.choose_dtype(dtype, place, source.kind))
        progress("loading", 1, 2)
        pipe.set_progress_bar_config(disable=True)
        loading.place(pipe, place, offload)
        self = cls(pipe, base)
        self.kind, self.offload, self.source = source.kind, offload, source
        self._options = {name: value for name, value in (("config", config), ("variant", variant)) if value}
        progress("loading", 2, 2)
        return self

    @property
    def device(self) -> torch.device:
        """Where pictures are drawn."""
        return self._loaded._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return (getattr(self._loaded, "unet", None) or self._loaded.transformer).dtype

    @property
    def versions(self) -> dict[str, str]:
        """What the pixels depend on beside the weights: Python and the packages that draw."""
        return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}

    @property
    def sha256(self) -> str:
        """SHA-256 of the base as it was first used: of its files, or of the weights in memory where it was wrapped."""
        if not self._sha256:
            self._sha256 = self.source.sha256 if self.source else loading.weights_in_memory(self._loaded)
        return self._sha256

    def __call__(
        self,
        prompt: str | Request,
        *,
        library: Library | None = None,
        progress: Progress = silent,
        keep: Keep = forget,
        watch: Watch = unwatched,
        **fields: Any,
    ) -> Result:
        """Draw: `pipe("a red apple", loras=["watercolor:0.8"], seed=1)`, or `pipe(request)`.

        `fields` are those of `Request`; `image` and `mask` may be PIL pictures. `library` is the user's own where left
        out. `keep` gets every picture as soon as it is drawn; `watch` looks on before the first and after every step,
        and stops the run by raising. Raises ComposeError, in one line, before anything is drawn.
        """
        if isinstance(prompt, Request) and fields:
            raise RequestError(f"give a Request or fields, not both; got a Request and {', '.join(fields)}")
        request = prompt if isinstance(prompt, Request) else self._request(prompt, fields)
        if request.base != self.name:
            raise RequestError(f"this pipeline holds base '{self.name}', the request wants '{request.base}'")
        with self._lock:
            order = self._prepare(request, library, progress)
            return self._draw(order, range(order.request.count), progress, keep, watch)

    def redo(
        self,
        record: Record,
        *,
        library: Library | None = None,
        progress: Progress = silent,
        keep: Keep = forget,
        watch: Watch = unwatched,
    ) -> Result:
        """Draw one picture again from its record: the same pixels on the same machine.

        Raises RequestError when base, adapters or pictures are no longer the ones recorded.
        """
        if record.base_sha256 != self.sha256:
            raise RequestError(
                f"base '{self.name}' is not the one this picture was drawn with: SHA-256 {self.sha256[:12]}, "
                f"recorded {record.base_sha256[:12]}"
            )
        with self._lock:
            pictures = read_all(record.request)
            for what, picture in pictures.items():
                if picture.sha256 != record.inputs.get(what):
                    raise RequestError(
                        f"the {what} given then is not the one there now; its SHA-256 has changed"
                    )
            adapters = tuple(self._again(item, library) for item in record.adapters)
            order = self._order(record, adapters, pictures)
            return self._draw(order, [record.index], progress, keep, watch)

    def profiles(
        self, request: Request, *, library: Library | None = None, progress: Progress = silent
    ) -> dict[str, Profile]:
        """Frequency profile of each adapter that `request` uses, measured alone along the request's own picture.

        Raises AdapterError for an adapter that cannot be measured.
        """
        from compose.retrieval.profile import measure

        with self._lock:
            order = self._prepare(request, library, progress)
            pipe = self._view(order.mode)
            accepted = inspect.signature(pipe.__call__).parameters
            args = bases.call_args(self.kind, order.request, order.record.prompt, accepted) | order.pictures
            found = {}
            for done, (adapter, item) in enumerate(zip(order.adapters, order.record.adapters, strict=True)):
                progress("measuring", done, len(order.adapters))
                found[item.name] = measure(pipe, adapter, args, weight=item.weight, seed=_seed(order, 0))
            progress("measuring", len(order.adapters), len(order.adapters))
        return found

    def described(self, name: str, library: Library | None = None) -> tuple[Path, dict[str, str]]:
        """The file of an adapter that a user named, and what it says of itself. Raises ComposeError."""
        path = Path(str(_named(Pick(name=name), library).card.path))
        return path, dict(read_metadata(resolve(str(path))))

    @contextmanager
    def composing(
        self, request: Request, mode: str, *, library: Library | None = None, progress: Progress = silent
    ) -> Iterator[tuple[DiffusionPipeline, Record]]:
        """The diffusers pipeline of `mode` (text, image, mask, edit) with the request's adapters in it, for calls of
        one's own, and the record of what was used. Raises ComposeError as a call does, and for a mode that the base
        has not.
        """
        if mode not in self.kind.pipelines:
            raise RequestError(
                f"base '{self.name}' ({self.kind.name}) has no {mode} mode, only {', '.join(self.kind.pipelines)}"
            )
        with self._lock:
            order = dataclasses.replace(self._prepare(request, library, progress), mode=mode)
            pipe = self._view(mode)
            with loading.threads(order.record.place.get("threads")), self._composition(pipe, order):
                yield pipe, order.record

    def _request(self, prompt: str, fields: Mapping[str, Any]) -> Request:
        given = {"prompt": prompt, "base": self.name, **fields}
        for what in ("image", "mask"):
            if isinstance(given.get(what), PIL.Image.Image):
                given[what] = as_uri(given[what])
            elif isinstance(given.get(what), Path):
                given[what] = str(given[what])
        return Request.from_json(given)

    def _prepare(self, request: Request, library: Library | None, progress: Progress) -> Order:
        check_policy(request)
        mode = bases.mode_of(self.kind, request)
        pictures = read_all(request)
        size = pictures["image"].image.size if "image" in pictures else None
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        filled = dataclasses.replace(request, seed=seed, **bases.fill(self.kind, mode, request, size))
        uses, notes = self._uses(filled, library, progress)
        adapters = self._open(uses, filled.force)
        text, woven = weave(filled.text, [t for use in uses for t in use.triggers] if filled.triggers else [])
        applied = tuple(_applied(use, adapter, woven) for use, adapter in zip(uses, adapters, strict=True))
        picks = {item.name: item.pick for item in applied}
        gates = self._gates(filled, adapters)
        record = Record(
            request=filled,
            prompt=text,
            kind=self.kind.name,
            base_sha256=self.sha256,
            sampler=type(self._loaded.scheduler).__name__,
            adapters=applied,
            readings=readings_of(filled, picks, text, _triggers(applied, adapters)),
            inputs={what: picture.sha256 for what, picture in pictures.items()}
            | ({"gate": gates.sha256} if gates else {}),
            place=self._place(),
            versions=self.versions,
            notes=(*notes, *_partly(adapters), *self._limits(filled, text), *self._strange(gates)),
        )
        return self._order(record, adapters, pictures)

    def _order(self, record: Record, adapters: tuple[Adapter, ...], pictures: Mapping[str, Picture]) -> Order:
        gates = self._gates(record.request, adapters)
        if gates is not None and gates.sha256 != record.inputs.get("gate"):
            raise RequestError(
                f"gate '{gates.name}' is not the one this picture was drawn with; its SHA-256 has changed"
            )
        return Order(
            record=record,
            mode=bases.mode_of(self.kind, record.request),
            adapters=adapters,
            policy=policy_for(
                record.request, {item.name: item.pick for item in record.adapters}, record.readings
            )
            if adapters
            else None,
            pictures=sized(pictures, record.request),
            gates=gates,
        )

    def _gates(self, request: Request, adapters: Sequence[Adapter]) -> Gates | None:
        """The gate of policy 'gated'; None for any other policy, and where fewer than two adapters leave nothing to
        gate. Raises RequestError where there is none for this base."""
        if request.policy != "gated" or len(adapters) < 2:
            return None
        gates = load_gate(find_gate(self.kind.families, self.sha256, str(request.options.get("gate", ""))))
        gates.check(str(request.options.get("form", "full")), sites_of(self._loaded))
        return gates

    def _strange(self, gates: Gates | None) -> Iterator[str]:
        if gates is not None and self.source is not None and gates.base_sha256 != self.sha256:
            yield f"gate '{gates.name}' was trained on another base of this family"

    def _place(self) -> dict[str, str]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor()
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "offload": self.offload,
            "hardware": name or platform.machine(),
            **(
                {"threads": str(self.kind.threads or torch.get_num_threads())}
                if self.device.type == "cpu"
                else {}
            ),
            **self._options,
        }

    def _limits(self, request: Request, text: str) -> Iterator[str]:
        """What the user should know and would not see: words past the text limit, a negative prompt without effect."""
        tokenizer = next(
            t for n in ("_3", "_2", "") if (t := getattr(self._loaded, f"tokenizer{n}", None)) is not None
        )
        limit = self.kind.text or tokenizer.model_max_length
        length = len(tokenizer(text, truncation=False, verbose=False).input_ids)
        if length > limit:
            yield f"the prompt is {length} tokens long; this base reads the first {limit}"
        if request.negative_prompt and not bases.negative_acts(self.kind, request.guidance or 0.0):
            yield f"the negative prompt has no effect at guidance {request.guidance:g}; give --guidance above 1"

    # Adapters: named, tagged or found

    def _uses(
        self, request: Request, library: Library | None, progress: Progress
    ) -> tuple[list[Use], list[str]]:
        """The adapters to use, and what to tell about the choice."""
        if request.picks:
            notes = ["adapters are named, so the library was not searched"] if request.auto_retrieve else []
            uses = [_named(pick, library) for pick in request.picks]
            _check_distinct(uses)
            for use in uses:
                _check_licence(use, request.license)
            return uses, notes
        if not request.auto_retrieve:
            return [], []
        uses = self._retrieve(request, library, progress)
        return uses, [] if uses else ["no adapter in the library fits this prompt; drawn with the base alone"]

    def _retrieve(self, request: Request, library: Library | None, progress: Progress) -> list[Use]:
        from compose.retrieval.select import select

        progress("retrieval", 0, 1)
        licence, roles = request.license, request.roles
        # FLUX.1's adapters have the small base's names but not its shapes
        families = self.kind.families[:1] if self.kind.name == bases.BUNDLED else self.kind.families
        choices = select(request.text, _library(library), families, request.k, licence=licence, roles=roles)
        progress("retrieval", 1, 1)
        return [
            Use(
                pick=Pick(name=choice.card.name, weight=choice.weight),
                card=choice.card,
                score=choice.score,
                reason=choice.reason,
            )
            for choice in choices
            if request.force or not self._foreign(_made_for(read_metadata(resolve(str(choice.card.path)))))
        ]

    def _open(self, uses: Sequence[Use], force: bool) -> tuple[Adapter, ...]:
        """The adapters of this request; those that the last one used and this one does not are let go."""
        before, self._files = self._files, {}
        for use in uses:
            key = (file_digest(str(use.card.path)), use.card.name)
            self._files[key] = before.get(key) or load(str(use.card.path), name=use.card.name)
            self._check_family(use, self._files[key])
            if not force:
                self._check_weights(self._files[key])
        return tuple(self._files.values())

    def _check_family(self, use: Use, adapter: Adapter) -> None:
        for family in (adapter.family, use.card.family):
            if family not in ("", "unknown", *self.kind.families):
                raise AdapterError(
                    f"adapter '{use.card.name}' is made for {family}, base '{self.name}' takes "
                    f"{' or '.join(self.kind.families)}; choose another adapter or another --base"
                )

    def _check_weights(self, adapter: Adapter) -> None:
        """A sparse adapter owns entries of one model's weights: on another's they mean nothing."""
        made_for = _made_for(adapter.metadata)
        if self._foreign(made_for):
            raise AdapterError(
                f"sparse adapter '{adapter.name}' was made for weights with SHA-256 {made_for[:12]}, base "
                f"'{self.name}' has {self.sha256[:12]}; give its own base, or --force if only the shapes matter"
            )

    def _foreign(self, made_for: str) -> bool:
        """Whether a sparse adapter is bound to other weights than these; a wrapped pipeline's files are not known."""
        return bool(made_for) and self.source is not None and made_for != self.sha256

    def _again(self, item: Applied, library: Library | None) -> Adapter:
        """The adapter of a record, wherever it lies now."""
        if _holds(item.path, item.sha256):
            return load(item.path, name=item.name)
        for card in _library(library).cards():
            if card.sha256 == item.sha256 and card.path and _holds(card.path, item.sha256):
                return load(card.path, name=item.name)
        raise AdapterError(
            f"adapter '{item.name}' (SHA-256 {item.sha256[:12]}) is not at '{item.path}' as recorded, nor in the library; "
            "put the file back, or 'compose library add' it"
        )

    # Drawing

    def _draw(
        self, order: Order, indices: Sequence[int], progress: Progress, keep: Keep, watch: Watch
    ) -> Result:
        """Pictures `indices` of the order. Those that were drawn together are drawn together again, so that one
        picture of a batch comes out as it did."""
        begun = time.perf_counter()
        pipe = self._view(order.mode)
        size = order.request.batch
        groups = sorted({index // size for index in indices})
        drawn: list[Result] = []
        with (
            loading.threads(order.record.place.get("threads")),
            self._composition(pipe, order) as composition,
        ):
            record = dataclasses.replace(order.record, backend=_backend_name(composition))
            policy = composition.policies[0] if composition else None
            steps = _Steps(progress, watch, len(groups), record, policy, offloaded=self.offload != "none")
            for group in groups:
                members = range(group * size, min((group + 1) * size, order.request.count))
                images = self._call(pipe, order, members, steps)
                for index, image in zip(members, images, strict=True):
                    if index in indices:
                        drawn.append(Result(images=(image,), record=dataclasses.replace(record, index=index)))
                        keep(drawn[-1])
        return Result(
            images=tuple(image for result in drawn for image in result.images),
            record=drawn[0].record,
            seconds=time.perf_counter() - begun,
        )

    def _composition(
        self, pipe: DiffusionPipeline, order: Order
    ) -> AbstractContextManager[Composition | None]:
        """The one place where adapters meet the base; without adapters, the base as it is."""
        if order.policy is None:
            return nullcontext()
        items = order.record.adapters
        context = Context(
            prompts=[order.record.prompt],
            triggers=_triggers(order.record.adapters, order.adapters),
            encode=functools.partial(_embed, self._loaded),
            profiles={item.name: Profile.from_text(item.profile) for item in items if item.profile},
            course=self._course(order),
        )
        gates = {"full": order.gates.full} if order.gates and order.gates.full else {}
        backend = order.record.backend or order.request.backend
        cache = FeatureCache() if order.request.policy in CACHING else None
        return Composition(
            pipe, order.adapters, order.policy, backend, context=context, cache=cache, gates=gates
        )

    def _course(self, order: Order) -> Callable[[str, int], Course] | None:
        """What the light gate says of a prompt under the order's adapters; None without one."""
        light = order.gates.light if order.gates else None
        if light is None:
            return None
        said = _triggers(order.record.adapters, order.adapters)
        names = [adapter.name for adapter in order.adapters]
        triggers = embed(self._loaded, [said.get(name, name) for name in names])
        sizes = sizes_of(order.adapters, light.shape.sites)
        return lambda prompt, stretches: light.course(
            embed(self._loaded, [prompt])[0], triggers, sizes, names, stretches
        )

    def _call(
        self, pipe: DiffusionPipeline, order: Order, members: Sequence[int], steps: _Steps
    ) -> list[PIL.Image.Image]:
        accepted = inspect.signature(pipe.__call__).parameters
        args = bases.call_args(self.kind, order.request, order.record.prompt, accepted) | order.pictures
        if order.mode in ("image", "mask"):
            args["strength"] = order.request.strength
        generators = [torch.Generator("cpu").manual_seed(_seed(order, index)) for index in members]
        try:
            return pipe(
                **args,
                num_images_per_prompt=len(members),
                generator=generators if len(generators) > 1 else generators[0],
                callback_on_step_end=steps,
            ).images
        except torch.OutOfMemoryError:
            raise RequestError(
                f"not enough memory on {self.device} for {len(members)} picture(s) of {order.request.width}x"
                f"{order.request.height}; give --offload model, a smaller --size or a smaller --batch"
            ) from None

    def _view(self, mode: str) -> DiffusionPipeline:
        """The diffusers pipeline of this mode over the same components; offload hooks follow it."""
        cls = loading.pipeline_class(self.kind, mode)
        if cls not in self._views:
            self._views[cls] = loading.rewrap(self._loaded, cls)
        view = self._views[cls]
        if self.offload != "none" and view is not self._placed:
            loading.place(view, self.device, self.offload)
            self._placed = view
        return view


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One adapter on its way into a picture: how it was asked for, its card, and why retrieval chose it."""

    pick: Pick
    card: Card
    score: float | None = None
    reason: str | None = None

    @property
    def triggers(self) -> tuple[str, ...]:
        return self.card.triggers[:1]


class _Steps:
    """The step callback of a diffusers call, as progress over all groups of pictures, and as looks for who watches."""

    def __init__(
        self,
        progress: Progress,
        watch: Watch,
        groups: int,
        record: Record,
        policy: Policy | None,
        offloaded: bool,
    ) -> None:
        self.progress, self.watch, self.groups, self.done = progress, watch, groups, 0
        self.record, self.policy, self.offloaded = record, policy, offloaded
        self.sketcher = Sketcher(record.request.width or 0, record.request.height or 0)
        count = record.request.steps or 1
        watch(self._look(count, blank))

    def __call__(
        self, pipe: DiffusionPipeline, step: int, timestep: int, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        self.done += 1
        self.progress("denoising", self.done, self.groups * pipe.num_timesteps)
        if self.watch is not unwatched:
            self.sketcher.see(pipe, timestep, kwargs.get("latents"))
            sketch = blank if self.offloaded else functools.partial(self.sketcher.draw, pipe)
            self.watch(self._look(pipe.num_timesteps, sketch))
        return kwargs

    def _look(self, steps: int, sketch: Callable[[], list[PIL.Image.Image]]) -> Look:
        return Look(
            record=self.record,
            policy=self.policy,
            steps=steps,
            done=self.done,
            total=self.groups * steps,
            sketch=sketch,
        )


def _backend_name(composition: Composition | None) -> str:
    """The backend that `auto` chose; no name where there is nothing to compose."""
    return "" if composition is None else composition.backend_name


def _seed(order: Order, index: int) -> int:
    return (order.request.seed or 0) + index


def _library(library: Library | None) -> Library:
    from compose.retrieval.library import Library

    return library or Library.open()


def _named(pick: Pick, library: Library | None) -> Use:
    """The adapter a user named: a name in the library, a .safetensors file, or a folder that holds one."""
    path = Path(pick.name).expanduser()
    card = _library(library).find(resolve(path) if path.is_dir() else pick.name)
    if card.path is None:
        raise AdapterError(
            f"adapter '{card.name}' is only a card here; get its file ({card.source}) and 'compose library add' it"
        )
    return Use(pick=pick, card=card)


def _check_distinct(uses: Sequence[Use]) -> None:
    """Two names may mean one adapter, and two files may have one name; neither can be composed."""
    names = [use.card.name for use in uses]
    for use in uses:
        if names.count(use.card.name) > 1:
            asked = " and ".join(f"'{other.pick.name}'" for other in uses if other.card.name == use.card.name)
            raise RequestError(
                f"{asked} are both adapter '{use.card.name}'; name it once, or rename one file"
            )


def _check_licence(use: Use, wanted: str | None) -> None:
    from compose.retrieval.licences import permits

    if wanted is not None and not permits(use.card.licence, wanted):
        raise AdapterError(
            f"adapter '{use.card.name}' has licence '{use.card.licence}', which does not permit '{wanted}' use; "
            "leave it out, or leave --license out"
        )


def _made_for(metadata: Mapping[str, str]) -> str:
    """The SHA-256 of the base that a sparse adapter is bound to; empty for other adapters, or where it is not told."""
    return metadata.get("compose.base_sha256", "") if SPARSE in metadata else ""


def _applied(use: Use, adapter: Adapter, woven: Sequence[str]) -> Applied:
    path = str(Path(str(use.card.path)).resolve())
    return Applied(
        name=adapter.name,
        asked=use.pick.name,
        weight=use.pick.weight,
        start=use.pick.start,
        stop=use.pick.stop,
        family=adapter.family,
        sha256=file_digest(path),
        weights_sha256=weights_digest(path),
        path=path,
        trigger=", ".join(trigger for trigger in use.triggers if trigger.strip() in woven),
        licence=use.card.licence,
        score=use.score,
        reason=use.reason,
        profile=use.card.metadata.get(PROFILE, "") if of_card(use.card.metadata) else "",
    )


def _triggers(items: Sequence[Applied], adapters: Sequence[Adapter]) -> dict[str, str]:
    """adapter -> the words that call it, also where the prompt said them already; adapters without any are left out."""
    pairs = zip(items, adapters, strict=True)
    found = {
        item.name: item.trigger or adapter.metadata.get("compose.trigger", "") for item, adapter in pairs
    }
    return {name: trigger for name, trigger in found.items() if trigger}


def _partly(adapters: Sequence[Adapter]) -> Iterator[str]:
    for adapter in adapters:
        if adapter.unmatched:
            yield f"adapter '{adapter.name}' acts only in part: {len(adapter.unmatched)} modules not understood ({adapter.unmatched[0]})"


def _holds(path: str, sha256: str) -> bool:
    return Path(path).is_file() and file_digest(path) == sha256


def _embed(pipe: DiffusionPipeline, text: str) -> list[float]:
    """A text's mean hidden state in the base's first text encoder: how policies measure what words matter."""
    tokens = pipe.tokenizer(
        text, truncation=True, max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    )
    with torch.inference_mode():
        output = pipe.text_encoder(tokens.input_ids.to(pipe._execution_device), output_hidden_states=True)
    return output.hidden_states[-1][0].float().mean(0).tolist()
