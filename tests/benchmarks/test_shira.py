"""The questions about sparse adapters, at toy sizes: every row comes out, and answers what it says."""

import pytest
import torch

from benchmarks import fused, shira

CPU = torch.device("cpu")


@pytest.mark.parametrize("ids, question, needs_gpu", shira.QUESTIONS)
def test_rows_that_need_no_gpu_come_out(ids, question, needs_gpu):
    if needs_gpu:
        assert list(shira.measured(ids, CPU, quick=True)) == []
        return
    rows = list(shira.measured(None, CPU, quick=True) if ids is None else question(CPU, True))
    assert {row.id for row in rows} == set(ids)
    assert all(row.value > 0 for row in rows)


def test_restoring_and_sizes_meet_their_targets_at_any_size():
    rows = {
        row.id: row for row in shira.measured(["restore_exact", "file_ratio", "file_ratio_seeded"], CPU, True)
    }
    assert len(rows) == 3 and all(row.met for row in rows.values())


def test_switching_in_a_flux_runs_through_the_engine():
    rows = {row.id: row for row in shira.measure_flux(CPU, quick=True)}
    assert set(rows) == {"switch_flux_ms", "switch_flux_ms_peft"}
    assert rows["switch_flux_ms"].target == 8


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_steps_move_every_kind(checkpointed):
    for kind in ("lora", "random", "struct"):
        step, frozen = shira.stepping(kind, checkpointed, CPU, quick=True)
        step()
        assert frozen > 0


def test_lora_and_shira_have_equal_parameters():
    def count(kind):
        with CPU:
            net = shira.Stack(64, 16, 1, 1, False).requires_grad_(False)
        return sum(parameter.numel() for parameter in shira.insert(kind, net, 2))

    assert abs(count("random") / count("lora") - 1) < 1e-3
    assert abs(count("struct") / count("lora") - 1) < 0.2  # whole rows


def test_fused_sets_are_the_same_every_time():
    names = list("abcdef")
    pairs = fused.fused_sets(names, 2, 12)
    assert pairs == fused.fused_sets(names, 2, 12) and len(set(pairs)) == 12
    assert len(fused.fused_sets(names, 3, 100)) == 20


def test_right_asks_for_what_the_adapter_brings():
    answer = fused.Answer(
        row="", prompt="", seed=0, adapter=None, concept="", rank=0, style=None, ground=None
    )
    missed = fused.Answer(
        row="", prompt="", seed=0, adapter=None, concept="", rank=1, style=True, ground=None
    )
    other = fused.Answer(
        row="", prompt="", seed=0, adapter=None, concept="", rank=0, style=False, ground=None
    )
    assert fused.right([answer, missed, other, other]) == 50


def test_unknown_rows_are_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["shira", "--rows", "switch"])
    with pytest.raises(SystemExit):
        shira.main()
    assert "row 'switch' is unknown" in capsys.readouterr().err
