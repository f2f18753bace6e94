"""Training gates at toy size: what learns, what stays, that gates side by side do not meddle, files and stops."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections import Counter

import pytest
import tiny
import torch
from safetensors.torch import save_file

import compose.digest as digest
from compose.app import train_gate as command
from compose.app.cli import main
from compose.engine import composed
from compose.errors import BackendError, TrainingError
from compose.formats import save as save_adapter
from compose.gates import FullGate, load
from compose.plan import Mix
from compose.policies import Gated, Merge
from compose.training import gate as trainer
from compose.training import gate_lessons, zoo_plan
from compose.training.bank import BankBackend, reason_against
from compose.training.data.concepts import load_concepts
from compose.training.data.pictures import STYLE
from compose.training.data.scenes import Pictures
from compose.training.examples import Examples, encode_text
from compose.training.gate import Course, GateSettings, draw, recipe_settings, train, write
from compose.training.gate_lessons import (
    MOST,
    Member,
    Shown,
    choose,
    lessons_of,
    prompt_for,
    read_members,
    self_drawn,
)
from compose.training.gate_scenes import CASTS, Stage, casts, known

CPU = torch.device("cpu")
TRIGGERS = ("red", "dog", "cat", "red")
QUICK = {"pairs": 3, "steps": 4, "every": 100}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "digests.json")


@pytest.fixture(scope="module")
def pipe():
    return tiny.flux(0)


@pytest.fixture(scope="module")
def members(pipe):
    """Four strong adapters of three triggers, the second on attention only."""
    adapters = [
        tiny.random_adapter(
            pipe,
            f"ad{n}",
            rank=1 + n,
            seed=n,
            strength=2.0,
            match=lambda s, n=n: "blocks" in s and (n != 1 or "attn" in s),
        )
        for n in range(len(TRIGGERS))
    ]
    return [Member(adapter=a, role="concept", trigger=t) for a, t in zip(adapters, TRIGGERS, strict=True)]


@pytest.fixture(scope="module")
def lessons(pipe, members):
    """Three random pictures of each alone, five of several together."""
    who = [(n,) for n in range(4) for _ in range(3)] + [(0, 1), (1, 2), (0, 1, 2), (2, 3), (1, 3)]
    captions = ("", "a red dog", "a dog", "a cat", "a dog and a cat")
    g = torch.Generator().manual_seed(0)
    examples = Examples(
        latents=torch.randn(len(who), 4, 8, 8, generator=g),
        captions=captions,
        rows=torch.arange(len(who)) % 4 + 1,
        text=encode_text(pipe, captions, CPU),
    )
    return lessons_of(pipe, members, Shown(examples=examples, members=who), CPU)


def weights_of(pipe):
    return {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}


def learn(pipe, members, lessons, keep=None, **changes):
    settings = GateSettings(**(QUICK | changes))
    return train(pipe, members, lessons, settings, CPU, keep)


def looked_at(pipe, members, lessons, gates):
    """(24,) errors under the same noise for everybody: 8 pairs under their own prompt, under the other's, 8 scenes."""
    form = "full" if isinstance(gates, trainer.FullGates) else "light"
    settings = GateSettings(pairs=8, scenes=8, drop=0.0, form=form)
    with Course(pipe, members, lessons, settings, CPU) as course, torch.no_grad():
        course.gates = gates
        course.generator.manual_seed(9)
        return course.errors(draw(lessons, settings, torch.Generator().manual_seed(9)))[0]


# what learns, what stays


@pytest.mark.parametrize("form", ["full", "light"])
def test_the_loss_falls_and_the_base_is_as_it_was(pipe, members, lessons, form):
    """Strong random adapters spoil every picture; whoever learns to let less of them through predicts better."""
    before = weights_of(pipe)
    next(pipe.transformer.parameters()).requires_grad_(True)
    wanted = [parameter.requires_grad for parameter in pipe.transformer.parameters()]
    changes = {"form": form, "push": 0.0, "scenes": 3, "average": 0.9}
    fresh, _ = learn(pipe, members, lessons, **changes, steps=1, rate=1e-9)
    taught, _ = learn(pipe, members, lessons, **changes, steps=40, rate=0.1)
    start, end = (looked_at(pipe, members, lessons, gates) for gates in (fresh, taught))
    assert end[:8].mean() < start[:8].mean()  # own
    assert end[16:].mean() < start[16:].mean() - 0.1  # together
    after = weights_of(pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in pipe.transformer.parameters()] == wanted


