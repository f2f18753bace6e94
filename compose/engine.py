"""The engine: runs a policy's plan on an unmodified diffusers pipeline, and leaves the pipeline as it found it.

`composed` attaches, every denoiser call is carried out branch by branch, leaving restores to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from compose import rows as call_rows
from compose.adapter import Adapter
from compose.backends import BACKENDS, Backend, Budget, Gate, Job, Spread, choose
from compose.backends.base import check_adapters, refuse_loaded, touched
from compose.cache import Slot
from compose.clock import Clock
from compose.errors import BackendError, ComposeError, RequestError, unknown
from compose.geometry import Geometry
from compose.plan import Branch, Context, Mix, Policy, Step, check_plan
from compose.shared import SharedBase
from compose.sites import TEXT_ENCODERS, Layout, bind, layout_of, matching, sites_of
from compose.takeover import Takeover
from compose.text import Reading, Texts, reworded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger("compose")
NOMINAL_STEPS = 50  # plans are looked through at this many steps before the first, to refuse early
NOTHING = Mix()


class FeatureCache(Protocol):
    """Keeps deep features per branch; compose.cache.FeatureCache is one.

    `branch` surrounds one denoiser pass and gets two values for each of its rows: the slot (branch, ordinal of the call
    within its step, row) and the state, which changes with all that the features depend on: mix, gate, areas, text,
    adapters, picture. `reuse` asks for kept features, `time` grows with each scheduler step; `clear` frees them.
    """

    def branch(
        self,
        denoiser: nn.Module,
        slots: Sequence[Slot],
        states: Sequence[Hashable],
        reuse: bool,
        time: int,
    ) -> AbstractContextManager[None]: ...

    def clear(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that run together, each with its branch."""

    rows: tuple[int, ...]
    branches: tuple[Branch, ...]


@contextmanager
def composed(
    pipe: DiffusionPipeline,
    adapters: Sequence[Adapter],
    policy: Policy | Sequence[Policy],
    backend: str | Callable[[], Backend] = "auto",
    **options: Any,
) -> Iterator[DiffusionPipeline]:
    """The pipeline, drawing under `adapters` as `policy` plans; everything is put back on leaving, bit for bit.

    `policy` may be one per picture of the batch. Options are those of `Composition`.
    Raises ComposeError for what does not fit, before the first step.
    """
    with Composition(pipe, adapters, policy, backend, **options):
        yield pipe


