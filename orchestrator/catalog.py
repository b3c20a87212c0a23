"""Which methods and encoders there are: read off the classes and their configurations, nothing is registered."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from typing import Any

import methods
from methods.base import Method
from methods.encoders import Encoder
from orchestrator.component import to_plain


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


def _options(config: type) -> list[dict[str, Any]]:
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(config), re.MULTILINE))
    return [
        {"name": f.name, "type": str(f.type), "doc": comments.get(f.name, ""),
         "default": "required" if f.default is dataclasses.MISSING else to_plain(f.default)}
        for f in dataclasses.fields(config)
    ]  # fmt: skip
