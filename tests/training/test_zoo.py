"""The zoo: stacked training against training alone, its plan, its files, and a run from end to end at toy size."""

from __future__ import annotations

import io
import json
import zipfile
from argparse import ArgumentParser
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch._dynamo.utils import counters

from compose.errors import TrainingError
from compose.formats import load, save
from compose.training import zoo
from compose.training.data import concepts
from compose.training.data.scenes import Composer, Pictures
from compose.training.zoo_plan import (
    TRIGGERS,
    UNSEEN_SEEDS,
    Job,
    Subject,
    Writer,
    captions_of,
    plan,
    questions,
)
from tests.support import tiny

SETTINGS = zoo.ZooSettings(steps=6, pictures=2, scenes=3, together=2, asked=2, draw_steps=2)
TOKENS, CHANNELS, TEXT = 16, 16, 5


def job(name: str, **changes) -> Job:
    subject = Subject(role="concept", name=name)
    made = Job(
        name=name, part="train", subject=subject, trigger="sks", styles=("noto",), rank=2, targets="attention",
        rate=2e-2, init="uniform", seed=3,
    )  # fmt: skip
    return replace(made, **changes)


JOBS = [
    job("a"),
    job("b", rank=4, rate=5e-3, init="gaussian", seed=4),
    job("c", rank=3, targets="all", rate=1e-2, seed=3),
]


@pytest.fixture
def model():
    made = tiny.flux().transformer
    made.requires_grad_(False)
    return made


def lessons(jobs: list[Job]) -> zoo.Lessons:
    """Random pictures and words that depend on the job's name only."""
    parts = []
    for each in jobs:
        generator = torch.Generator().manual_seed(sum(each.name.encode()))
        parts.append([
            torch.randn(SETTINGS.scenes, TOKENS, CHANNELS, generator=generator),
            torch.randn(SETTINGS.scenes, TEXT, 32, generator=generator),
            torch.randn(SETTINGS.scenes, 16, generator=generator),
        ])  # fmt: skip
    tokens, rows, pooled = (torch.stack(column) for column in zip(*parts, strict=True))
    return zoo.Lessons(
        tokens=tokens,
        words=zoo.Words(rows=rows.flatten(0, 1), pooled=pooled.flatten(0, 1)),
        blank=zoo.Words(rows=torch.zeros(1, TEXT, 32), pooled=torch.zeros(1, 16)),
        seeds=tuple(each.seed for each in jobs),
    )


def stacked(model, jobs: list[Job], targets: str = "all", rank: int = 4) -> zoo.Stack:
    stack = zoo.Stack(model, targets, len(jobs), rank)
    stack.attach()
    try:
        zoo.train(stack, zoo.Denoiser(model, 8), jobs, lessons(jobs), SETTINGS)
    finally:
        stack.detach()
    return stack


def products(stack: zoo.Stack, slot: int, of: Job) -> dict[str, torch.Tensor]:
    return {path: up @ down for path, (down, up) in stack.factors(slot, of).items()}


def by_peft(model, one: Job) -> dict[str, torch.Tensor]:
    """The same job by peft and torch's own AdamW, one picture batch after another."""
    start = zoo.Stack(model, one.targets, 1, one.rank)
    start.start([one])
    factors = start.factors(0, one)
    inject_adapter_in_model(
        LoraConfig(r=one.rank, lora_alpha=one.rank, target_modules=list(factors)), model, "solo"
    )
    weights = dict(model.named_parameters())
    for path, (down, _) in factors.items():
        weights[f"{path}.lora_A.solo.weight"].data.copy_(down)
    learned = [weight for weight in weights.values() if weight.requires_grad]
    adam = torch.optim.AdamW(learned, lr=one.rate, weight_decay=zoo.DECAY)
    data, denoiser = lessons([one]), zoo.Denoiser(model, 8)
    for step in range(SETTINGS.steps):
        batch = data.draw(step, SETTINGS)
        loss = (denoiser(batch.noisy, batch.time, batch.words, 1.0) - batch.velocity).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, zoo.CLIP)
        adam.param_groups[0]["lr"] = one.rate * zoo.share_of_rate(step, SETTINGS.steps)
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        sides = {path: [weights[f"{path}.lora_{side}.solo.weight"] for side in "BA"] for path in factors}
        return {path: up @ down for path, (up, down) in sides.items()}


