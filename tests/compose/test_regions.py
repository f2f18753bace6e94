"""Regions: shares that sum to 1, exactness of both modes, and adapters that stay where they belong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import tiny
import torch

from compose.engine import Composition, composed
from compose.errors import BackendError, RequestError
from compose.geometry import Tokens
from compose.masks import cover, partition
from compose.plan import REST, Area, Branch, Context, Mix, Policy, Step, check_plan
from compose.policies import Merge, Regions
from compose.sites import LAYOUTS
from compose.words import token_share

FAMILIES = ["sd15", "sdxl", "sd3", "flux", "kontext", "qwen-image", "z-image"]
WHOLE, LEFT, RIGHT = Area(box=(0, 0, 1, 1)), Area(box=(0, 0, 0.5, 1)), Area(box=(0.5, 0, 1, 1))


def latents(pipe, family, **more):
    return tiny.image(pipe, family, output_type="latent", **more)


def test_a_box_covers_cells_exactly():
    assert torch.allclose(cover(Area(box=(0.25, 0.0, 1.0, 0.5)), 1, 2), torch.tensor([[0.25, 0.5]]))
    assert cover(Area(box=(0.1, 0.2, 0.7, 0.9)), 7, 5).mean() == pytest.approx(0.6 * 0.7, abs=1e-6)


def test_a_mask_picture_is_averaged_over_cells():
    picture = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    assert torch.allclose(cover(Area(picture=picture), 1, 2), torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize("size", [(4, 4), (7, 3)])
def test_shares_sum_to_one_everywhere_also_where_areas_overlap(size):
    areas = {"a": Area(box=(0, 0, 0.6, 1)), "b": Area(box=(0.3, 0.2, 1, 0.9))}
    shares = partition(areas, *size)
    assert torch.allclose(sum(shares.values()), torch.ones(size))
    assert all((share >= 0).all() for share in shares.values())
    assert shares[REST].max() > 0


@pytest.mark.parametrize(
    ("area", "message"),
    [
        ({"box": (0, 0, 1.2, 1)}, "outside the picture"),
        ({"box": (0.5, 0, 0.5, 1)}, "outside the picture"),
        ({}, "either a box"),
        ({"box": (0, 0, 1, 1), "picture": [[1.0]]}, "either a box"),
    ],
)
def test_areas_outside_the_picture_are_refused(area, message):
    with pytest.raises(RequestError, match=message):
        Area(**area)


def test_masks_of_wrong_shape_or_range_are_refused():
    for picture in ([1.0, 0.0], [[2.0]], [[float("nan")]]):
        with pytest.raises(RequestError, match="mask"):
            cover(Area(picture=picture), 2, 2)


def test_regions_need_regions_of_known_adapters():
    with pytest.raises(RequestError, match="at least one region"):
        Regions(weights={"a": 1.0}, regions={})
    with pytest.raises(RequestError, match="adapter 'b' is unknown"):
        Regions(weights={"a": 1.0}, regions={"b": LEFT})
    with pytest.raises(RequestError, match="regions mode 'exakt' is unknown"):
        Regions(weights={"a": 1.0}, regions={"a": LEFT}, mode="exakt")


def test_the_exact_plan_is_complete():
    policy = Regions(weights={"a": 1.0, "b": 0.5, "style": 0.3}, regions={"a": LEFT, "b": RIGHT})
    plan = policy.plan(Step(index=0, count=1, sigma=1.0), 0)
    check_plan(plan, policy.areas)
    assert [branch.share for branch in plan] == ["a", "b", REST]
    assert [dict(branch.mix.weights) for branch in plan] == [
        {"style": 0.3, "a": 1.0},
        {"style": 0.3, "b": 0.5},
        {"style": 0.3},
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_regions_leave_the_other_half_of_one_prediction_alone(family):
    """One step: where a region does not reach, the latent is the base's, to the bit."""
    pipe = tiny.PIPELINES[family](0)
    adapters = [tiny.random_adapter(pipe, "a")]
    once = {"num_inference_steps": 1}
    base, full = latents(pipe, family, **once), None
    with composed(pipe, adapters, Merge(weights={"a": 1.0}), "torch"):
        full = latents(pipe, family, **once)
    with composed(pipe, adapters, Regions(weights={"a": 1.0}, regions={"a": LEFT}), "torch"):
        got = latents(pipe, family, **once)
    got, base, full = (on_grid(x, family) for x in (got, base, full))
    half = got.shape[-1] // 2
    if family != "qwen-image":  # its guidance rescales by norms over channels: still local, but rounded anew
        assert torch.equal(got[..., half:], base[..., half:])
    assert torch.allclose(got[..., half:], base[..., half:], atol=1e-5)
    assert torch.allclose(got[..., :half], full[..., :half], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[..., :half], base[..., :half], atol=1e-3)