@pytest.mark.parametrize("form", ["full", "light"])
def test_only_the_gate_has_gradients(pipe, members, lessons, form):
    settings = GateSettings(**(QUICK | {"form": form}))
    with Course(pipe, members, lessons, settings, CPU) as course:
        drawn = draw(lessons, settings, torch.Generator().manual_seed(0))
        course.errors(drawn).sum().backward()
        gradients = [p.grad for p in course.gates.parameters() if p.grad is not None]
        assert sum(float(g.abs().sum()) for g in gradients) > 0
        assert all(p.grad is None for p in pipe.transformer.parameters())
        assert all(p.grad is None for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())


def test_a_fresh_gate_is_a_merge_at_half_of_its_top(pipe, members, lessons):
    """Within the noise that tells seeds apart."""
    gates, _ = learn(pipe, members, lessons, steps=1, rate=1e-9)
    vectors = gates.vectors(0)
    for table in vectors.values():
        table[4:8] = 0
    weights = {m.adapter.name: 1.0 for m in members[:2]}
    adapters = [m.adapter for m in members[:2]]
    with composed(pipe, adapters, Gated(weights=weights), "torch", gates={"full": FullGate(vectors)}):
        one = tiny.image(pipe, "flux")
    with composed(pipe, adapters, Merge(weights=dict.fromkeys(weights, 0.8)), "torch"):
        other = tiny.image(pipe, "flux")
    assert abs(one - other).max() < 1e-4


def test_taught_gates_differ_between_adapters(pipe, members, lessons, tmp_path):
    """A light gate gives each adapter factors of its own; a full one opens differently to each."""
    gates, _ = learn(pipe, members, lessons, form="light", steps=30, rate=5e-3)
    net = gates.nets[0]
    index = torch.tensor([[0, 1, 2]])
    said = lessons.said[2:3]
    factors = gates.weights(torch.tensor([0.5]), said, lessons.triggers[index], index)[0]
    site = net.shape.sites.index("transformer.transformer_blocks.0.attn.to_q")
    assert len({round(value, 5) for value in factors[:, site].tolist()}) == 3
    full, _ = learn(pipe, members, lessons, steps=30, rate=5e-2)
    vectors = full.vectors(0)["transformer.transformer_blocks.0.attn.to_q"]
    g = torch.Generator().manual_seed(0)
    y, a, b = (torch.randn(1, 6, vectors.shape[1], generator=g) for _ in range(3))
    gate = load(write(tmp_path / "g.safetensors", [full], 0, pipe=pipe, base_sha256="", settings=GateSettings(), adapters=4)).full  # fmt: skip
    name = "transformer.transformer_blocks.0.attn.to_q"
    opened = [(gate(name, None, y, d[None]) - y) / d for d in (a, b)]
    assert (opened[0] - opened[1]).abs().mean() > 0.01


def test_gates_side_by_side_do_not_meddle(pipe, members, lessons):
    """Gate 0 of two gets the gradient that it would get alone on its own rows."""
    settings = GateSettings(**(QUICK | {"gates": 2, "scenes": 2}))
    drawn = draw(lessons, settings, torch.Generator().manual_seed(5))
    with Course(pipe, members, lessons, settings, CPU) as course:
        course.generator.manual_seed(1)
        errors = course.errors(drawn)
        errors[1].sum().backward()
        gradient = course.gates.table.grad
        assert float(gradient[:, 0].abs().sum()) == 0
        assert float(gradient[:, 1].abs().sum()) > 0


def test_seeds_start_apart_and_a_run_repeats_itself(pipe, members, lessons):
    one, _ = learn(pipe, members, lessons, gates=2)
    two, _ = learn(pipe, members, lessons, gates=2)
    assert torch.equal(one.table, two.table)
    assert not torch.allclose(one.table[:, 0], one.table[:, 1])


# both published losses


