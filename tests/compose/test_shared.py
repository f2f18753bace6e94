"""Shared base work: exact equals branch by branch, saves what it may, and says when it cannot."""

from __future__ import annotations

import pytest
import tiny
import torch

from compose.backends import Budget
from compose.cache import FeatureCache
from compose.engine import Composition
from compose.errors import BackendError, RequestError
from compose.policies import Cached, Composite, Merge, Schedule, Switch, window

FAMILIES = ["sd15", "sdxl", "sd3", "flux", "kontext", "qwen-image"]
WEIGHTS = {"a": 0.8, "b": -0.5, "c": 0.4}
LATE = {
    "sd15": "up_blocks.1",
    "sdxl": "up_blocks.1",
    "sd3": "transformer_blocks.2",
    "qwen-image": "transformer_blocks.1",
}


@pytest.fixture(scope="module")
def built():
    made = {}

    def get(family, late=False):
        if (family, late) not in made:
            pipe = tiny.PIPELINES[family](0)
            part = LATE.get(family, "single_transformer_blocks.1") if late else ""
            adapters = [
                tiny.random_adapter(pipe, name, seed=n, match=lambda site: part in site)
                for n, name in enumerate("abc")
            ]
            made[family, late] = pipe, adapters
        return made[family, late]

    return get


def drawn(pipe, adapters, policy, family, shared, cache=None, **more):
    """(latents, composition as it was left)."""
    with Composition(pipe, adapters, policy, "torch", shared=shared, cache=cache) as composition:
        return tiny.image(pipe, family, output_type="latent", **more), composition


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_sharing_equals_plain_composite(built, family, late):
    pipe, adapters = built(family, late)
    wanted, _ = drawn(pipe, adapters, Composite(weights=WEIGHTS), family, None)
    got, composition = drawn(pipe, adapters, Composite(weights=WEIGHTS), family, "exact")
    assert error(got, wanted) <= 1e-5
    assert composition.shared.counts.saved > 0


def test_adapters_that_act_late_share_all_that_lies_before(built):
    shares = {}
    for late in (False, True):
        pipe, adapters = built("flux", late)
        ran = []
        hook = pipe.transformer.transformer_blocks[1].register_forward_hook(
            lambda module, args, output, ran=ran: ran.append(len(output[1]))
        )
        drawn(pipe, adapters, Composite(weights=WEIGHTS), "flux", "exact")
        hook.remove()
        shares[late] = ran
    assert shares == {False: [3, 3], True: [1, 1]}  # rows that the second block computed, per step