def on_grid(latent: torch.Tensor, family: str) -> torch.Tensor:
    """Packed latents (1, tokens, C) to (1, C, height, width)."""
    if family in ("flux", "kontext", "qwen-image"):
        side = tiny.SIDE // 4
        return latent.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return latent.squeeze(2) if latent.dim() == 5 else latent


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "kontext"])
def test_a_cheap_region_over_the_whole_picture_is_merge_on_image_sites(family):
    pipe = tiny.PIPELINES[family](0)
    image_sites = {
        "sd15": "attn1",
        "sdxl": "attn1",
        "sd3": ".attn.to_",
        "flux": ".transformer_blocks.0.attn.to_q",
        "qwen-image": ".img_mlp.",
        "z-image": "noise_refiner.0.attention",
    }[family]
    adapters = [tiny.random_adapter(pipe, "a", match=lambda s: image_sites in s and "add_out" not in s)]
    with composed(pipe, adapters, Merge(weights={"a": 1.0}), "torch"):
        wanted = latents(pipe, family)
    with composed(pipe, adapters, Regions(weights={"a": 1.0}, regions={"a": WHOLE}, mode="cheap"), "torch"):
        assert torch.allclose(latents(pipe, family), wanted, atol=1e-5)
    assert not torch.allclose(latents(pipe, family), wanted, atol=1e-3)


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "kontext", "qwen-image"])
def test_a_cheap_delta_touches_the_tokens_of_its_region_only(family):
    """What the first site that an adapter changes gives out differs from the base in the left half alone."""
    pipe = tiny.PIPELINES[family](0)
    site = {
        "sd15": "unet.conv_in",
        "sd3": "transformer.pos_embed.proj",
        "qwen-image": "transformer.img_in",
    }.get(family, "transformer.x_embedder")
    adapter = tiny.random_adapter(pipe, "a", match=lambda s: s == site, convolutions=True)
    assert list(adapter.deltas) == [site]
    module = pipe.components[site.split(".")[0]].get_submodule(site.partition(".")[2])

    def first_output():
        seen = []
        handle = module.register_forward_hook(lambda m, i, o: seen.append(o.clone()))
        latents(pipe, family, num_inference_steps=1)
        handle.remove()
        return seen[0]

    base = first_output()
    with composed(pipe, [adapter], Regions(weights={"a": 1.0}, regions={"a": LEFT}, mode="cheap"), "torch"):
        changed = (first_output() - base).abs()
    if changed.dim() == 3:
        side = tiny.SIDE // 4
        assert changed[:, side * side :].sum() == 0  # reference pictures
        changed = changed[:, : side * side].reshape(-1, side, side, changed.shape[-1]).permute(0, 3, 1, 2)
    half = changed.shape[-1] // 2
    assert changed[..., half:].sum() == 0
    assert (changed[..., :half].amax(1) > 0).all()


def test_layers_without_tokens_and_text_without_words_do_without_bound_adapters():
    pipe = tiny.flux(0)
    for part in ("time_text_embed", "norm1.linear", "add_q_proj", "context_embedder"):
        adapter = tiny.random_adapter(pipe, "a", match=lambda s, part=part: part in s)
        base = latents(pipe, "flux")
        with composed(
            pipe, [adapter], Regions(weights={"a": 1.0}, regions={"a": LEFT}, mode="cheap"), "torch"
        ):
            assert torch.equal(latents(pipe, "flux"), base), part


def tokens(family: str, height: int, width: int, text: int, words=None) -> Tokens:
    return Tokens(LAYOUTS[family], height, width, text, {"a": LEFT}, words or {})


def test_text_and_image_lie_in_each_familys_order():
    flux = tokens("flux", 2, 2, 3, {"a": torch.tensor([0.0, 1.0])})
    joint = flux.share((3 + 4 + 4,), "a", "transformer.single_transformer_blocks.0.attn.to_q")
    assert joint.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    assert flux.share((4,), "a", "transformer.transformer_blocks.0.attn.to_q").tolist() == [1, 0, 1, 0]
    assert flux.share((3,), "a", "transformer.transformer_blocks.0.attn.add_k_proj").tolist() == [0, 1, 0]
    z = tokens("z-image", 4, 4, 5)
    assert z.share((4 + 5,), "a", "transformer.layers.0.attention.to_q").tolist() == [
        1,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
    ]
    unet = tokens("sd15", 4, 6, 77)
    assert unet.share((6,), "a", "unet.mid_block.attentions.0.attn1.to_q").tolist() == [1, 0.5, 0, 1, 0.5, 0]
    odd = tokens("sd15", 5, 6, 77)  # levels of 5 x 6, 3 x 3, 2 x 2
    assert odd.share((9,), "a", "unet.mid_block.attentions.0.attn1.to_q").tolist() == [1, 0.5, 0] * 3
    with pytest.raises(BackendError, match="7 tokens fit no level of a 5 x 6 latent"):
        odd.share((7,), "a", "unet.mid_block.attentions.0.attn1.to_q")
    assert unet.share((), "a", "unet.time_embedding.linear_1").item() == 0
    assert unet.share((4,), "b", "unet.anything") is None


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_words_are_found_among_the_tokens(family):
    pipe, layout = tiny.PIPELINES[family](0), LAYOUTS[family]
    share = token_share(pipe, layout, "a red dog", "dog")
    name, before = layout.tokenizers[-1]
    tokenizer = getattr(pipe, name)
    ids = tokenizer("a red dog").input_ids
    own = share[77:] if family == "sd3" else share
    chosen = [token for token, part in zip(ids, own.tolist(), strict=False) if part]
    assert tokenizer.decode(chosen).strip() == "dog"
    assert share[: before + 1].sum() == 0


