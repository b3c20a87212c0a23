"""A space: which fields of a recipe to search and in which ranges, and what can be asked of a range."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Quantized

FUNCTIONS: dict[str, Callable[..., Domain]] = {
    "uniform": tune.uniform, "quniform": tune.quniform, "loguniform": tune.loguniform,
    "qloguniform": tune.qloguniform, "randint": tune.randint, "qrandint": tune.qrandint,
    "lograndint": tune.lograndint, "qlograndint": tune.qlograndint, "choice": tune.choice,
}  # fmt: skip
OPTIONS = {name: 2 + name.startswith("q") for name in FUNCTIONS} | {"choice": 1}  # how many arguments each takes


@dataclass(frozen=True, kw_only=True)
class Space:
    """Ranges by field.

    A name such as "method.temperature" or "optim.lr" is a field of every Train stage whose method is one of `methods`
    (every Train stage where there are none). One with a capital is a field of every stage of that kind:
    "Cluster.clusters". "Rounds.ladder" is what changes from round to round, in fields of the student.
    """

    params: Mapping[str, Domain]
    methods: tuple[str, ...] = ()  # full paths


def parse(text: str) -> Domain:
    """A range as it is written in Ray Tune: "loguniform(0.05, 1)", "choice([10, 20])". Nothing is evaluated.

    Raises:
        ValueError: it is no call of one of `FUNCTIONS` with plain values, or its limits are wrong.
    """
    known = ", ".join(FUNCTIONS)
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or call.keywords:
        raise ValueError(f"{text!r} is no range; write it as loguniform(0.05, 1), with one of {known}")
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    prefix = call.func.value if isinstance(call.func, ast.Attribute) else None
    if name not in FUNCTIONS or not (prefix is None or isinstance(prefix, ast.Name) and prefix.id == "tune"):
        raise ValueError(f"{text!r}: {ast.unparse(call.func)} is none of {known}")
    try:
        values = [ast.literal_eval(argument) for argument in call.args]
    except ValueError:
        raise ValueError(f"{text!r}: must hold plain numbers, words in quotes or lists") from None
    if len(values) != OPTIONS[name]:
        raise ValueError(f"{text!r}: {name} takes {OPTIONS[name]} values, found {len(values)}")
    if name == "choice":
        if not isinstance(values[0], list | tuple) or len(values[0]) < 2:
            raise ValueError(f"{text!r}: choice takes a list of two or more, such as choice([10, 20])")
        return tune.choice(list(values[0]))
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{text!r}: the limits must be numbers")
    if "int" in name and not all(isinstance(value, int) for value in values):
        raise ValueError(f"{text!r}: {name} takes whole numbers")
    low, high, *step = values
    if not low < high or ("log" in name and low <= 0) or (step and step[0] <= 0):
        need = "0 < low < high" if "log" in name else "low < high"
        raise ValueError(f"{text!r}: needs {need}{' and a step above 0' if step else ''}")
    return FUNCTIONS[name](*values)


def is_log(domain: Domain) -> bool:
    """Whether it is searched on a logarithmic scale."""
    sampler = domain.get_sampler()
    return isinstance(sampler.sampler if isinstance(sampler, Quantized) else sampler, LogUniform)


def options(domain: Domain) -> list[Any] | None:
    """What it chooses from; None for a range of numbers."""
    return list(domain.categories) if isinstance(domain, Categorical) else None


def limits(domain: Domain) -> tuple[float, float]:
    """The least and the greatest number of a range, both of them possible."""
    sampler = domain.get_sampler()
    whole = isinstance(domain, Integer) and not isinstance(sampler, Quantized)
    return (
        domain.lower,
        domain.upper - 1 if whole else domain.upper,
    )  # Tune leaves out the end of randint, as Python does


def holds(domain: Domain, value: Any) -> bool:
    """Whether a value can be found in it: 3 in randint(1, 4) and not in randint(1, 3)."""
    if isinstance(domain, Categorical):
        return value in domain.categories
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    low, high = limits(domain)
    return low <= value <= high and (isinstance(domain, Float) or value == int(value))


def snap(domain: Domain, value: Any) -> Any:
    """The possible value nearest to one that a searcher proposes: Optuna drops the steps of a logarithmic range."""
    sampler = domain.get_sampler()
    if isinstance(domain, Categorical):
        return value
    low, high = limits(domain)
    if isinstance(sampler, Quantized):
        value = round(round(value / sampler.q) * sampler.q, 12)
    value = min(max(value, low), high)
    return int(round(value)) if isinstance(domain, Integer) else float(f"{value:.6g}")


def draw(domain: Domain, *seed: int) -> Any:
    """One value of it, by Ray Tune's own sampler; the same for the same seeds."""
    return snap(domain, domain.sample(random_state=np.random.default_rng(seed)))


def cut(domain: Domain, count: int) -> list[Any]:
    """At most `count` values over the whole range, both ends among them, evenly on its scale; or all options.

    loguniform(0.01, 1) in 3: 0.01, 0.1, 1.
    """
    if isinstance(domain, Categorical):
        return list(domain.categories)
    low, high = limits(domain)
    if is_log(domain):
        found = np.exp(np.linspace(math.log(low), math.log(high), count))
    else:
        found = np.linspace(low, high, count)
    return list(dict.fromkeys(snap(domain, float(value)) for value in found))


def describe(domain: Domain) -> str:
    """As it is written: "loguniform(0.05, 1)"."""
    if isinstance(domain, Categorical):
        return f"choice({json.dumps(domain.categories)})"
    sampler = domain.get_sampler()
    step = sampler.q if isinstance(sampler, Quantized) else None
    kind = ("int" if isinstance(domain, Integer) else "uniform", "log" if is_log(domain) else "")
    name = ("q" if step else "") + kind[1] + ("rand" if kind[0] == "int" else "") + kind[0]
    return f"{name}({', '.join(f'{v:.6g}' for v in (domain.lower, domain.upper, *([step] if step else [])))})"
