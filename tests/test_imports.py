"""The import graph: arrows run one way, there is no cycle, and fast paths stay free of torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import compose

ROOT = Path(compose.__file__).parent.parent
PACKAGES = {
    "compose": "compose", "kernels": "compose.kernels", "retrieval": "compose.retrieval",
    "training": "compose.training", "app": "compose.app", "assets": "compose.assets",
}  # fmt: skip
LAYERS = {  # what each package may import besides itself
    "assets": set(),
    "kernels": set(),
    "compose": {"kernels", "assets"},
    "retrieval": {"compose", "kernels", "assets"},
    "training": {"compose", "retrieval", "kernels", "assets"},
    "app": {"compose", "retrieval", "training", "kernels", "assets"},
}
LATE_RETRIEVAL = (
    "compose.pipeline"  # the one module of `compose` that may import `retrieval`, inside functions
)


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of ours."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def package_of(name: str) -> str:
    second = name.split(".")[1] if "." in name else ""
    return second if f"compose.{second}" in PACKAGES.values() else "compose"


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """(module of ours, whether it is imported inside a function) for every import below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((ours(alias.name), late) for alias in child.names if ours(alias.name))
        elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from ((ours(name), late) for name in names if ours(name))
        elif not is_typing_only(child):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, late or inside)


def ours(name: str) -> str | None:
    """The module of ours that `name` (a module, or something in one) means."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


GRAPH = {name: list(imports(ast.parse(path.read_text(encoding="utf-8")))) for name, path in MODULES.items()}


def test_arrows_run_one_way():
    wrong = [
        f"{name} -> {target}"
        for name, targets in GRAPH.items()
        for target, late in targets
        if package_of(target) not in LAYERS[package_of(name)] | {package_of(name)}
        and not (name == LATE_RETRIEVAL and package_of(target) == "retrieval" and late)
    ]
    assert wrong == []


def test_there_is_no_import_cycle_not_even_a_late_one():
    seen: dict[str, int] = {}  # 1 while on the path, 2 when done

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert seen.get(name) != 1, " -> ".join([*path[path.index(name) :], name])
        if name in seen:
            return
        seen[name] = 1
        for target, late in GRAPH[name]:
            if target != name and not (name == LATE_RETRIEVAL and late):
                walk(target, (*path, name))
        seen[name] = 2

    for name in GRAPH:
        walk(name, ())


def test_nothing_is_called_utils():
    assert [
        name for name in MODULES if name.rpartition(".")[2] in ("utils", "util", "helpers", "common", "misc")
    ] == []


def test_app_modules_import_no_torch_at_the_top():
    heavy = ("torch", "diffusers", "transformers", "peft", "open_clip", "faiss")
    for name, path in MODULES.items():
        if package_of(name) == "app":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(each.split(".")[0] in heavy for each in names), name


@pytest.mark.parametrize("name", ["kernels", "app", "retrieval", "training", "assets"])
def test_generic_names_do_not_resolve_once_installed(name, tmp_path):
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s and (s.origin or s.submodule_search_locations))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in out.stdout.replace(sys.prefix, "")


@pytest.mark.parametrize(
    "code",
    [
        "import compose",
        "import compose, sys; compose.Request(prompt='a dog')",
        "from compose.app.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from compose.app.cli import main\ntry: main(['generate', '--help'])\nexcept SystemExit: pass",
        "from compose.app.cli import main\nmain(['generate', '--prompt', ''])",
        "from compose.app.cli import main\nmain(['generate', '--prompt', 'a dog', '--lora', 'no-such-adapter'])",
        "from compose.app.cli import main\nmain(['redo', 'no-such-picture.png'])",
    ],
)
def test_fast_paths_import_no_torch(code, tmp_path):
    check = "\nimport sys; print('loaded:', [name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code + check], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert out.stdout.endswith("loaded: []\n"), out.stdout + out.stderr
