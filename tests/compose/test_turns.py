"""Threads that load models at once, as a server with two bases or a search does."""

from concurrent.futures import ThreadPoolExecutor

import tiny
import torch

from compose import loading


def test_bases_that_load_at_once_all_have_their_weights(tmp_path):
    source = loading.find(str(tiny.save(tiny.flux(0), tmp_path / "base")))
    with ThreadPoolExecutor(4) as pool:
        pipes = list(pool.map(lambda _: loading.open_pipeline(source, torch.float32), range(8)))
    modules = [
        part for pipe in pipes for part in pipe.components.values() if isinstance(part, torch.nn.Module)
    ]
    assert modules and not any(weight.is_meta for part in modules for weight in part.parameters())