def test_the_second_loss_pushes_up_to_its_margin(pipe, members, lessons):
    """At a margin below the loss it does nothing; with a weight it raises the error under the other's prompt."""
    far, _ = learn(pipe, members, lessons, margin=0.0, steps=3, rate=5e-2)
    off, _ = learn(pipe, members, lessons, push=0.0, margin=9.0, steps=3, rate=5e-2)
    on, _ = learn(pipe, members, lessons, push=4.0, margin=9.0, steps=15, rate=5e-2)
    assert torch.allclose(far.table, off.table)
    calm, _ = learn(pipe, members, lessons, push=0.0, steps=15, rate=5e-2)
    pushed, left = (looked_at(pipe, members, lessons, gates)[8:16] for gates in (on, calm))
    assert pushed.mean() > left.mean() + 0.05


def test_rows_are_what_the_losses_need(lessons):
    settings = GateSettings(gates=2, pairs=200, scenes=50, drop=0.3, third=0.5)
    drawn = draw(lessons, settings, torch.Generator().manual_seed(0))
    assert drawn.index.shape == (2 * 450, MOST)
    first, second, scenes = drawn.index.unflatten(0, (2, 450)).split([200, 200, 50], dim=1)
    picture = drawn.picture.unflatten(0, (2, 450))
    caption = drawn.caption.unflatten(0, (2, 450))
    assert torch.equal(first, second)
    assert torch.equal(picture[:, :200], picture[:, 200:400])
    for who, shown in zip(first.flatten(0, 1).tolist(), picture[:, :200].flatten().tolist(), strict=True):
        assert shown in lessons.alone[who[0]]
        here = [TRIGGERS[n] for n in who if n < 4]
        assert len(here) >= 2
        assert len(set(here)) == len(here)
    dropped = (caption[:, :200] == 0).float().mean()
    assert 0.2 < dropped < 0.4
    assert bool((caption[:, 200:] > 0).all())
    thirds = (first[..., 2] < 4).float().mean()
    assert 0.35 < thirds < 0.65
    for who, shown in zip(scenes.flatten(0, 1).tolist(), picture[:, 400:].flatten().tolist(), strict=True):
        assert lessons.members[lessons.together.tolist().index(shown)].tolist() == who


def test_where_only_two_can_be_told_apart_nobody_is_third(lessons):
    words = torch.tensor([0, 1, 1, 0])
    two = dataclasses.replace(lessons, clash=words[:, None] == words)
    drawn = draw(two, GateSettings(pairs=50, third=1.0), torch.Generator().manual_seed(0))
    assert bool((drawn.index[:, 2] == 4).all())
    assert bool((words[drawn.index[:, 0]] != words[drawn.index[:, 1]]).all())


# the bank


def test_rows_may_wear_what_they_like(pipe, members):
    adapters = [m.adapter for m in members]
    policies = [Merge(weights={"ad0": 0.7, "ad3": -0.4}), Merge(weights={"ad1": 1.0}), Merge(weights={})]
    drawn = []
    for backend in ("torch", BankBackend):
        with composed(pipe, adapters, policies, backend):
            drawn.append(tiny.image(pipe, "flux", ["a dog", "a cat", "a red dog"]))
    assert abs(drawn[0] - drawn[1]).max() < 1e-5
    assert abs(drawn[0][0] - drawn[0][2]).max() > 1e-3


def test_weights_by_site_reach_their_sites(pipe, members):
    adapters = [m.adapter for m in members[:2]]
    policies = [
        Merge(weights={"ad0": {"transformer_blocks.0": 0.5}, "ad1": 1.0}),
        Merge(weights={"ad0": 0.3}),
    ]
    drawn = []
    for backend in ("torch", BankBackend):
        with composed(pipe, adapters, policies, backend):
            drawn.append(tiny.image(pipe, "flux", ["a dog", "a cat"]))
    assert abs(drawn[0] - drawn[1]).max() < 1e-5


def test_what_the_bank_cannot_carry_is_told():
    unet = tiny.sd15(0)
    adapter = tiny.random_adapter(unet, "a", convolutions=True)
    assert "it changes a convolution" in reason_against(adapter)
    with pytest.raises(BackendError, match="the bank cannot carry adapter 'a': it changes a convolution"), composed(unet, [adapter], Merge(weights={"a": 1.0}), BankBackend):  # fmt: skip
        pass
    plain = tiny.random_adapter(unet, "b")
    with pytest.raises(BackendError, match="cheap regions"):
        bank = BankBackend()
        bank.job = argparse.Namespace(adapters=[plain], gates={})
        bank.check(Mix(weights={"b": 1.0}, mask="regions"))