def test_words_that_the_prompt_does_not_hold_are_refused():
    pipe = tiny.flux(0)
    area = Area(box=(0, 0, 0.5, 1), words="elephant")
    adapters = [tiny.random_adapter(pipe, "a")]
    policy = Regions(weights={"a": 1.0}, regions={"a": area}, mode="cheap")
    with (
        composed(pipe, adapters, policy, "torch"),
        pytest.raises(RequestError, match="does not hold the words 'elephant'"),
    ):
        latents(pipe, "flux")
    with pytest.raises(RequestError, match="does not hold the words 'elephant'"):
        replace(policy, mode="exact").prepare(Context(prompts=["an Elephant", "a dog"]))
    with pytest.raises(RequestError, match="cannot be placed in the text of z-image"):
        token_share(None, LAYOUTS["z-image"], "a dog", "dog")


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_words_let_a_text_side_delta_reach_its_own_tokens_and_not_the_negative_prompt(family):
    pipe = tiny.PIPELINES[family](0)
    part = "attn2.to_k" if family == "sd15" else "context_embedder"
    adapter = tiny.random_adapter(pipe, "a", match=lambda s: part in s)
    site = next(iter(adapter.deltas))
    module = pipe.components[site.split(".")[0]].get_submodule(site.partition(".")[2])
    policy = Regions(weights={"a": 1.0}, regions={"a": Area(box=(0, 0, 0.5, 1), words="dog")}, mode="cheap")
    outputs = []
    handle = module.register_forward_hook(lambda m, i, o: outputs.append(o.clone()))
    latents(pipe, family, num_inference_steps=1)
    base = torch.cat(outputs)
    outputs.clear()
    with composed(pipe, [adapter], policy, "torch"):
        handle.remove()
        handle = module.register_forward_hook(lambda m, i, o: outputs.append(o.clone()))
        latents(pipe, family, num_inference_steps=1)
    handle.remove()
    changed = (torch.cat(outputs) - base).abs().amax(-1) > 0
    layout = LAYOUTS[family]
    wanted = token_share(pipe, layout, "a red dog", "dog")
    assert changed[-1].nonzero().flatten().tolist() == wanted.nonzero().flatten().tolist()
    if family == "sd15":
        assert not changed[0].any()


