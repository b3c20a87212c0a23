"""The import table: what each package may read, checked on the source, imports inside functions included."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = [path for top in ("methods", "orchestrator", "tune_spaces") for path in (ROOT / top).rglob("*.py")]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in PRODUCT)
SPACES_MAY = {"ray", "numpy", "tune_spaces", *sys.stdlib_module_names}
METHODS_MAY = {"torch", "torchvision", "timm", "einops", "methods", *sys.stdlib_module_names}
DOORS: dict[str, str | tuple[str, ...]] = {  # each heavy dependency, and the only place that imports it
    "ray": ("orchestrator/cluster/", "tune_spaces/"),
    "optuna": "orchestrator/cluster/",
    "mlflow": "orchestrator/tracking.py",
    "matplotlib": "orchestrator/report/",
}
DISTRIBUTIONS = {  # what brings it
    "PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "markupsafe": "jinja2", "aiohttp": "ray",
}  # fmt: skip


def imported(source: str, package: str = "") -> Iterator[tuple[str, int]]:
    """(full module name, line) of every import: at the top, in functions, under TYPE_CHECKING, by importlib.

    Args:
        package: dotted name of the package the source lies in, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def roots_of(file: str) -> list[tuple[str, int]]:
    """(top-level package, line) of a file's imports."""
    package = ".".join(Path(file).parent.parts)
    source = (ROOT / file).read_text(encoding="utf-8")
    return [(name.partition(".")[0], line) for name, line in imported(source, package)]


def test_every_way_to_import_is_seen():
    source = (
        "import ray.data as d\nfrom mlflow import log\nfrom . import base\nfrom ..other import x\n"
        "def later():\n    import matplotlib\n    importlib.import_module('ray')\n    __import__('mlflow')\n"
    )
    assert sorted(name for name, _ in imported(source, "a.b")) == [
        "a.b.base", "a.other.x", "matplotlib", "mlflow", "mlflow.log", "ray", "ray.data",
    ]  # fmt: skip


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("methods/")])
def test_a_method_knows_only_torch_and_the_standard_library(file):
    assert [found for found in roots_of(file) if found[0] not in METHODS_MAY] == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("tune_spaces/")])
def test_a_space_knows_only_ray_tune(file):
    assert [found for found in roots_of(file) if found[0] not in SPACES_MAY] == []


@pytest.mark.parametrize("dependency", DOORS)
def test_a_heavy_dependency_has_one_door(dependency):
    door = DOORS[dependency]
    users = {file for file in FILES for name, _ in roots_of(file) if name == dependency}
    assert users, f"nothing imports {dependency} any more"
    assert {file for file in users if not file.startswith(door)} == set()


def test_ray_is_not_reached_by_importing_what_lies_beside_the_cluster():
    """Outside of `orchestrator/cluster` its modules are imported in functions only: one process needs no Ray."""
    for file in FILES:
        if not file.startswith("orchestrator/cluster/"):
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            at_top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
            names = [name for name, _ in imported(ast.unparse(at_top))]
            assert not [name for name in names if name.startswith("orchestrator.cluster")], file


def test_every_package_in_use_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in project["dependencies"]}
    known = {"methods", "orchestrator", "tune_spaces", *sys.stdlib_module_names}
    used = {(name, file) for file in FILES for name, _ in roots_of(file) if name not in known}
    assert {(name, file) for name, file in used if DISTRIBUTIONS.get(name, name).lower() not in declared} == set()