# lessons


def test_other_families_learn_too():
    unet = tiny.sd15(0)
    adapters = [tiny.random_adapter(unet, f"s{n}", seed=n, match=lambda s: "attn" in s) for n in range(2)]
    two = [Member(adapter=a, role="", trigger=t) for a, t in zip(adapters, ("dog", "cat"), strict=True)]
    captions = ("", "a dog", "a cat")
    examples = Examples(
        latents=torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        captions=captions,
        rows=torch.tensor([1, 1, 2, 2]),
        text=encode_text(unet, captions, CPU),
    )
    shown = Shown(examples=examples, members=[(0,), (0,), (1,), (1,)])
    taught = lessons_of(unet, two, shown, CPU)
    for form in ("full", "light"):
        gates, losses = learn(unet, two, taught, form=form)
        assert bool(torch.isfinite(losses[:, :2]).all())
    assert not gates.nets[0].shape.flow


def test_lessons_that_cannot_be_taken_are_refused(pipe, members, lessons):
    with pytest.raises(TrainingError, match="leave scenes at 0"):
        learn(pipe, members, _without(lessons), scenes=2)
    same = [Member(adapter=m.adapter, role="", trigger="dog") for m in members]
    shown = Shown(examples=_examples(pipe), members=[(n,) for n in range(4)])
    with pytest.raises(TrainingError, match="all adapters have one trigger"):
        learn(pipe, same, lessons_of(pipe, same, shown, CPU))
    with pytest.raises(TrainingError, match="adapter 'ad3' has no picture of its own"):
        lessons_of(pipe, members, Shown(examples=_examples(pipe), members=[(0,), (1,), (2,), (0,)]), CPU)


def _without(lessons):
    return dataclasses.replace(lessons, together=lessons.together[:0], members=lessons.members[:0])


def _examples(pipe):
    captions = ("", "a dog")
    text = encode_text(pipe, captions, CPU)
    return Examples(latents=torch.zeros(4, 4, 8, 8), captions=captions, rows=torch.ones(4, dtype=torch.long), text=text)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"form": "heavy"}, "form of a gate 'heavy' is unknown"),
        ({"pairs": 0}, "pairs is 0; give a whole number"),
        ({"rate": -1.0}, "rate is -1.0; give a number above 0"),
    ],
)
def test_bad_settings_are_refused(changes, said):
    with pytest.raises(TrainingError, match=said):
        GateSettings(**changes)


def test_prompts_call_an_adapter_as_its_role_does():
    rng = random.Random(0)

    def said(role, trigger):
        return prompt_for(Member(adapter=None, role=role, trigger=trigger), rng)

    assert said("style", "ink style").endswith("ink style")
    assert said("background", "sunburst").endswith("on a sunburst background")
    assert said("background", "sunburst background").endswith("on a sunburst background")
    assert "fox" in said("concept", "fox")


def test_roles_take_turns_in_a_choice():
    crowd = [Member(adapter=None, role=role, trigger=str(n)) for role in ("a", "b") for n in range(9)]
    found = choose(crowd + crowd[:1] * 20, lambda m: m.role, 6)
    assert Counter(m.role for m in found) == {"a": 3, "b": 3}
    assert choose(crowd, lambda m: m.role, 6) == choose(crowd, lambda m: m.role, 6)


# scenes


class Drawn(Pictures):
    """Every concept in every style, without artwork."""

    def __init__(self):
        self.concepts = load_concepts()
        self.row = {(s, c): n for n, (s, c) in enumerate((s, c) for s in STYLE for c in self.concepts)}


CREW = [
    Member(adapter=None, role=role, trigger=trigger, subject=subject)
    for role, trigger, subject in (
        ("concept", "sks", "dog-face"),
        ("concept", "ohwx", "owl"),
        ("concept", "qqq", "house"),
        ("style", "vqk", "high-contrast"),
        ("background", "zwx background", "brick-wall"),
    )
]


