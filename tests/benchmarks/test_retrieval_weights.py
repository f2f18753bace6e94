"""What the rows about weights count, and which parts a question runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import retrieval
from benchmarks.retrieval_encode import layers, measure
from benchmarks.retrieval_weights import gap, hits, joined, keep_unseen, recall, rival, singular_values
from compose.training.encoder import Config, Targets
from compose.training.zoo import Shard, read_shards
from compose.training.zoo_plan import Job, Subject


def test_recall_counts_captions_whose_own_adapter_is_near_the_top():
    vectors = torch.eye(4)
    asked = torch.stack([vectors, vectors.roll(1, 0)], 1)  # the second caption of each names another
    assert recall(vectors, asked, 1) == 50
    assert recall(vectors, asked, 4) == 100
    own = torch.tensor([2])
    assert hits(vectors, vectors[None, 2:3], own, 1).tolist() == [[1.0]]


def test_the_gap_is_between_themes_not_within_one_adapter():
    vectors = torch.eye(2).repeat_interleave(2, 0)
    assert gap(vectors, torch.tensor([0, 0, 1, 1])) == pytest.approx(1)
    assert gap(vectors, torch.tensor([0, 1, 0, 1])) == pytest.approx(-0.5)


def test_the_rival_finds_what_is_linear_in_the_kernel():
    generator = torch.Generator().manual_seed(0)
    aim = torch.nn.functional.normalize(torch.randn(60, 6, generator=generator), dim=1)
    seen = aim @ torch.randn(6, 30, generator=generator)
    targets = Targets(subject=torch.arange(60), captions=aim[:, None], picture=aim)
    found = rival(seen @ seen.T, targets, torch.arange(40), torch.arange(40, 60), seed=0)
    assert len(found) == 4
    assert all(recall(vectors, aim[40:, None], 1) > 90 for vectors in found.values())


def shard(rank: int, *parts: str) -> Shard:
    generator = torch.Generator().manual_seed(rank)
    jobs = tuple(
        Job(
            name=f"{part}-{rank}-{n}", part=part, subject=Subject(role="concept", name=str(n)), trigger="sks",
            styles=("noto",), rank=rank, targets="attention", rate=1e-3, init="uniform", seed=0,
        )
        for n, part in enumerate(parts)
    )  # fmt: skip
    pair = (
        torch.randn(len(parts), rank, 6, generator=generator),
        torch.randn(len(parts), 5, rank, generator=generator),
    )
    return Shard(jobs=jobs, shares=(0.5,) * len(parts), factors={"site": tuple(each.half() for each in pair)})


def test_shards_of_one_rank_are_asked_together():
    first, other, second = shard(2, "train", "test"), shard(4, "train"), shard(2, "seen")
    both, alone = joined([first, other, second])
    assert both.jobs == first.jobs + second.jobs and both.shares == first.shares + second.shares
    assert torch.equal(both.factors["site"][1][2:], second.factors["site"][1])
    assert alone.jobs == other.jobs


def test_test_adapters_are_kept_as_a_zoo_of_their_own(tmp_path):
    class World:
        shards = (shard(2, "train", "test", "seen", "test"), shard(4, "train"))

    keep_unseen(World, tmp_path)
    (kept,) = read_shards(tmp_path)
    assert [job.name for job in kept.jobs] == ["test-2-1", "test-2-3"] and kept.shares == (0.5, 0.5)
    assert torch.equal(kept.factors["site"][0], World.shards[0].factors["site"][0][[1, 3]])


def test_singular_values_come_from_small_products():
    down, up = shard(3, "train", "test").factors["site"]
    whole = torch.linalg.svdvals(up.float() @ down.float())[:, :3]
    assert torch.allclose(singular_values(down, up), whole, rtol=1e-4)


def test_only_the_parts_that_hold_a_row_are_run(monkeypatch, capsys):
    ran = []

    class Part:
        IDS = ("encode_s", "weights_r1")

        @staticmethod
        def main(argv):
            ran.append(argv)

    monkeypatch.setattr(retrieval.importlib, "import_module", lambda name: Part)
    monkeypatch.setattr(retrieval, "PARTS", {"one": False, "two": True})
    retrieval.main(["--rows", "encode_s,other", "--quick"])
    assert ran == [["--rows", "encode_s", "--quick"]] and "two: left out" in capsys.readouterr().out
    retrieval.main(["--rows", "other"])
    assert len(ran) == 1
    retrieval.main(["--zoo", "folder", "--clip", "x"])
    assert ran[1:] == [["--clip", "x"], ["--zoo", "folder", "--clip", "x"]]


def test_site_tables_have_their_real_size():
    flux, sdxl = layers("flux"), layers("sdxl")
    assert flux["transformer.single_transformer_blocks.37.proj_out"] == (3072, 15360)
    assert sdxl["unet.down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k"] == (1280, 2048)
    assert len(flux) > 400 and len(sdxl) > 700


def test_encoding_is_measured_in_a_process_of_its_own():
    rows = {row.id: row for row in measure(quick=True, config=Config(probes=2, width=4, rank=8))}
    assert 0 < rows["encode_s"].value < 20 and rows["encode_memory"].value > 0
