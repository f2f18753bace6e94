"""Learning to restore: what a batch holds, that a run learns, is validated, ends early, resumes, and says what it did."""

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open

from compose import defects
from compose.bases import KINDS
from compose.errors import TrainingError
from compose.restoration import NONE, Restoration
from compose.training import lora, restore
from compose.training.defects import teach
from compose.training.degrade import parse, prompts_of
from compose.training.objectives import flow_point
from compose.training.pairs import degraded
from compose.training.restore import Course, Lessons, even_moments, settings_for, train, trigger_of

MINI = KINDS["compose-mini"]
QUICK = {"size": 32, "steps": 4, "batch": 4, "precision": "no"}


def pairs(names="noise:25,haze", count=4, validation=2):
    made = parse(names)
    blocks = [torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    pictures = [block.repeat_interleave(8, 1).repeat_interleave(8, 2) for block in blocks]
    return degraded(pictures, made, prompts_of(made), side=32, count=count, validation=validation, seed=0)


def settings(given, method="lora", **more):
    shape = {"rank": 2} if method == "lora" else {"percent": 2.0}
    return settings_for(MINI, given.prompts, QUICK | shape | more, method)


def run(folder, given=None, method="lora", course=None, **more):
    given = given or pairs()
    keys = {name: more.pop(name) for name in ("resume", "look", "trial", "pipe") if name in more}
    pipe = keys.pop("pipe", None) or tiny.kontext(0)
    return train(
        settings(given, method, **more), pipe, given, folder / "r.safetensors", course=course or Course(every=0, steps=1),
        progress=False, **keys,
    )  # fmt: skip


# Batches


def lessons(keep):
    """Three pairs of task 1 and one of task 2; every latent is its own number."""
    clean = torch.arange(4.0).view(4, 1, 1, 1)
    return Lessons(
        clean=clean, degraded=clean + 10, tasks=torch.tensor([1, 1, 1, 2]), captions=("", "one", "two"),
        text={"prompt_embeds": torch.arange(3.0).view(3, 1, 1)}, keep=keep,
    )  # fmt: skip


def test_a_batch_pairs_the_degraded_reference_with_the_sound_target_under_its_prompt():
    batch = lessons(0.0).draw(torch.Generator().manual_seed(0), 400)
    assert torch.equal(batch.reference, batch.latents + 10)
    says = {"one": {0.0, 1.0, 2.0}, "two": {3.0}}
    assert {float(x) for x, c in zip(batch.latents, batch.captions, strict=True) if c == "one"} == says["one"]
    assert all(float(x) in says[c] for x, c in zip(batch.latents, batch.captions, strict=True))
    assert 150 < batch.captions.count("two") < 250, "tasks come alike, however many pairs they have"
    assert [["", "one", "two"][int(e)] for e in batch.text["prompt_embeds"].flatten()] == batch.captions


def test_kept_examples_leave_the_picture_alone_unless_it_has_that_defect():
    batch = lessons(0.9999999).draw(torch.Generator().manual_seed(0), 600)
    assert torch.equal(batch.reference, batch.latents)
    spoilt = [(float(x) - 10, c) for x, c in zip(batch.latents, batch.captions, strict=True) if x >= 10]
    assert {c for x, c in spoilt if x < 3} == {"", "two"} and {c for x, c in spoilt if x == 3} == {"", "one"}
    sound = {c for x, c in zip(batch.latents, batch.captions, strict=True) if x < 10}
    assert sound == {"", "one", "two"}


def test_noise_levels_are_spread_evenly_over_a_batch():
    moments = even_moments(50, torch.Generator().manual_seed(0))
    _, time, _ = flow_point(torch.zeros(50, 1, 2, 2), torch.Generator(), moments)
    assert (time - (torch.arange(50) + 0.5) / 50).abs().max() < 0.0115 and time.max() > 0.98


# Runs


@pytest.mark.parametrize("method", restore.METHODS)
def test_a_run_learns_and_its_file_says_what(tmp_path, method):
    """On one pair the loss falls; the header names tasks, prompts, pairs, defects and how to draw."""
    pipe = tiny.kontext(0)
    before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    path = run(tmp_path, method=method, pipe=pipe, course=Course(every=2, steps=2), seed=5)
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())
    with safe_open(path, "pt") as file:
        header = file.metadata()
    told = Restoration.of(header, "r")
    assert told.tasks == pairs().prompts and told.pairs == {"noise": 4, "haze": 4}
    assert told.defects == ("noise:25", "haze:0.4-0.7") and (told.steps, told.side, told.seed) == (2, 32, 5)
    assert header["compose.trigger"] == "the image" and header["modelspec.architecture"].endswith(method)