def test_a_scene_shows_and_names_its_whole_cast():
    stage = Stage(Drawn(), 0)
    for cast in ([CREW[0], CREW[3], CREW[4]], CREW[:3], [CREW[3]], [CREW[4], CREW[1]]):
        shown = stage.scene(cast)
        for member in cast:
            assert member.trigger.removesuffix(" background") in shown.caption
        concepts = [m.subject for m in cast if m.role == "concept"]
        assert {item.concept for item in shown.scene.items} >= set(concepts)
        assert (shown.scene.style == "high-contrast") == (CREW[3] in cast)
        assert (shown.scene.ground.pattern == "brick wall") == (CREW[4] in cast)
        assert "brick wall" not in shown.caption
        assert len(shown.scene.items) == max(1, len(concepts))


def test_casts_are_of_all_kinds_and_told_apart():
    found = casts(CREW, 10 * len(CASTS), 0)
    assert Counter(tuple(sorted(CREW[n].role for n in cast)) for cast in found) == {
        tuple(sorted(kind)): 10 for kind in CASTS
    }
    assert casts(CREW[:1], 5, 0) == []
    same = [Member(adapter=None, role="concept", trigger="sks", subject=s) for s in ("owl", "house")]
    assert casts(same, 5, 0) == []


def test_members_that_the_artwork_lacks_are_known():
    pictures = Drawn()
    assert all(known(member, pictures) for member in CREW)
    assert not known(Member(adapter=None, role="concept", trigger="x", subject="my-dog"), pictures)
    assert not known(Member(adapter=None, role="", trigger="x", subject="owl"), pictures)


# files and stops


@pytest.fixture
def folder(pipe, members, tmp_path):
    where = tmp_path / "adapters"
    where.mkdir()
    for member in members:
        header = {"compose.trigger": member.trigger, "compose.role": "concept"}
        save_adapter(member.adapter, where / f"{member.adapter.name}.safetensors", metadata=header)
    return where


def test_a_folder_is_read_by_what_its_files_say(folder, tmp_path):
    found = read_members(folder)
    assert [(m.adapter.name, m.trigger, m.role) for m in found] == [
        (f"ad{n}", trigger, "concept") for n, trigger in enumerate(TRIGGERS)
    ]
    with pytest.raises(TrainingError, match="is no folder"):
        read_members(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="holds 0 low-rank adapters"):
        read_members(tmp_path / "empty")


def test_a_zoos_shards_are_read_by_their_jobs(tmp_path):
    """What was judged bad, or is for testing only, stays out."""
    jobs = [
        zoo_plan.Job(
            name=f"style-noto-{n}",
            part=part,
            subject=zoo_plan.Subject(role="style", name="noto"),
            trigger=f"t{n}",
            styles=("noto",),
            rank=2,
            targets="attention",
            rate=1e-3,
            init="uniform",
            seed=0,
        )
        for n, part in enumerate(("train", "train", "test", "train"))
    ]
    shares = (1.0, 0.2, 1.0, None)
    rows = [dataclasses.asdict(job) | {"share": share} for job, share in zip(jobs, shares, strict=True)]
    path = "transformer_blocks.0.attn.to_q"
    tensors = {f"{path}.lora_A": torch.ones(4, 2, 8), f"{path}.lora_B": torch.ones(4, 6, 2)}
    save_file(tensors, tmp_path / "zoo-0-000.safetensors", {"jobs": json.dumps(rows)})
    found = read_members(tmp_path)
    assert [(m.trigger, m.role, m.subject) for m in found] == [
        ("t0", "style", "noto"),
        ("t3", "style", "noto"),
    ]
    assert found[0].adapter.deltas[f"transformer.{path}"].up.shape == (6, 2)


def test_subjects_of_the_test_adapters_are_known_with_their_twins(folder):
    assert trainer.subjects_in(folder) == {f"ad{n}" for n in range(4)}
    (folder / "fluent-3d.safetensors").touch()
    assert trainer.subjects_in(folder) >= {"fluent-3d", "fluent-gradient"}
    assert trainer.subjects_in(folder / "nowhere") == set()


def test_a_stopped_run_goes_on_and_ends_alike(pipe, members, lessons, tmp_path, monkeypatch):
    whole, _ = learn(pipe, members, lessons, steps=8)
    keep = tmp_path / "gate.checkpoint"
    step = Course.step

    def stopping(self, rate, seed):
        if seed % 1_000_003 == 5:
            raise KeyboardInterrupt
        return step(self, rate, seed)

    monkeypatch.setattr(Course, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn(pipe, members, lessons, keep, steps=8, keep_every=-1.0)
    monkeypatch.setattr(Course, "step", step)
    again, _ = learn(pipe, members, lessons, keep, steps=8)
    assert torch.allclose(again.table, whole.table, atol=1e-6)
    assert not keep.exists()


def test_a_checkpoint_of_another_run_is_refused(pipe, members, lessons, tmp_path, monkeypatch):
    keep = tmp_path / "gate.checkpoint"
    keep.write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match="is left from another run; delete it"):
        learn(pipe, members, lessons, keep)


