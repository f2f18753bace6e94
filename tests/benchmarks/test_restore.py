"""The restoration benchmark: what its rows are made of, that it counts fairly, and that the filters filter."""

import io
import sys
import zipfile

import pytest
import torch

from benchmarks import restore, restore_draw, restore_kontext
from benchmarks.restore import Found, Gallery, Report
from benchmarks.restore_classical import FILTERS, filtered
from benchmarks.restore_draw import COUNTS, MAIN, SEEDS, TASKS, ZERO, Run, keep, runs
from compose.training.degrade import Defect


def scores(psnr, other=0.5):
    return {"psnr": [psnr, psnr + 2], "ssim": [other] * 2, "gmsd": [0.1] * 2, "haarpsi": [other] * 2}


def found(few=30.0, zero=20.0, given=22.0):
    """Every run as good as `few`, a little better with each seed, and 1 dB better from 128 pairs."""
    fixed = {"input": given, "vae": 33.0} | {f"zero-{name}": zero - n for n, name in enumerate(ZERO)}
    made = [
        {"task": run.task, "count": run.count, "seed": run.seed, "train_s": 10.0,
         "scores": {task: scores(few + run.seed + (run.count == 128) - 0.5 * (run.task is not None), 0.9) for task in run.tasks}}
        for run in runs(False)
    ]  # fmt: skip
    wrong = [
        {"seed": seed, "pictures": "rain", "prompt": "", "ours": 40.0 - seed, "plain": 30.0, "vae": 33.0}
        for seed in SEEDS
    ]
    return Found(
        made,
        {name: {task: scores(value) for task in TASKS} for name, value in fixed.items()},
        wrong,
        "a card",
        2,
    )


def rows(report, part):
    return {row.id: row for row in getattr(report, part)()}


def test_few_shot_is_set_against_the_better_of_the_bare_base():
    gains = rows(Report(found(), None), "gains")
    assert gains["gain_db_rain"].value == pytest.approx(11.0) and gains[
        "gain_db_rain"
    ].spread == pytest.approx(1.0)
    assert gains["psnr_zero_rain"].value == pytest.approx(21.0), "two pictures, 20 and 22"
    assert gains["over_input_db"].value == pytest.approx(9.0) and gains["over_input_db"].n == 6
    assert gains["gain_db_rain"].met and gains["gain_ssim_rain"].value == pytest.approx(0.4)
    poor = rows(Report(found(few=21.0), None), "gains")
    assert not poor["gain_db_rain"].met and not poor["over_input_db"].met


def test_comparisons_are_paired_by_seed():
    made = rows(Report(found(), None), "comparisons")
    assert made["pairs_128_over_16_db"].value == pytest.approx(1.0)
    assert made["pairs_128_over_16_db"].spread == pytest.approx(0.0, abs=1e-9)
    assert made["unified_minus_specific_db"].value == pytest.approx(0.5)
    assert made["wrong_prompt_loss_db"].value == pytest.approx(-6.0) and made["wrong_prompt_loss_db"].met
    assert made["wrong_prompt_loss_unguarded_db"].value == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("psnr", "haarpsi", "tasks", "every"), [(25.0, 0.8, 5.0, 1.0), (35.0, 0.95, 0.0, 0.0)]
)
def test_classical_filters_count_with_their_best(monkeypatch, psnr, haarpsi, tasks, every):
    report = Report(found(), None)
    best = {"psnr": psnr, "ssim": 0.5, "gmsd": 0.1, "haarpsi": haarpsi}
    monkeypatch.setattr(Report, "classical", dict.fromkeys(TASKS, best))
    made = rows(report, "against_classical")
    assert (made["beats_classical_psnr"].value, made["beats_classical_perceptual"].value) == (tasks, every)


@pytest.mark.parametrize("task", TASKS)
def test_the_best_filter_beats_leaving_it_alone(task):
    blocks = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    clean = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)
    spoilt = torch.stack(
        [TASKS[task](picture, torch.Generator().manual_seed(n)) for n, picture in enumerate(clean)]
    )
    errors = {name: float((done - clean).square().mean()) for name, done in filtered(task, spoilt)}
    assert set(errors) == set(FILTERS[task]) and len(errors) >= 7
    assert min(errors.values()) < float((spoilt - clean).square().mean())


