"""A class named by a recipe with its configuration: `{use: methods.simclr.SimCLR, temperature: 0.5}`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from methods.base import Method
from methods.encoders import Encoder
from orchestrator.errors import nearest


class ConfigError(Exception):
    """Problems of one configuration: (path, message) pairs."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{path}: {message}" for path, message in problems))
        self.problems = problems


@dataclass(frozen=True)
class Component:
    """A Method or Encoder class by its full path, and its configuration, a frozen dataclass."""

    use: str
    config: Any

    @property
    def cls(self) -> type:
        return resolve(self.use, (Method, Encoder))

    def to_json(self) -> dict[str, Any]:
        """`use` and every field, defaults too, in plain values."""
        return {"use": self.use, **to_plain(self.config)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Component:
        """Validate `{use: ..., field: ...}`. Raises ConfigError."""
        if not isinstance(value, dict) or "use" not in value:
            raise ConfigError(
                [("", f"{value!r}: must be a mapping with `use:`, such as {{use: methods.simclr.SimCLR}}")]
            )
        cls = resolve(str(value["use"]), (Method, Encoder))
        return Component(str(value["use"]), validate(cls.Config, {k: v for k, v in value.items() if k != "use"}))


def to_plain(config: Any) -> Any:
    """A dataclass, a Component or a container of them as JSON values."""
    if isinstance(config, Component):
        return config.to_json()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_plain(value) for value in config]
    return config


def chosen(config: Any, resolved: Mapping[str, Any] | None = None) -> Any:
    """As `to_plain`, without the fields that have their default: what enters a key.

    So an option that is added later leaves the answers of earlier runs valid. Whoever changes a default
    raises the `version` of the stages that read it.

    Args:
        resolved: plain values that stand in place of some fields of a dataclass.
    """
    if isinstance(config, Component):
        return {"use": config.use, **chosen(config.config)}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {f.name: (resolved or {}).get(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {f.name: chosen(v) for f in dataclasses.fields(config) if (v := values[f.name]) != _default(f)}
    if isinstance(config, dict):
        return {str(key): chosen(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [chosen(value) for value in config]
    return config


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default  # MISSING, which equals nothing, where there is none


def resolve(path: str, bases: tuple[type, ...]) -> type[Any]:
    """The class at a full path such as methods.simclr.SimCLR. Raises ConfigError when it is none of `bases`."""
    module_name, _, name = path.rpartition(".")
    wanted = " or ".join(base.__name__ for base in bases)
    try:
        module = importlib.import_module(module_name) if module_name else None
    except ImportError as error:
        raise ConfigError([("use", f"{path}: cannot import {module_name} ({error})")]) from error
    found = getattr(module, name, None)
    if not _usable(found, bases):
        names = [name for name, value in vars(module).items() if _usable(value, bases)] if module else []
        hint = nearest(name, names) or (f"; {module_name} has {', '.join(sorted(names))}" if names else "")
        raise ConfigError([("use", f"{path}: no {wanted} class of that name{hint}")])
    return found


def _usable(value: Any, bases: tuple[type, ...]) -> TypeGuard[type[Any]]:
    """Whether it is a class that can be made: one of `bases`, but neither a base itself nor abstract."""
    return inspect.isclass(value) and issubclass(value, bases) and value not in bases and not inspect.isabstract(value)


def dataclass_fields(cls: type) -> list[str]:
    """The names a configuration takes."""
    return [f.name for f in dataclasses.fields(cls) if f.init]


CLOSED = {"extra": "forbid", "arbitrary_types_allowed": True, "allow_inf_nan": False}


def _close(cls: Any, seen: set[type]) -> None:
    """Make pydantic refuse unknown keys and infinite numbers in a stdlib dataclass and in those it holds."""
    for part in (cls, *get_args(cls)) if get_origin(cls) else (cls,):
        if inspect.isclass(part) and dataclasses.is_dataclass(part) and part is not Component and part not in seen:
            seen.add(part)
            part.__pydantic_config__ = CLOSED  # type: ignore[attr-defined]
            for hint in get_type_hints(part).values():
                _close(hint, seen)


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    """Pydantic's validator of a dataclass; made once, since making it takes longer than all it is used for."""
    _close(cls, set())
    return TypeAdapter(cls)


def validate(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from plain values: types checked, unknown keys refused. Raises ConfigError with every problem."""
    problems: list[tuple[str, str]] = []
    values, hints = dict(values), get_type_hints(cls)
    for name, hint in hints.items():
        if name in values and hint is Component and isinstance(values[name], dict):
            try:
                values[name] = Component.from_json(values[name])
            except ConfigError as error:
                problems += [(_join(name, path), message) for path, message in error.problems]
                values.pop(name)
                hints = {k: v for k, v in hints.items() if k != name}
    built: Any = None
    try:
        built = _adapter(cls).validate_python(values)
    except ValidationError as error:
        missing_is_known = {path.split(".")[0] for path, _ in problems}
        for item in error.errors():
            where = [str(part) for part in item["loc"]]
            if item["type"].startswith("missing") and where and where[-1] in missing_is_known:
                continue
            problems.append((".".join(where), _explain(cls, where, item)))
    if problems:
        raise ConfigError(problems)
    return built


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _explain(cls: type, where: list[str], item: Any) -> str:
    owner: Any = cls
    for part in where[:-1]:
        owner = next((h for h in _flatten(get_type_hints(owner).get(part))), owner) if inspect.isclass(owner) else owner
    fields = dataclass_fields(owner) if inspect.isclass(owner) and dataclasses.is_dataclass(owner) else []
    if item["type"] == "unexpected_keyword_argument":
        return f"unknown{nearest(where[-1], fields)} {owner.__name__} has {', '.join(fields)}".replace(
            "unknown ", "unknown; " if not nearest(where[-1], fields) else "unknown "
        )
    if item["type"].startswith("missing"):
        return "missing, and it has no default"
    message = item["msg"].removeprefix("Value error, ")
    return message if item["type"] == "value_error" else f"{item['input']!r}: {message[0].lower()}{message[1:]}"


def _flatten(hint: Any) -> Iterable[type]:
    return [part for part in (hint, *get_args(hint)) if inspect.isclass(part) and dataclasses.is_dataclass(part)]
