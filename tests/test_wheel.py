"""The wheel: holds every module, installs under one name, and draws from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import tiny

import compose

ROOT = Path(compose.__file__).parent.parent
FOLDERS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
    "package-dir"
]


def run(*words: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS.values():
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", "out")
    run(sys.executable, "-m", "pip", "wheel", ".", *build, cwd=folder)
    (path,) = (folder / "out").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin/ of a fresh environment that holds the wheel and sees the other packages of this one."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet")
    run(*pip, wheel, cwd=home)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_the_wheel_holds_every_module_and_nothing_but_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix("-0.1.0.dist-info") for name in names} == {
        "compose",
        "lora_compose",
    }
    inside = {name for name in names if name.endswith(".py")}
    wanted = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert wanted - inside == set()
    assert inside - wanted == set()


def test_the_wheel_holds_every_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("assets", "training", "app"):
        tracked = run("git", "ls-files", package, cwd=ROOT).split()
        data = {name for name in tracked if not name.endswith((".py", ".md", ".sh"))}
        assert {name for name in data if f"compose/{name}" not in names} == set()


def test_the_installed_command_answers_and_generic_names_stay_free(installed, tmp_path):
    assert "generate" in run(installed / "compose", "--help", cwd=tmp_path)
    code = "import compose, compose.retrieval, compose.kernels; print(compose.__file__)"
    assert str(installed.parent) in run(installed / "python", "-c", code, cwd=tmp_path)
    code = "import importlib.util as u; print([n for n in {} if (s := u.find_spec(n)) and {!r} in str(s.origin)])"
    found = run(
        installed / "python", "-c", code.format(sorted(set(FOLDERS.values()) - {"compose"}), str(installed.parent)), cwd=tmp_path
    )  # fmt: skip
    assert found == "[]\n"


def test_the_installed_package_draws(installed, tmp_path):
    base = tiny.save(tiny.flux(0), tmp_path / "base")
    homes = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_DATA_HOME": str(tmp_path / "data")}
    what = (
        "--prompt",
        "a dog",
        "--base",
        base,
        "--size",
        32,
        "--steps",
        1,
        "--device",
        "cpu",
        "--out",
        "a.png",
    )
    assert run(installed / "compose", "generate", *what, cwd=tmp_path, **homes) == "a.png\n"
    assert (tmp_path / "a.png").stat().st_size > 0