@pytest.mark.parametrize(
    ("family", "height", "width"),
    [
        ("sd15", 24, 40),
        ("sdxl", 40, 24),
        ("sd3", 40, 24),
        ("flux", 24, 40),
        ("qwen-image", 24, 40),
        ("z-image", 40, 24),
    ],
)
def test_regions_follow_pictures_that_are_not_square(family, height, width):
    """Exactly: left of the region one prediction is the base's. Cheaply: what a pass changes is most in the region."""
    pipe = tiny.PIPELINES[family](0)
    adapters = [tiny.random_adapter(pipe, "a")]
    base = columns(pipe, family, height, width)
    for mode in ("exact", "cheap"):
        with composed(pipe, adapters, Regions(weights={"a": 1.0}, regions={"a": RIGHT}, mode=mode), "torch"):
            changed = (columns(pipe, family, height, width) - base).abs().mean(dim=(0, 1, 2))
        left, right = changed[: len(changed) // 2], changed[-(len(changed) // 2) :]
        assert right.mean() > 1e-3
        assert left.mean() < (1e-6 if mode == "exact" else right.mean()), mode


def columns(pipe, family: str, height: int, width: int) -> torch.Tensor:
    """The latent after one step, (1, C, rows, columns)."""
    got = latents(pipe, family, height=height, width=width, num_inference_steps=1)
    if got.dim() == 3:
        return got.reshape(1, height // 4, width // 4, -1).permute(0, 3, 1, 2)
    return got.squeeze(2) if got.dim() == 5 else got


@dataclass(frozen=True, kw_only=True)
class Reads(Policy):
    """Merge, in other words."""

    weights: dict[str, float]
    prompt: str | None

    def plan(self, step: Step, picture: int) -> tuple[Branch, ...]:
        return (Branch(key="only", mix=Mix(weights=self.weights), prompt=self.prompt),)


@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "text encoders too"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_is_drawn_from_the_words_it_reads(family, text):
    """As if the prompt had been these words, and the negative prompt what it was; chats keep their prompt."""
    pipe = tiny.PIPELINES[family](0)
    match = None if text else lambda s: s.startswith(tiny.denoiser_name(pipe))
    adapters = [tiny.random_adapter(pipe, "a", match=match) if match else tiny.random_adapter(pipe, "a")]
    negative = {"negative_prompt": "blurred"} if family not in ("flux", "kontext") else {}
    with composed(pipe, adapters, Merge(weights={"a": 1.0}), "torch"):
        first, other = (
            latents(pipe, family, prompt=words, **negative) for words in ("a cat", "two red dogs")
        )
    with composed(pipe, adapters, Reads(weights={"a": 1.0}, prompt="two red dogs"), "torch"):
        drawn = latents(pipe, family, prompt="a cat", **negative)
    assert not torch.allclose(first, other, atol=1e-4)
    chat = family in ("qwen-image", "z-image")
    assert torch.allclose(drawn, first if chat else other, atol=1e-5)


def test_pictures_of_a_batch_read_their_own_words():
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, "a")]
    with composed(pipe, adapters, Merge(weights={"a": 1.0}), "torch"):
        wanted = latents(pipe, "flux", prompt=["two red dogs", "a bird"])
    policies = [Reads(weights={"a": 1.0}, prompt=prompt) for prompt in ("two red dogs", None)]
    with composed(pipe, adapters, policies, "torch", pictures=2):
        assert torch.allclose(latents(pipe, "flux", prompt=["a cat", "a bird"]), wanted, atol=1e-5)


@dataclass(frozen=True, kw_only=True)
class Half(Policy):
    """Two halves of one adapter each, the first in other words."""

    prompt: str | None

    def plan(self, step: Step, picture: int) -> tuple[Branch, ...]:
        return tuple(
            Branch(key=name, mix=Mix(weights={name: 1.0}), share=0.5, prompt=prompt)
            for name, prompt in (("a", self.prompt), ("b", None))
        )


def test_words_of_a_branch_end_the_sharing_of_base_work_also_when_they_come_later():
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, name, seed=n) for n, name in enumerate("ab")]
    with composed(pipe, adapters, Half(prompt="two red dogs"), "torch"):
        wanted = latents(pipe, "flux", prompt="a cat")
    with Composition(pipe, adapters, Half(prompt=None), "torch", shared="exact") as composition:
        latents(pipe, "flux", prompt="a cat")
        composition.change(policy=Half(prompt="two red dogs"))
        assert torch.allclose(latents(pipe, "flux", prompt="a cat"), wanted, atol=1e-5)
        assert composition.shared is None
        composition.change(policy=Half(prompt=None))
        assert composition.shared is not None


def test_chats_keep_sharing_base_work_as_their_words_stay():
    pipe = tiny.PIPELINES["qwen-image"](0)
    adapters = [tiny.random_adapter(pipe, name, seed=n) for n, name in enumerate("ab")]
    with Composition(pipe, adapters, Half(prompt="two red dogs"), "torch", shared="exact") as composition:
        assert composition.shared is not None


def test_each_picture_of_one_composition_has_its_own_words():
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, "a")]
    area = Area(box=(0, 0, 0.5, 1), words="dog")
    policy = Regions(weights={"a": 1.0}, regions={"a": area}, mode="cheap")
    with Composition(pipe, adapters, policy, "torch") as composition:
        latents(pipe, "flux", prompt="a dog")
        second = latents(pipe, "flux", prompt="two very big red dog")
        assert len(composition._texts._calls) == 1  # those of earlier pictures are let go
    with composed(pipe, adapters, policy, "torch"):
        assert torch.equal(latents(pipe, "flux", prompt="two very big red dog"), second)


def test_a_picture_after_one_that_stopped_early_reads_its_branchs_words():
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, "a")]
    policy = Regions(weights={"a": 1.0}, regions={"a": LEFT}, layout=0.5, prompts=[{"a": "two red dogs"}])

    def stop(*args):
        raise KeyboardInterrupt

    with composed(pipe, adapters, policy, "torch"):
        wanted = latents(pipe, "flux", prompt="a cat")
    with composed(pipe, adapters, policy, "torch"):
        with pytest.raises(KeyboardInterrupt):
            latents(pipe, "flux", prompt="a bird", callback_on_step_end=stop)
        assert torch.equal(latents(pipe, "flux", prompt="a cat"), wanted)