def test_recipes_take_the_command_lines_budgets():
    args = argparse.Namespace(
        seconds=90.0, light_seconds=30.0, pairs=2, scenes=3, seeds=4, steps=7, eager=True
    )
    published, together, light = (recipe_settings(name, args, CPU) for name in trainer.RECIPES)
    assert (published.scenes, together.scenes, light.scenes) == (0, 3, 3)
    assert (published.margin, published.push) == (0.5, 1.0)
    assert (together.seconds, light.seconds, light.form) == (90.0, 30.0, "light")
    assert {each.gates for each in (published, together, light)} == {4}
    with pytest.raises(TrainingError, match="recipe 'best' is unknown"):
        recipe_settings("best", args, CPU)


def test_a_recipe_that_is_done_is_not_trained_again(tmp_path, capsys):
    args = argparse.Namespace(recipes="published,light", out=tmp_path, seeds=2, make=0)
    for path in [*trainer.files_of("published", args), *trainer.files_of("light", args)]:
        path.touch()
    trainer.build(args)  # nothing is loaded
    assert capsys.readouterr().out.count("already; delete its files") == 2
    trainer.files_of("light", args)[1].unlink()
    with pytest.raises(AttributeError, match="base"):
        trainer.build(args)


# the command


def test_the_command_draws_trains_and_writes_what_policy_gated_takes(
    pipe, folder, tmp_path, monkeypatch, capsys
):
    base = tiny.save(pipe, tmp_path / "base")
    monkeypatch.setattr(command, "_LEARNS", {})
    small = {**tiny.CALL["flux"], "output_type": "pil"}
    monkeypatch.setattr(gate_lessons, "arguments_of", lambda pipe: dict(small))
    monkeypatch.setattr(gate_lessons, "encode", _at_own_size(gate_lessons.encode))
    out = tmp_path / "gates" / "mine.safetensors"
    argv = ["train", "gate", "--adapters", str(folder), "--base", str(base), "--out", str(out)]
    assert main([*argv, "--pictures", "1", "--steps", "2", "--pairs", "2"]) == 0
    assert "ad0: 1 pictures drawn" in capsys.readouterr().out
    gates = load(out)
    assert (gates.full is not None, gates.light is not None) == (True, True)
    assert gates.family == "compose-mini"
    assert len(gates.base_sha256) == 64
    assert main(argv) == 2
    assert "exists; give another --out" in capsys.readouterr().err


def _at_own_size(encode):
    return lambda pipe, pictures, **more: encode(pipe, pictures, side=tiny.SIDE, **more)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--out", "gate.bin"], "does not end in .safetensors"),
        (["--pictures", "0"], "pictures is 0"),
        (["--rate", "0"], "rate is 0"),
        (["--adapters", "nowhere"], "is no folder"),
    ],
)
def test_the_command_refuses_in_one_line_before_it_loads(argv, said, pipe, folder, tmp_path, capsys):
    base = tiny.save(pipe, tmp_path / "base")
    given = {"--adapters": str(folder), "--base": str(base), "--out": str(tmp_path / "x.safetensors")}
    given |= dict(zip(argv[::2], argv[1::2], strict=True))
    assert main(["train", "gate", *(word for pair in given.items() for word in pair)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_pictures_beside_an_adapter_are_read(pipe, folder, members, monkeypatch):
    (folder / "ad1").mkdir()
    tiny.picture(1).save(folder / "ad1" / "one.png")
    monkeypatch.setattr(
        gate_lessons, "arguments_of", lambda pipe: {**tiny.CALL["flux"], "output_type": "pil"}
    )
    monkeypatch.setattr(gate_lessons, "encode", _at_own_size(gate_lessons.encode))
    shown = self_drawn(pipe, members[:2], folder, 2, CPU)
    assert shown.members == [(0,), (0,), (1,)]
    assert "a picture of dog" in shown.examples.captions