def test_the_base_product_of_an_equal_input_is_computed_for_one_branch(built):
    pipe, adapters = built("flux")
    seen = []
    first = pipe.transformer.x_embedder
    forward = type(first).forward

    class Counting(type(first)):
        def forward(self, x):
            seen.append(len(x))
            return forward(self, x)

    kind, first.__class__ = type(first), Counting
    try:
        drawn(pipe, adapters, Composite(weights=WEIGHTS), "flux", "exact")
    finally:
        first.__class__ = kind
    assert seen == [1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_approximate_sharing_computes_every_large_base_product_once(built, family):
    """Close for small deltas: the error falls with their square, as what it leaves out is of second order in part."""
    pipe, adapters = built(family)
    errors = []
    for size in (0.1, 0.01):
        weights = {name: size * weight for name, weight in WEIGHTS.items()}
        wanted, _ = drawn(pipe, adapters, Composite(weights=weights), family, None, num_inference_steps=1)
        got, composition = drawn(
            pipe, adapters, Composite(weights=weights), family, "approximate", num_inference_steps=1
        )
        errors.append(error(got, wanted))
        counts = composition.shared.counts
        assert counts.saved * 3 == counts.asked * 2
    assert errors[1] < errors[0] / 20
    assert errors[1] < 1e-3


def test_a_mean_of_branches_of_one_linear_layer_is_exact():
    """Where only the last layer is touched, approximate sharing is exact for equal shares."""
    pipe = tiny.flux(0)
    adapters = [
        tiny.random_adapter(
            pipe, n, seed=i, match=lambda site: site.endswith("proj_out") and "blocks" not in site
        )
        for i, n in enumerate("abc")
    ]
    wanted, _ = drawn(pipe, adapters, Composite(weights=WEIGHTS), "flux", None)
    got, _ = drawn(pipe, adapters, Composite(weights=WEIGHTS), "flux", "approximate")
    assert error(got, wanted) <= 1e-5


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_cached_branches_share_too(built, family):
    pipe, adapters = built(family)
    pictures, caches = [], []
    for shared in (None, "exact"):
        caches.append(FeatureCache())
        picture, _ = drawn(
            pipe, adapters, Cached(weights=WEIGHTS), family, shared, caches[-1], num_inference_steps=5
        )
        pictures.append(picture)
    assert error(pictures[1], pictures[0]) <= 1e-5
    assert caches[1].counts.reused > 0
    assert caches[1].peak == caches[0].peak


def test_a_batch_of_pictures_shares_as_each_alone(built):
    pipe, adapters = built("flux")
    start = torch.randn(2, (tiny.SIDE // 4) ** 2, 16, generator=torch.Generator().manual_seed(3))
    more = {"prompt": ["a dog", "a cat"], "latents": start}
    wanted, _ = drawn(pipe, adapters, Composite(weights=WEIGHTS), "flux", None, **more)
    got, composition = drawn(pipe, adapters, Composite(weights=WEIGHTS), "flux", "exact", **more)
    assert error(got, wanted) <= 1e-5
    assert composition.shared.counts.saved > 0


def test_branches_beyond_the_room_of_a_call_share_in_several(built):
    pipe, adapters = built("flux")
    start = torch.randn(2, (tiny.SIDE // 4) ** 2, 16, generator=torch.Generator().manual_seed(3))
    more = {"prompt": ["a dog", "a cat"], "latents": start, "output_type": "latent"}
    asked = []
    for rows in (6, 5):  # three branches of two pictures, or two branches and then one
        budget = Budget(rows=rows)
        with Composition(
            pipe, adapters, Composite(weights=WEIGHTS), "torch", shared="exact", budget=budget
        ) as composition:
            picture = tiny.image(pipe, "flux", **more)
        asked.append((composition.shared.counts.saved, picture))
    assert asked[0][0] == 2 * asked[1][0] > 0
    assert error(asked[1][1], asked[0][1]) <= 1e-5


@pytest.mark.parametrize("policy", [Merge(weights=WEIGHTS), Switch(weights=WEIGHTS)])
def test_one_branch_has_nothing_to_share_and_is_left_alone(built, policy):
    pipe, adapters = built("flux")
    wanted, _ = drawn(pipe, adapters, policy, "flux", None)
    got, composition = drawn(pipe, adapters, policy, "flux", "exact")
    assert torch.equal(got, wanted)
    assert composition.shared.counts.asked == 0


def test_what_differs_is_found_again_after_the_mixes_change(built):
    pipe, adapters = built("flux")
    policy = Schedule(policy=Composite(weights=WEIGHTS), curves={n: window(0.0, 0.5) for n in "abc"})
    wanted, _ = drawn(pipe, adapters, policy, "flux", None, num_inference_steps=4)
    got, _ = drawn(pipe, adapters, policy, "flux", "exact", num_inference_steps=4)
    assert error(got, wanted) <= 1e-5


def test_the_model_is_put_back(built):
    pipe, adapters = built("flux")
    before = [(type(m), sorted(m.__dict__)) for m in pipe.transformer.modules()]
    drawn(pipe, adapters, Composite(weights=WEIGHTS), "flux", "exact")
    assert [(type(m), sorted(m.__dict__)) for m in pipe.transformer.modules()] == before


def said(pipe, adapters, backend="torch"):
    lines = []
    with Composition(
        pipe, adapters, Composite(weights=WEIGHTS), backend, shared="exact", say=lines.append
    ) as c:
        assert c.shared is None
    return " ".join(lines)


def test_where_it_cannot_share_it_says_so(built):
    pipe, adapters = built("flux")
    assert "one mix per call" in said(pipe, adapters, "fold")
    text = [
        tiny.random_adapter(pipe, n, components=["transformer", "text_encoder"], seed=i)
        for i, n in enumerate("abc")
    ]
    assert "its own text" in said(pipe, text)
    listed = tiny.PIPELINES["z-image"](0)
    assert "one mix per call" in said(listed, [tiny.random_adapter(listed, n) for n in "abc"])


def test_wrong_use_is_refused(built):
    pipe, adapters = built("flux")
    with (
        pytest.raises(RequestError, match="shared mode 'exakt' is unknown"),
        Composition(pipe, adapters, Composite(weights=WEIGHTS), "torch", shared="exakt"),
    ):
        pass
    compiled = tiny.flux(1)
    compiled.transformer.compile_repeated_blocks(backend="eager")
    with (
        pytest.raises(BackendError, match="not compiled"),
        Composition(compiled, adapters, Composite(weights=WEIGHTS), "torch", shared="exact", recompile=True),
    ):
        pass
