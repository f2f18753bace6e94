"""Every python example of the engine's pages runs, in order, on a tiny pipeline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

from compose import policies
from compose.backends import BACKENDS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["concepts.md", "caching.md", "add-a-policy.md", "add-a-backend.md", "gate.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page, monkeypatch):
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))
    examples = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert examples
    pipe = tiny.flux(0)
    scope = {
        "pipe": pipe,
        "adapters": [tiny.random_adapter(pipe, name, seed=n) for n, name in enumerate(("dog", "ink"))],
        "call": tiny.CALL["flux"],
        "__name__": "__main__",
    }
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    for n, example in enumerate(examples):
        exec(compile(example, f"{page} example {n + 1}", "exec"), scope)
    assert all((weight == before[name]).all() for name, weight in pipe.transformer.state_dict().items())


def test_the_pages_name_every_policy_and_backend():
    text = (DOCS / "concepts.md").read_text()
    assert all(f"`{name}`" in text for name in (*policies.POLICIES, *BACKENDS))