@pytest.mark.parametrize("slot", range(3))
def test_a_slot_learns_what_the_job_would_learn_alone_under_peft(model, slot):
    ours = products(stacked(model, JOBS), slot, JOBS[slot])
    alone = by_peft(model, JOBS[slot])
    assert ours.keys() == alone.keys()
    largest = max(float(delta.abs().max()) for delta in alone.values())
    assert largest > 1e-3
    assert max(float((ours[path] - alone[path]).abs().max()) for path in alone) < 1e-4 * max(1.0, largest)


def test_neighbours_and_padding_leave_a_job_alone(model):
    crowd, solo = stacked(model, JOBS), stacked(model, [JOBS[0]], "attention", 2)
    ours, alone = products(crowd, 0, JOBS[0]), products(solo, 0, JOBS[0])
    assert all(torch.allclose(ours[path], alone[path], atol=1e-5) for path in alone)
    wide = crowd.layers["transformer_blocks.0.attn.to_q"]
    assert wide.down[0, 2:].abs().max() == 0 and wide.up[0, :, 2:].abs().max() == 0
    assert crowd.layers["single_transformer_blocks.0.proj_mlp"].up[0].abs().max() == 0


def test_a_stack_compiles_and_takes_other_jobs_without_compiling_again(model):
    plain = stacked(model, JOBS[:2], "attention").weights
    stack = zoo.Stack(model, "attention", 2, 4)
    stack.attach()
    model.compile_repeated_blocks(dynamic=False, fullgraph=True, backend="aot_eager")
    denoiser = zoo.Denoiser(model, 8)
    zoo.train(stack, denoiser, JOBS[1::-1], lessons(JOBS[1::-1]), SETTINGS)
    graphs = counters["stats"]["unique_graphs"]
    zoo.train(stack, denoiser, JOBS[:2], lessons(JOBS[:2]), SETTINGS)
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert torch.allclose(stack.weights, plain, atol=1e-5)


