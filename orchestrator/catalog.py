"""Which methods and encoders there are: read off the classes and their configurations, nothing is registered.

What is told about them lies in docs/methods, which the package holds as `method_pages`, checkout or not.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import inspect
import pkgutil
import re
from typing import Any

import methods
from methods.base import Method
from methods.encoders import Encoder
from orchestrator.component import to_plain
from orchestrator.errors import UserError, nearest


def components() -> list[dict[str, Any]]:
    """Every concrete Method and Encoder in `methods`: name, use, kind, source and its options with their comments."""
    found = []
    for module_info in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"methods.{module_info.name}")
        for name, cls in vars(module).items():
            concrete = inspect.isclass(cls) and issubclass(cls, (Method, Encoder)) and not inspect.isabstract(cls)
            if concrete and cls.__module__ == module.__name__:
                doc = inspect.getdoc(module if issubclass(cls, Method) else cls) or ""
                found.append({
                    "name": name, "use": f"{module.__name__}.{name}",
                    "kind": "method" if issubclass(cls, Method) else "encoder",
                    "source": doc.split("\n\n")[0].replace("\n", " "), "options": _options(cls.Config),
                })  # fmt: skip
    return sorted(found, key=lambda c: (c["kind"] != "method", c["name"]))


def pages() -> dict[str, str]:
    """The pages: name to Markdown. A name is a module's in `methods`, or a composition's, which is stages and no class,
    such as clusterfit."""
    folder = importlib.resources.files("orchestrator") / "method_pages"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".md")), key=lambda f: f.name)
    return {file.name.removesuffix(".md"): file.read_text(encoding="utf-8") for file in files}


def compositions() -> list[dict[str, Any]]:
    """As `components`, what has a page and no class: its `use` is empty, and its options are its stages'."""
    modules = {component["use"].split(".")[1] for component in components()}
    return [
        {"name": name, "use": "", "kind": "composition", "options": [],
         "source": text.split("\n\n")[1].replace("\n", " ")}
        for name, text in pages().items() if name not in modules
    ]  # fmt: skip


def find(name: str) -> tuple[list[dict[str, Any]], str | None]:
    """Components and compositions by class (SimCLR), module (simclr, methods.simclr), full path or page, in any case
    and with hyphens for underscores; and the page where a method or a composition has one. Raises UserError."""
    asked = name.lower().replace("-", "_")
    everything = [*components(), *compositions()]
    found, known = [], []
    for component in everything:
        module = component["use"].rpartition(".")[0]
        names = [component["name"], component["use"], module, module.rpartition(".")[2]]
        known += [one for one in names if one]
        if asked in map(str.lower, filter(None, names)):
            found.append(component)
    if not found:
        listed = [component["name"] for component in everything]
        raise UserError(f"method {name}: unknown{nearest(name, known) or '; known are ' + ', '.join(listed)}")
    first = found[0]
    return found, pages().get(first["use"].rpartition(".")[0].rpartition(".")[2] or first["name"])


def _options(config: type) -> list[dict[str, Any]]:
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(config), re.MULTILINE))
    return [
        {"name": f.name, "type": str(f.type), "doc": comments.get(f.name, ""),
         "default": "required" if f.default is dataclasses.MISSING else to_plain(f.default)}
        for f in dataclasses.fields(config)
    ]  # fmt: skip