def test_the_loss_falls(tmp_path):
    losses = []
    given = pairs("noise:25", count=2, validation=0)
    pipe, chosen = tiny.kontext(0), settings(pairs("noise:25"), steps=60, lr=3e-2, rank=8)
    made = restore.lessons_of(pipe, given.train, given.prompts, Course(keep=0.0), torch.device("cpu"), True)
    lora.fit(
        chosen, pipe, lambda g: made.draw(g, 4), tmp_path / "r.safetensors", lora.adapted, progress=False,
        watch=lambda done, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < 0.9 * losses[0]


def test_flips_show_every_pair_mirrored_too():
    given, pipe = pairs(count=2), tiny.kontext(0)
    plain, both = (
        restore.lessons_of(pipe, given.train, given.prompts, Course(flips=flips), torch.device("cpu"), False)
        for flips in (False, True)
    )
    assert (len(plain.clean), len(both.clean)) == (4, 8) and both.tasks.tolist() == [1] * 4 + [2] * 4
    assert torch.allclose(both.clean[0], plain.clean[0], atol=1e-5) and plain.text is None
    assert not torch.allclose(both.clean[1], plain.clean[0], atol=1e-2)


def test_held_out_pairs_are_measured_and_shown(tmp_path):
    given, looks, pipe = pairs(), [], tiny.kontext(0)
    course = Course(every=2, steps=1)
    trial = restore.trial_of(pipe, given, course, settings(given))
    run(tmp_path, given, pipe=pipe, course=course, look=lambda *told: looks.append(told), trial=trial)
    assert [done for done, _ in looks] == [2, 4]
    assert set(looks[0][1]) == {"noise", "haze"} and set(looks[0][1]["haze"]) == {
        "psnr",
        "ssim",
        "gmsd",
        "haarpsi",
    }
    assert len(trial.shown) == 4 and trial.sheet(each=1).size == (3 * 32 + 4, 2 * 32 + 2)


def test_the_best_weights_are_kept_and_patience_ends_a_run(tmp_path, monkeypatch):
    """Scores fall from the second look on: two looks later the run ends, with the weights of the first."""
    scores, seen = iter([9.0, 8.0, 7.0, 6.0]), []

    def measured(self):
        seen.append({name: weight.detach().clone() for name, weight in self.adapter.weights.items()})
        return {"noise": {"psnr": next(scores)}}

    monkeypatch.setattr(restore.Trial, "restore", measured)
    path = run(tmp_path, course=Course(every=2, patience=2), steps=20, dtype="float32", lr=1e-2)
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in seen[0]}
    assert len(seen) == 3
    assert all(torch.equal(kept[name], weight) for name, weight in seen[0].items())
    assert any(not torch.equal(kept[name], weight) for name, weight in seen[2].items())


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    def weights(path):
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    whole = weights(run(tmp_path, steps=4, checkpoint_every=2))
    (tmp_path / "again").mkdir()

    class Cut(Exception):
        pass

    def look(done, found):
        if done == 3:
            raise Cut

    with pytest.raises(Cut):
        run(tmp_path / "again", steps=4, checkpoint_every=2, course=Course(every=3, steps=1), look=look)
    assert lora.checkpoint_of(tmp_path / "again" / "r.safetensors").exists()
    resumed = weights(run(tmp_path / "again", steps=4, checkpoint_every=2, resume=True))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_text_encoder_learns_too(tmp_path):
    path = run(tmp_path, text_encoder=True, course=Course(every=4, steps=1))
    with safe_open(path, "pt") as file:
        assert any(name.startswith("text_encoder.") for name in file.keys())  # noqa: SIM118


@pytest.fixture
def fresh_precision():
    """accelerate keeps one precision for the whole process; this forgets it before and after."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_a_base_of_eight_bits_can_be_taught(tmp_path, fresh_precision):
    pipe = tiny.kontext(0)
    pipe.transformer.to(torch.bfloat16)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    run(tmp_path, pipe=pipe, precision="bf16", gradient_checkpointing=True, course=Course(every=4, steps=1))
    assert torch.float8_e4m3fn in {p.dtype for p in pipe.transformer.parameters()}


# Settings


def test_each_base_and_method_has_its_own_defaults():
    prompts = prompts_of(parse("noise"))
    kontext = settings_for(KINDS["kontext"], prompts, {}, "lora")
    assert (kontext.rank, kontext.alpha, kontext.batch, kontext.guidance) == (64, None, 4, 2.5)
    assert kontext.strength == 64 and kontext.gradient_checkpointing
    assert settings_for(MINI, prompts, {"percent": 1.0}, "shira").percent == 1.0
    with pytest.raises(TrainingError, match="sdxl bases do not edit pictures"):
        settings_for(KINDS["sdxl"], prompts, {}, "lora")
    with pytest.raises(TrainingError, match="training setting 'rank' is unknown"):
        settings_for(MINI, prompts, {"rank": 4}, "shira")


def test_the_trigger_is_part_of_every_prompt_where_one_is():
    assert trigger_of(prompts_of(parse("noise,low-light,inpaint"))) == "the image"
    assert trigger_of({"a": "mend it", "b": "clean it"}) == "mend it"


@pytest.mark.parametrize("wrong", [{"keep": 1.0}, {"every": -1}, {"patience": -1}, {"steps": 0}])
def test_courses_that_make_no_sense_are_refused(wrong):
    with pytest.raises(TrainingError, match=f"{next(iter(wrong))} is"):
        Course(**wrong)


def test_pairs_of_another_size_are_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"not \(3, 48, 48\)"):
        run(tmp_path, size=48)
    with pytest.raises(TrainingError, match="no pairs"):
        run(tmp_path, dataclasses.replace(pairs(), train=()))


# Telling defects apart


def test_a_net_tells_defects_apart_on_pictures_it_has_not_seen(tmp_path):
    given = pairs("noise:50,haze:0.7,blur:3", count=12, validation=8)
    net = teach(given.train, given.defects, steps=120, progress=False)
    defects.write(net, tmp_path / "r.tasks")
    again = defects.read(tmp_path / "r.tasks")
    assert again.names == (NONE, "noise", "haze", "blur")
    right = [defects.tell(again, pair.degraded)[0] == pair.task for pair in given.validation]
    right += [defects.tell(again, pair.clean)[0] == NONE for pair in given.validation[:4]]
    assert sum(right) >= 0.75 * len(right)
    assert Path(tmp_path / "r.tasks").stat().st_size < 100_000