def test_every_run_is_made_once_whatever_the_parts():
    whole = runs(False)
    assert len(set(whole)) == len(whole) == len(SEEDS) * (len(COUNTS) + len(TASKS))
    assert sorted(map(str, [run for turn in range(4) for run in whole[turn::4]])) == sorted(map(str, whole))
    assert runs(True)[0] == Run(task=None, count=MAIN, seed=0)


def test_pictures_survive_the_archive(tmp_path):
    pictures = (torch.rand(3, 3, 24, 24) * 255).round() / 255
    keep(tmp_path, "input", {"truth": pictures, "input-rain": 1 - pictures})
    keep(tmp_path, "zero-own", {"zero-own-rain": pictures / 2})
    gallery = Gallery(tmp_path)
    assert torch.equal(gallery.truth, pictures)
    assert torch.allclose(gallery["input-rain"], 1 - pictures, atol=1e-6)
    assert torch.allclose(gallery["zero-own-rain"], pictures / 2, atol=1 / 255)
    with zipfile.ZipFile(tmp_path / "pictures-input.zip") as archive:
        assert archive.namelist()[:3] == [f"truth/00{n}.webp" for n in range(3)]
        assert io.BytesIO(archive.read("truth/000.webp")).getvalue()[8:12] == b"WEBP"


def test_a_run_is_kept_as_soon_as_it_is_done_and_not_done_again(monkeypatch, tmp_path):
    studio, done = restore_draw.Studio(tmp_path, tmp_path, torch.device("cpu"), 2), []
    names = [run.name for run in runs(True)]

    def one(studio, run, out, steps):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run.name)
        extra = {"wrong": [{"seed": run.seed}], "unguarded": {}} if run.task is None else {}
        return {"task": run.task, "count": run.count, "seed": run.seed, "scores": {}} | extra

    monkeypatch.setattr(restore_draw, "one", one)
    monkeypatch.setattr(
        restore_draw, "baselines", lambda *args: {"where": "a card", "pictures": 2, "fixed": {"vae": {}}}
    )
    with pytest.raises(KeyboardInterrupt):
        restore_draw.draw(studio, tmp_path, (0, 1), quick=True, steps=1)
    assert done == names[:2]
    with pytest.raises(SystemExit, match=r"run benchmarks\.restore_draw"):
        restore.read(tmp_path)
    done.clear()
    monkeypatch.setattr(
        restore_draw, "one", lambda studio, run, out, steps: done.append(run.name) or {"seed": 0}
    )
    restore_draw.draw(studio, tmp_path, (0, 1), quick=True, steps=1)
    assert done == names[2:]
    (tmp_path / "pictures-few.zip").touch()
    read = restore.read(tmp_path)
    assert (read.where, read.fixed, read.wrong) == ("a card", {"vae": {}}, [{"seed": 0}])
    assert len(read.runs) == len(names)


def test_fewer_pairs_are_the_first_of_more(monkeypatch, tmp_path):
    """Runs from 16 and from 128 pairs differ in the pairs alone, and one for a task has the pairs of the one for all."""
    studio = restore_draw.Studio(tmp_path, tmp_path, torch.device("cpu"), 2)
    monkeypatch.setattr(studio, "scenes", lambda part, count, seed: torch.rand(count, 3, 128, 128, generator=torch.Generator().manual_seed(seed)), raising=False)  # fmt: skip
    monkeypatch.setattr(
        restore_draw, "TASKS", {"noise25": Defect(task="noise", low=25, high=25), "blur": TASKS["blur"]}
    )
    monkeypatch.setattr(restore_draw, "COUNTS", (2, 4))
    few, many, alone = (
        studio.pairs(Run(task=task, count=count, seed=0))
        for task, count in ((None, 2), (None, 4), ("blur", 2))
    )
    assert few.counts == {"noise25": 2, "blur": 2} and many.counts == {"noise25": 4, "blur": 4}
    assert torch.equal(few.train[1].degraded, many.train[1].degraded)
    assert torch.equal(alone.train[0].degraded, few.train[2].degraded)


def test_the_full_size_step_runs_small(monkeypatch, capsys):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    monkeypatch.setattr(sys, "argv", ["restore_kontext", "--quick"])
    restore_kontext.main()
    AcceleratorState._reset_state()
    said = capsys.readouterr().out
    assert all(f"{id_}:" in said for id_ in restore_kontext.IDS)


def test_rows_have_names_and_unknown_ones_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["restore", "--rows", "gain"])
    with pytest.raises(SystemExit):
        restore.main()
    assert "row 'gain' is unknown" in capsys.readouterr().err
    assert len(set(restore.IDS)) == len(restore.IDS)