class Composition:
    """A pipeline taken over. Inside `with`, `change` swaps adapters and policy without attaching anew.

    `backend`: a name in BACKENDS, `auto`, or what makes one; `budget`: room of the fixed buffers; `pictures`: how many pictures a batch holds, where the policy treats them
    differently (one policy per picture says it too); `gates`: by the name a mix uses; `cache`: for branches that
    reuse features; `shared` (exact or approximate): the branches of a step run as one batch and share base work;
    `context`: what the policy may know; `say`: gets one line per notice.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        adapters: Sequence[Adapter],
        policy: Policy | Sequence[Policy],
        backend: str | Callable[[], Backend] = "auto",
        *,
        budget: Budget | None = None,
        pictures: int | None = None,
        gates: Mapping[str, Gate] | None = None,
        cache: FeatureCache | None = None,
        shared: str | None = None,
        context: Context | None = None,
        recompile: bool = False,
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.pipe, self.layout = pipe, layout_of(pipe)
        self.denoiser: nn.Module = getattr(pipe, self.layout.denoiser)
        self._forward = type(getattr(self.denoiser, "_orig_mod", self.denoiser)).forward
        self._budget, self._gates, self._cache = budget or Budget(), gates or {}, cache
        self._context, self._recompile, self.say = context or Context(), recompile, say
        self._pictures, self._asked_shared = pictures, shared
        self._adapters = list(adapters)
        self._set_policy(policy)
        self._asked = backend
        self.backend_name = ""  # the one in use, where it has a name

    def _set_policy(self, policy: Policy | Sequence[Policy]) -> None:
        policies = list(policy) if isinstance(policy, Sequence) else [policy]
        if not policies:
            raise RequestError("composing needs a policy")
        self.policies = [each.prepare(self._context) for each in policies]
        self.pictures = self._pictures or len(policies)
        if len(policies) not in (1, self.pictures):
            raise RequestError(
                f"{len(policies)} policies for {self.pictures} pictures; give one, or one per picture"
            )

    def __enter__(self) -> Self:
        self._takeover = Takeover(self.pipe, self.denoiser, [self.denoiser, *self._text_encoders()])
        self.backend = self.text_backend = self.shared = None
        try:
            self._check()
            self._attach()
        except BaseException:
            self._restore()
            raise
        return self

    def _check(self) -> None:
        refuse_loaded([self.denoiser, *self._text_encoders()])
        if self._cache is not None and getattr(self.denoiser, "is_cache_enabled", False):
            raise BackendError(
                "this denoiser has a cache of diffusers' enabled; call its disable_cache(), or give no cache here"
            )
        self._sites = sites_of(self.pipe)
        check_adapters(self._adapters, self._sites)
        self._check_patterns()

    def __exit__(self, *error: object) -> None:
        self._restore()

    def change(
        self, adapters: Sequence[Adapter] | None = None, policy: Policy | Sequence[Policy] | None = None
    ) -> None:
        """Other adapters and another policy from the next picture on, within the budget; nothing is recompiled."""
        self._takeover.check_thread()
        before = (self._adapters, self.policies, self.pictures)
        try:
            if policy is not None:
                self._set_policy(policy)
            self._exchange(self._adapters if adapters is None else list(adapters))
        except ComposeError:
            adapters, self.policies, self.pictures = before
            self._exchange(adapters)
            raise

    def _exchange(self, adapters: list[Adapter]) -> None:
        if adapters is not self._adapters:
            check_adapters(adapters, self._sites)
            self._refill(adapters)
        self._check_patterns()
        self._check_plans()
        self.shared = self._share_base()
        self._renew()

    def _refill(self, adapters: list[Adapter]) -> None:
        had_text = self.text_backend is not None
        if bool(self._touching(adapters, TEXT_ENCODERS)) > had_text:
            raise BackendError(
                "these adapters change text encoders and the first ones did not; compose again"
            )
        self._adapters = adapters  # before filling, so that a failure fills the earlier ones in again
        for backend in filter(None, (self.backend, self.text_backend)):
            backend.fill(adapters)
        self._text_names = self._touching(adapters, TEXT_ENCODERS)

    # attaching

    def _make_backends(self) -> tuple[Backend, Backend | None]:
        self._text_names = self._touching(self._adapters, TEXT_ENCODERS)
        make = self._named(self._asked) if isinstance(self._asked, str) else self._asked
        return make(), make() if self._text_names else None

    def _named(self, name: str) -> Callable[[], Backend]:
        if name == "auto":
            roots = [self.denoiser, *self._text_encoders()]
            name, reason = choose(self._mixes(), self._adapters, self._sites, roots)
            self.say(f"backend {name}: {reason}")
        if name not in BACKENDS:
            raise RequestError(unknown("backend", name, ["auto", *BACKENDS]))
        self.backend_name = name
        return BACKENDS[name]

    def _attach(self) -> None:
        self.backend, self.text_backend = self._make_backends()
        if not self.backend.in_weights:
            self._takeover.check_compiled(self._recompile, self.say)
        self.backend.attach(self._job((self.layout.denoiser,), self._budget, self.layout.mixed))
        if self.text_backend is not None:
            self.text_backend.attach(self._job(TEXT_ENCODERS, self._budget, mixed=False))
        self.shared = self._share_base()
        self._check_plans()
        self._clock = Clock(self.pipe.scheduler, self._to_timestep)
        self._ordinal = 0  # of the denoiser call within its step
        self._time = 0  # scheduler steps taken
        self._age = 0  # kept features outlive neither the picture nor adapters, policies and text
        self._renew()
        self._route()

    def _share_base(self) -> SharedBase | None:
        """Sharing, where it is asked for and rows of one call may differ; else branches run one after the other."""
        if self._asked_shared is None:
            return None
        shared = self.shared or SharedBase(self.denoiser, self._asked_shared)
        reason = ""
        if self.text_backend is not None or self._reworded():
            reason = "adapters of text encoders and regions give each branch its own text"
        elif self.backend.rows == 1:
            reason = "this backend or model carries one mix per call"
        if reason:
            self.say(f"no shared base work: {reason}")
        return None if reason else shared

    def _renew(self) -> None:
        """Forget what belongs to earlier adapters and policies."""
        self._forget()
        self._reached = {id(self._sites[name].module) for name in touched(self._adapters, self._sites)}
        self._texts = Texts()
        self._geometry = Geometry(self.layout, self._areas())
        self._step_caches: dict[str, Hashable] = {}

    def _forget(self) -> None:
        """Kept features are of the past: another picture, other adapters, another policy."""
        self._age += 1
        if self.shared is not None:
            self.shared.forget()
        self._seen: dict[int, Any] = {}
        if self._cache is not None:
            self._cache.clear()

    def _job(self, components: Sequence[str], budget: Budget, mixed: bool) -> Job:
        sites = self._sites.of(components)
        return Job(
            sites=sites,
            adapters=self._adapters,
            roots=[m for name in components if isinstance(m := getattr(self.pipe, name, None), nn.Module)],
            budget=budget,
            gates=self._gates,
            device=torch.device(self.pipe._execution_device),
            dtype=self.denoiser.dtype,
            mixed=mixed,
            say=self.say,
        )

    def _route(self) -> None:
        scheduler, take = self.pipe.scheduler, self._takeover
        take.replace(scheduler, "step", self._ticking)
        take.replace(scheduler, "set_timesteps", self._starting)
        if hasattr(self.pipe, "encode_prompt"):
            take.replace(self.pipe, "encode_prompt", self._encoding)
        take.route(self._denoise)

    def _restore(self) -> None:
        try:
            for backend in filter(None, (self.text_backend, self.backend)):
                backend.detach()
        finally:
            self._takeover.restore()
            if self._cache is not None:
                self._cache.clear()
            if getattr(self.denoiser, "is_cache_enabled", False):
                self.denoiser._reset_stateful_cache()

    # checks

    def _branches(self) -> Iterator[Branch]:
        """All branches of a nominal run."""
        for index in range(NOMINAL_STEPS):
            for picture in range(self.pictures):
                sigma = 1 - index / NOMINAL_STEPS
                yield from self._plan(Step(index=index, count=NOMINAL_STEPS, sigma=sigma), picture)

    def _mixes(self) -> list[Mix]:
        """Distinct mixes of a nominal run of the denoiser."""
        return list({branch.mix.key(): branch.mix for branch in self._branches()}.values())

    def _check_plans(self) -> None:
        for mix in self._mixes():
            self.backend.check(mix)

    def _check_patterns(self) -> None:
        """Every site pattern of every mix means at least one site of its adapter."""
        named = {adapter.name: adapter for adapter in self._adapters}
        for mix in self._mixes():
            for name, weight in mix.weights.items():
                if isinstance(weight, Mapping) and name in named:
                    sites = dict.fromkeys((*named[name].deltas, *named[name].biases))
                    for pattern in [each for each in weight if each not in sites]:
                        matching(pattern, sites)

    def _touching(self, adapters: Sequence[Adapter], components: Sequence[str]) -> list[str]:
        """Names of the adapters that change any of these components."""
        return [
            adapter.name
            for adapter in adapters
            if any(name.partition(".")[0] in components for name in (*adapter.deltas, *adapter.biases))
        ]

    def _text_encoders(self) -> list[nn.Module]:
        found = [getattr(self.pipe, name, None) for name in TEXT_ENCODERS]
        return [module for module in found if isinstance(module, nn.Module)]

    # running

    def _policy(self, picture: int) -> Policy:
        return self.policies[picture if len(self.policies) > 1 else 0]

    def _areas(self) -> list[Mapping[str, Any]]:
        return [self._policy(picture).areas for picture in range(self.pictures)]

    def _plan(self, step: Step, picture: int) -> Sequence[Branch]:
        policy = self._policy(picture)
        branches = policy.plan(step, picture)
        check_plan(branches, policy.areas)
        if self._cache is None and any(branch.reuse for branch in branches):
            raise BackendError("this policy reuses features, and no feature cache is given; pass cache=...")
        return branches

    def _to_timestep(self, argument: float) -> float:
        scale, offset = self.layout.clock
        return scale * argument + offset

    def _ticking(self, step: Callable) -> Callable:
        def ticking(*args: Any, **kwargs: Any) -> Any:
            self._takeover.check_thread()
            result = step(*args, **kwargs)
            self._clock.tick()
            self._ordinal, self._time = 0, self._time + 1
            return result

        return ticking

    def _starting(self, set_timesteps: Callable) -> Callable:
        def starting(*args: Any, **kwargs: Any) -> Any:
            self._takeover.check_thread()
            self._clock.reset()
            self._ordinal = 0
            self._forget()
            return set_timesteps(*args, **kwargs)

        return starting

    def _encoding(self, encode: Callable) -> Callable:
        def run(args: tuple, kwargs: dict, reading: Reading, positive: bool) -> Any:
            if self.text_backend is not None:
                self.text_backend.apply([reading.mix])
            if reading.prompt is not None and positive:
                args, kwargs = reworded(args, kwargs, reading.prompt)
            return encode(*_copied(args), **_copied(kwargs))

        def encoding(*args: Any, **kwargs: Any) -> Any:
            self._takeover.check_thread()
            branch = self._plan(Step(index=0, count=NOMINAL_STEPS, sigma=1.0), 0)[0]
            first = Reading(mix=self._reading(branch).mix)
            kept = (_copied(args), _copied(kwargs))
            prompt = kept[0][0] if args else kept[1].get("prompt")
            positive = prompt is not None and self._texts.is_first()
            return self._texts.encode(lambda reading: run(*kept, reading, positive), first, prompt)

        return encoding

    def _reading(self, branch: Branch) -> Reading:
        """How this branch has the prompt encoded; chats, whose words have no fixed places, are left as they are."""
        mix = branch.mix if branch.text is None else branch.text
        mine = Mix(weights={name: weight for name, weight in mix.weights.items() if name in self._text_names})
        return Reading(mix=mine, prompt=branch.prompt if self.layout.tokenizers else None)

    def _reworded(self) -> bool:
        return any(self._reading(branch).prompt is not None for branch in self._branches())

    def _denoise(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        """One denoiser call: every branch of every picture, then the share-weighted sum."""
        self._takeover.check_thread()
        self._texts.use()
        call = bind(self._forward, args, kwargs)
        total = call_rows.count(self.layout, call)
        step = self._clock.now(call[_timestep_name(self.layout)])
        plans = [self._plan(step, picture) for picture in range(self.pictures)]
        ordinal, self._ordinal = self._ordinal, self._ordinal + 1
        if self._cache is not None:
            self._watch_text(call, ordinal)
        positive = self._positive(total, ordinal)
        outputs = [(each, self._run(original, call, each, ordinal)) for each in self._passes(plans, positive)]
        if len(outputs) == 1 and all(branch.share == 1 for branch in outputs[0][0].branches):
            return outputs[0][1]
        return self._summed(call, total, outputs)

    def _watch_text(self, call: Mapping[str, Any], ordinal: int) -> None:
        """Features kept under another text are of the past: a step callback may exchange the prompt."""
        text = [part for name in self.layout.text for part in _tensors(call.get(name))]
        before = self._seen.setdefault(ordinal, text)
        if not _equal(text, before):
            self._forget()
        self._seen[ordinal] = text

    def _summed(self, call: Mapping[str, Any], total: int, outputs: Sequence[tuple[Pass, Any]]) -> Any:
        added = call_rows.Sum(total)
        for each, output in outputs:
            shares = [
                self._geometry.share(call, branch.share, row % self.pictures)
                for row, branch in zip(each.rows, each.branches, strict=True)
            ]
            added.add(call_rows.first(output), each.rows, shares)
        last = outputs[-1][1]
        return call_rows.with_first(last, added.result(call_rows.first(last)))

    def _positive(self, total: int, ordinal: int) -> list[bool]:
        """Per row whether it reads the prompt, rather than the negative prompt, in the order of the family."""
        if self.layout.guidance == "twice":
            return [ordinal == 0] * total
        doubled = (
            self.layout.guidance == "doubled" and ordinal == 0
        )  # a further call, of SD3, skips layers instead
        guided = doubled and getattr(self.pipe, "do_classifier_free_guidance", False)
        negatives = [False] * (total // 2) if guided else []
        return [*negatives, *[True] * (total - len(negatives))]

    def _passes(self, plans: Sequence[Sequence[Branch]], positive: Sequence[bool]) -> Iterator[Pass]:
        """The n-th branches of all rows together (all branches, where base work is shared), as far as the backend can
        carry their mixes in one call."""
        total = len(positive)
        every = range(max(map(len, plans)))
        if total % self.pictures:
            raise RequestError(f"a batch of {total} rows cannot hold {self.pictures} pictures; set pictures=")
        for together in [every] if self.shared is not None else [[n] for n in every]:
            chosen = [
                (row, plans[row % self.pictures][n])
                for n in together
                for row in range(total)
                if n < len(plans[row % self.pictures])
            ]
            for group in self._groups(chosen, positive):
                yield Pass(tuple(row for row, _ in group), tuple(branch for _, branch in group))

    def _groups(
        self, chosen: Sequence[tuple[int, Branch]], positive: Sequence[bool]
    ) -> Iterator[Sequence[tuple[int, Branch]]]:
        groups: dict[Hashable, list[tuple[int, Branch]]] = {}
        for row, branch in chosen:
            groups.setdefault(self._kind(row, branch, positive[row]), []).append((row, branch))
        for group in groups.values():
            mixed = len({branch.mix.key() for _, branch in group}) > 1
            size = self.backend.rows if mixed else len(group)
            if self.shared is not None and size > len(positive):
                size -= size % len(positive)  # whole branches, which alone can share
            yield from (group[n : n + size] for n in range(0, len(group), size))

    def _kind(self, row: int, branch: Branch, positive: bool) -> Hashable:
        """Rows of one kind may share a call: same gate, mask and reuse of features, and the same mix where the backend
        needs it. A mask ties them to one picture's areas, and to the prompt if words matter."""
        mix = branch.mix
        area = (row % self.pictures, positive and self._worded()) if mix.mask else None
        return (mix.gate, mix.mask, branch.reuse, area, mix.key() if self.backend.rows == 1 else None)

    def _worded(self) -> bool:
        return any(area.words for areas in self._areas() for area in areas.values())

    def _run(self, original: Callable, call: Mapping[str, Any], each: Pass, ordinal: int) -> Any:
        chosen = call_rows.pick(self.layout, self._in_words(call, each), each.rows)
        mixes = [branch.mix for branch in each.branches]
        same = len({mix.key() for mix in mixes}) == 1
        spread = self._spread(call, each.rows[0], ordinal) if mixes[0].mask else None
        self.backend.apply(mixes[:1] if same else mixes, spread)
        with self._caching(each, ordinal), self._sharing(each):
            return original(**chosen)

    def _sharing(self, each: Pass) -> AbstractContextManager[None]:
        return nullcontext() if self.shared is None else self.shared.over(each.rows, self._is_touched)

    def _is_touched(self, block: nn.Module) -> bool:
        """Whether an adapter may act on any layer of this block."""
        return any(id(module) in self._reached for module in block.modules())

    def _in_words(self, call: Mapping[str, Any], each: Pass) -> Mapping[str, Any]:
        """The call with the text of these rows as their branches have it encoded."""
        if self.text_backend is None and all(branch.prompt is None for branch in each.branches):
            return call
        readings: list[Reading | None] = [None] * call_rows.count(self.layout, call)
        for row, branch in zip(each.rows, each.branches, strict=True):
            readings[row] = self._reading(branch)
        text = {name: call[name] for name in self.layout.text if call.get(name) is not None}
        return {**call, **{name: self._texts.swap(value, readings) for name, value in text.items()}}

    def _spread(self, call: Mapping[str, Any], row: int, ordinal: int) -> Spread:
        picture = row % self.pictures
        words: dict[str, Tensor] = {}
        if self._positive(call_rows.count(self.layout, call), ordinal)[row]:
            for name, area in self._policy(picture).areas.items():
                if area.words:
                    words[name] = self._texts.share_of(self.pipe, self.layout, area.words)
        return self._geometry.spread(call, picture, words)

    def _caching(self, each: Pass, ordinal: int) -> AbstractContextManager[None]:
        """Features kept by a step cache belong to one branch, one mix and one call of the step (trap T4)."""
        mixes = tuple(_identity(branch) for branch in each.branches)
        key = (each.branches[0].key, ordinal, each.rows)
        if self._cache is not None:
            slots = [
                Slot(branch.key, ordinal, row) for row, branch in zip(each.rows, each.branches, strict=True)
            ]
            states = [(self._age, mix) for mix in mixes]
            return self._cache.branch(self.denoiser, slots, states, each.branches[0].reuse, self._time)
        if not getattr(self.denoiser, "is_cache_enabled", False):
            return nullcontext()
        name = f"compose {key}"
        if self._step_caches.setdefault(name, mixes) != mixes:
            self.denoiser._reset_stateful_cache()  # as diffusers does after each picture
            self._step_caches = {name: mixes}
        return self.denoiser.cache_context(name)


def _identity(branch: Branch) -> Hashable:
    return (branch.key, branch.mix.key(), None if branch.text is None else branch.text.key(), branch.prompt)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a tensor, a list or a dict."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Equal shapes and numbers; the same objects are not read."""
    return len(some) == len(others) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b.to(a.device)))
        for a, b in zip(some, others, strict=True)
    )


def _timestep_name(layout: Layout) -> str:
    return "t" if "t" in layout.rows else "timestep"


def _copied(value: Any) -> Any:
    """Lists and dicts anew (some pipelines write into the prompt list they are given), tensors as they are."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