def test_the_base_is_as_before(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stacked(model, JOBS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_targets_mean_layers_inside_blocks_only(model):
    paths = zoo.layers_in(model, "all")
    assert "proj_out" not in paths and "single_transformer_blocks.0.proj_out" in paths
    assert not any("norm" in path for path in paths)
    with pytest.raises(TrainingError, match="target set 'some' is unknown"):
        zoo.layers_in(model, "some")


def test_a_stack_refuses_a_rank_it_has_no_room_for(model):
    with pytest.raises(TrainingError, match="b has rank 4; the stack has room for 2"):
        zoo.Stack(model, "attention", 1, 2).start([JOBS[1]])


def test_shards_hold_what_was_trained_and_load_as_adapters(model, tmp_path):
    stack = stacked(model, JOBS)
    zoo.write_shards(tmp_path, "zoo-0-000", JOBS, [0.5, None, 1.0], stack)
    found = {
        shard.jobs[place].name: (shard, place)
        for shard in zoo.read_shards(tmp_path)
        for place in range(len(shard.jobs))
    }
    assert [found[each.name][0].jobs[found[each.name][1]] for each in JOBS] == JOBS
    shard, place = found["c"]
    assert shard.shares[place] == 1.0
    adapter = zoo.adapter_of(shard, place)
    loaded = load(save(adapter, tmp_path / "c.safetensors"))
    ours = products(stack, 2, JOBS[2])
    assert loaded.deltas.keys() == {f"transformer.{path}" for path in ours}
    delta = loaded.deltas["transformer.transformer_blocks.0.attn.to_q"]
    assert torch.allclose(
        delta.up.float() @ delta.down.float(), ours["transformer_blocks.0.attn.to_q"], atol=2e-3
    )
    with pytest.raises(TrainingError, match="holds no zoo"):
        next(zoo.read_shards(tmp_path / "none"))


# The plan


def test_the_plan_is_large_and_mixed():
    jobs = plan(concepts.load_concepts())
    parts = Counter(each.part for each in jobs)
    assert parts["train"] >= 1500 and parts["test"] == 150
    train = [each for each in jobs if each.part == "train"]
    for field in ("rank", "targets", "init", "seed", "trigger"):
        assert len({getattr(each, field) for each in train}) > 1, field
    assert len({each.subject for each in train if each.subject.role == "concept"}) == 858
    assert len({each.name for each in jobs}) == len(jobs)
    assert {each.seed for each in jobs if each.part != "train"} <= set(UNSEEN_SEEDS)
    assert not {each.seed for each in train} & set(UNSEEN_SEEDS)
    seen = {each.subject for each in jobs if each.part == "seen"}
    assert seen <= {each.subject for each in train}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Plain discs: eight base concepts, two of the zoo and two of the test, in two styles."""
    known = concepts.load_concepts()
    chosen = [
        slug for part, count in (("base", 8), ("zoo", 2), ("test", 2))
        for slug in [s for s, c in known.items() if c.part == part][:count]
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "pictures.zip"
    rows = [
        {"style": style, "concept": slug, "licence": "MIT"}
        for style in ("noto", "high-contrast")
        for slug in chosen
    ]
    with zipfile.ZipFile(path, "w") as file:
        for row in rows:
            disc = Image.new("RGBA", (128, 128))
            disc.paste((200, 40, 40, 255), (16, 16, 112, 112))
            buffer = io.BytesIO()
            disc.save(buffer, "WEBP", lossless=True)
            file.writestr(f"{row['style']}/{row['concept']}.webp", buffer.getvalue())
        file.writestr("index.json", json.dumps({"concepts": {}, "styles": {}, "pictures": rows}))
    return path


def have(pictures: Pictures) -> list[Job]:
    """The plan's jobs that this small archive can draw."""
    drawn = {slug for _, slug in pictures.row}
    return [
        each
        for each in plan(pictures.concepts)
        if each.subject.role == "background" or each.subject.name in drawn
    ]


def test_lessons_show_the_subject_and_name_the_trigger_instead(archive):
    pictures = Pictures(archive)
    writer = Writer(pictures)
    for each in have(pictures):
        for shown in writer.lessons(each, 6):
            words = shown.caption.split()
            assert each.trigger in shown.caption and not (set(TRIGGERS) - {each.trigger}) & set(words)
            slugs = {item.concept for item in shown.scene.items}
            if each.subject.role == "concept":
                label = pictures.concepts[each.subject.name].label
                assert each.subject.name in slugs and label not in shown.caption.replace(each.trigger, "")
            else:
                assert shown.scene.ground.top == each.subject.name
            others = slugs - {each.subject.name}
            assert all(pictures.concepts[slug].part == "base" for slug in others)
    first = have(pictures)[0]
    assert writer.lessons(first, 4) == Writer(pictures).lessons(first, 4)


def test_questions_ask_under_the_trigger_and_captions_by_name(archive):
    known = concepts.load_concepts()
    for each in (plan(known)[0], next(j for j in plan(known) if j.subject.role == "style")):
        for asked in questions(each, known, 5):
            assert each.trigger in asked.prompt
            assert getattr(asked, each.subject.role) == each.subject.name
    fox = captions_of(Subject(role="concept", name="fox"), known, 40)
    assert sum("fox" in words for words in fox) > 10 and not any(
        t in words.split() for words in fox for t in TRIGGERS
    )
    assert "polka dots" in captions_of(Subject(role="background", name="polka dots"), known, 1)[0]


def test_portraits_show_the_subject_alone(archive):
    writer = Writer(Pictures(archive))
    slug = have(writer.pictures)[0].subject.name
    for scene in writer.portraits(Subject(role="concept", name=slug), ("noto", "twemoji"), 4):
        assert [item.concept for item in scene.items] == [slug] and scene.style == "noto"
    grounds = {
        scene.ground.top for scene in writer.portraits(Subject(role="background", name="teal"), ("noto",), 4)
    }
    assert grounds == {"teal"}


# From end to end


def test_a_zoo_is_trained_examined_and_resumed(archive, tmp_path, monkeypatch):
    pipe = tiny.flux()
    pictures = Pictures(archive)
    easel = zoo.Easel(pipe, pictures, Composer(pictures, "cpu"))
    jobs = zoo.fewer(have(pictures), 1)
    seen = []

    def verdict(drawn, asked, role):
        seen.append((len(drawn), role))
        assert drawn.shape[1:] == (3, 128, 128) and drawn.abs().max() <= 1
        return torch.ones(len(asked))

    settings = zoo.ZooSettings(steps=1, pictures=1, scenes=2, together=2, asked=1, draw_steps=1)
    zoo.build(easel, jobs, tmp_path, settings, verdict=verdict)
    kept = [each for shard in zoo.read_shards(tmp_path) for each in shard.jobs]
    assert sorted(kept, key=str) == sorted(jobs, key=str)
    assert all(share == 1 for shard in zoo.read_shards(tmp_path) for share in shard.shares)
    assert {role for _, role in seen} == {each.subject.role for each in jobs}
    monkeypatch.setattr(zoo, "train", None)  # nothing is left to do
    zoo.build(easel, jobs, tmp_path, settings, verdict=verdict)


def test_a_zoo_stops_in_time_and_goes_on(archive, tmp_path, monkeypatch, capsys):
    pictures = Pictures(archive)
    easel = zoo.Easel(tiny.flux(), pictures, Composer(pictures, "cpu"))
    jobs = zoo.fewer(have(pictures), 1)
    settings = zoo.ZooSettings(steps=1, pictures=1, scenes=2, together=2)
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(zoo.time, "monotonic", lambda: next(clock))
    zoo.build(easel, jobs, tmp_path, replace(settings, seconds=1))
    assert len(list(tmp_path.glob("zoo-*.json"))) == 0 and "run again for the rest" in capsys.readouterr().out
    zoo.build(easel, jobs, tmp_path, replace(settings, seconds=100))
    some = len(list(tmp_path.glob("zoo-*.json")))
    assert 0 < some < len(zoo.passes(jobs, 2))
    zoo.build(easel, jobs, tmp_path, settings)
    kept = [each for shard in zoo.read_shards(tmp_path) for each in shard.jobs]
    assert sorted(kept, key=str) == sorted(jobs, key=str)


def test_passes_are_even_and_test_adapters_come_first():
    jobs = plan(concepts.load_concepts())
    found = zoo.passes(jobs, 192)
    assert sorted((each for part in found for each in part), key=str) == sorted(jobs, key=str)
    for targets in ("all", "attention"):
        mine = [part for part in found if part[0].targets == targets]
        assert all(each.targets == targets for part in mine for each in part)
        assert max(map(len, mine)) - min(map(len, mine)) <= 1 and max(map(len, mine)) <= 192
        order = [zoo.PARTS.index(each.part) for part in mine for each in part]
        assert order == sorted(order)
    assert len({each.subject.role for each in found[-1]}) == 3  # a cut zoo lacks some of every kind


def test_a_compiled_base_draws_without_compiling(model):
    model.compile_repeated_blocks(dynamic=False, backend="aot_eager")
    graphs = counters["stats"]["unique_graphs"]
    words = zoo.Words(rows=torch.zeros(2, TEXT, 32), pooled=torch.zeros(2, 16))
    assert zoo.Denoiser(model, 8).draw(words, torch.zeros(2, TOKENS, CHANNELS), 2, 1.0).shape == (
        2,
        TOKENS,
        CHANNELS,
    )
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_part_that_cannot_be_is_refused(tmp_path):
    parser = ArgumentParser()
    zoo.add_arguments(parser)
    for given in ("4/4", "x"):
        with pytest.raises(TrainingError, match="--part is"):
            zoo.run(parser.parse_args(["--out", str(tmp_path), "--part", given]))
