"""Every kernel compiles for an H100, on any machine: fits its shared memory, spills nothing, uses its matrix units and
loads 16 bytes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = 227 * 1024  # bytes that one block of an H100 may have


@pytest.fixture(scope="module")
def made() -> dict[str, dict]:
    """In a process of its own: this one may have triton's interpreter in the compiler's place."""
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_fits_and_spills_nothing(made):
    assert len(made) == 18
    assert {name: each["shared"] for name, each in made.items() if each["shared"] > SHARED} == {}
    assert [name for name, each in made.items() if each["spilled"]] == []


def test_products_use_the_matrix_units(made):
    kinds = ("shrink", "expand", "linear", "lift", "pack shrink", "rows", "gate", "fold")
    products = [name for name in made if name.startswith(kinds)]
    assert [name for name in products if not made[name]["wgmma"] + made[name]["mma"]] == []
    assert all(made[name]["wgmma"] for name in products if name.startswith("linear"))


def test_wide_tensors_move_sixteen_bytes_at_a_time(made):
    scattered = ("sparse",)
    wide = [name for name in made if not name.startswith(scattered)]
    assert [name for name in wide if not made[name]["wide_loads"] + made[name]["bulk_loads"]] == []
    assert all(made[name]["bulk_loads"] for name in wide if name.startswith("linear"))
    writers = [name for name in wide if name != "stats"]
    assert [name for name in writers if not made[name]["wide_stores"]] == []
