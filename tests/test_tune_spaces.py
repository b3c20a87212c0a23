"""Spaces: every recipe's own values lie in every range that fits it, and ranges are read without being evaluated."""

import json
import math
from pathlib import Path

import pytest
from ray import tune

import tune_spaces
from methods.base import Method
from orchestrator.component import ConfigError, resolve
from orchestrator.recipe import parse, shipped
from orchestrator.search.question import LADDER, bind, field_of, make_search, spaces
from orchestrator.stage import Stage
from tests.conftest import SMALL
from tune_spaces.space import OPTIONS, Space, cut, describe, draw, holds, is_log, limits, options, snap
from tune_spaces.space import parse as parse_range

SPACES = spaces()
IMAGES = [
    f"data.{name}=digits/{part}" for name, part in (("labelled", "train"), ("unlabelled", "train"), ("test", "test"))
]


def recipe_of(name):
    """A shipped recipe; those for one's own images read the digits."""
    text = shipped()[name]
    return parse(text, label=name, overrides=IMAGES if "labelled: null" in text else ())


RECIPES = {name: recipe_of(name) for name in shipped()}
SIZE = {name: len(recipe.nodes) for name, recipe in RECIPES.items()}
FITTING = [
    (name, space) for name, recipe in RECIPES.items() for space in SPACES if bind(SPACES[space], recipe)
]  # fmt: skip


SMALLEST = {space: min((n for n, s in FITTING if s == space), key=SIZE.__getitem__) for _, space in FITTING}
SMALLEST.pop("jigsaw")  # 30 orders need a grid of 3: a trial with another fails and says so


@pytest.mark.parametrize(("name", "space"), FITTING)
def test_the_default_of_a_shipped_recipe_lies_inside_every_range_that_fits_it(name, space):
    recipe = RECIPES[name]
    for parameter in bind(SPACES[space], recipe):
        assert holds(parameter.domain, parameter.default), (parameter.name, parameter.default, parameter.text)
        for place in parameter.places:
            if parameter.student:
                assert parameter.default == []
                continue
            node = next(node for node in recipe.nodes if place.startswith(f"{node.where}."))
            assert field_of(node, place.removeprefix(f"{node.where}.")) == (True, parameter.default)


@pytest.mark.parametrize("space", SPACES)
def test_every_field_of_a_space_exists_where_its_default_lies_in_the_range(space):
    """Also of the methods that no shipped recipe has."""
    for path in SPACES[space].methods:
        config = resolve(path, (Method,)).Config()
        for field, domain in SPACES[space].params.items():
            if field.startswith("method.") and field.count(".") == 1:
                value = getattr(config, field.removeprefix("method."))
                assert holds(domain, value), (field, value)


def test_a_range_that_left_its_default_out_would_be_found():
    narrow = Space(methods=("methods.simclr.SimCLR",), params={"method.temperature": tune.loguniform(0.6, 1.0)})
    (parameter,) = bind(narrow, RECIPES["quickstart"])
    assert parameter.default == 0.5 and not holds(parameter.domain, 0.5)


def test_the_issue_methods_and_pipelines_each_have_a_space():
    fields = {field for space in SPACES.values() for field in space.params}
    assert {"method.temperature", "method.min_confidence", "method.unlabelled_weight", "unlabelled_ratio"} <= fields
    assert {"Cluster.clusters", "PseudoLabel.min_confidence", "PseudoLabel.balance", LADDER} <= fields
    assert {"method.permutations", "method.grid", "optim.lr", "optim.weight_decay"} <= fields
    temperature = {m for s in SPACES.values() if "method.temperature" in s.params for m in s.methods}
    assert {"methods.simclr.SimCLR", "methods.pirl.PIRL", "methods.distillation.Distillation"} <= temperature


def test_every_range_of_a_space_has_its_reason_beside_it():
    for path in Path(tune_spaces.__path__[0]).glob("*.py"):
        if path.stem in ("__init__", "space"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        ranges = [line for line in lines if "tune." in line and '": tune.' in line]
        assert ranges and all("  # " in line for line in ranges), path.name


@pytest.mark.parametrize(("space", "name"), sorted(SMALLEST.items()))
def test_drawn_values_give_a_recipe_that_is_valid(space, name):
    search, _ = make_search(RECIPES[name], label=name, names=[space], stop="none")
    for seed in range(3):
        values = {p.name: draw(p.domain, seed, number) for number, p in enumerate(search.parameters)}
        assert all(holds(p.domain, values[p.name]) for p in search.parameters)
        changed = search.recipe(values)
        assert [node.name for node in changed.nodes] == [node.name for node in RECIPES[name].nodes]


def test_a_field_that_only_one_value_fits_is_left_as_it_is_and_said_so():
    """Distillation's soft labels take no smoothing."""
    search, lines = make_search(
        RECIPES["clusterfit-noise"], label="noise", names=["supervised"],
        metric="distilled.distilled_0.probe.linear_accuracy", stop="none",
    )  # fmt: skip
    smoothed = [place for p in search.parameters if "label_smoothing" in p.name for place in p.places]
    assert smoothed and not [place for place in smoothed if "distilled.each" in place]
    assert any("must be 0 with soft" in line for line in lines)


def test_places_with_equal_values_vary_together_and_others_on_their_own():
    found = bind(SPACES["optimiser"], RECIPES["quickstart"])
    rates = {p.default: p.places for p in found if p.name.endswith("lr")}
    assert rates[0.1] == ("stages.pretrain.optim.lr",)
    assert rates[0.05] == (
        "stages.baseline.optim.lr",
        "stages.teacher.optim.lr",
        "stages.students.stages.student.optim.lr",
    )
    assert len({p.name for p in found}) == len(found)


def test_a_weight_decay_of_zero_stays_off_and_a_ladder_stays_as_it_is():
    recipe = RECIPES["noisy-student-imagenet"]
    decays = [p for p in bind(SPACES["optimiser"], recipe) if "weight_decay" in p.name]
    assert decays and all("finetuned" not in place for p in decays for place in p.places)
    assert LADDER not in [p.name for p in bind(SPACES["noisy_student"], recipe)]
    assert LADDER in [p.name for p in bind(SPACES["noisy_student"], RECIPES["noisy-student"])]


def test_a_ladder_is_written_for_the_student_of_the_rounds():
    recipe = parse(SMALL)
    (ladder,) = [p for p in bind(SPACES["noisy_student"], recipe) if p.name == LADDER]
    assert ladder.value([{"method.dropout": 0.1}, {"method.dropout": 0.3}]) == [
        {"student.method.dropout": 0.1}, {"student.method.dropout": 0.3},
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "inside", "outside", "log"), [
    ("uniform(0, 1)", [0, 0.5, 1], [-0.1, 1.1, "x", True, None], False),
    ("loguniform(0.05, 1)", [0.05, 0.3, 1.0], [0.04, 0], True),
    ("quniform(0.5, 0.98, 0.01)", [0.5, 0.98], [0.99], False),
    ("randint(1, 4)", [1, 3], [0, 4, 1.5], False),
    ("lograndint(10, 1001)", [10, 1000], [9, 1001], True),
    ("qrandint(0, 10, 5)", [0, 10], [11], False),
    ("tune.choice(['none', 'limit'])", ["none"], ["replicate"], False),
    ("choice([[], [{'a': 1}]])", [[], [{"a": 1}]], [[{"a": 2}]], False),
])  # fmt: skip
def test_a_range_holds_what_ray_tune_can_draw_from_it(text, inside, outside, log):
    domain = parse_range(text)
    assert [holds(domain, value) for value in inside] == [True] * len(inside)
    assert [holds(domain, value) for value in outside] == [False] * len(outside)
    drawn = [draw(domain, seed) for seed in range(200)]
    assert all(holds(domain, value) for value in drawn)
    if options(domain) is None:
        assert is_log(domain) is log
        assert parse_range(describe(domain)).domain_str == domain.domain_str
        assert min(drawn) < max(drawn)


@pytest.mark.parametrize("text", [
    "__import__('os').system('true')", "loguniform(open('x'), 1)", "lambda: 1", "choice([print('x'), 1])",
    "os.getcwd()",
    "tune.__class__(1)", "sample_from(1)", "loguniform", "loguniform(0.05, 1, base=10)", "1 + 1", "choice([*x])", "",
    "getattr(tune, 'choice')([1, 2])", "tune.tune.choice([1, 2])",
])  # fmt: skip
def test_a_range_is_read_and_never_evaluated(text, capfd):
    with pytest.raises(ValueError):
        parse_range(text)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("text", "said"), [
    ("loguniform(1, 0.05)", "0 < low < high"), ("loguniform(0, 1)", "0 < low < high"), ("uniform(1, 1)", "low < high"),
    ("quniform(0, 1)", "quniform takes 3 values, found 2"), ("randint(1.5, 3)", "whole numbers"),
    ("choice([1])", "two or more"), ("uniform('a', 'b')", "must be numbers"), ("gauss(0, 1)", "gauss is none of"),
])  # fmt: skip
def test_a_wrong_range_says_what_is_wrong(text, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        parse_range(text)


def test_a_range_is_cut_at_its_ends_and_evenly_on_its_own_scale():
    assert cut(parse_range("loguniform(0.01, 1)"), 3) == [0.01, 0.1, 1.0]
    assert cut(parse_range("uniform(0, 1)"), 5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert cut(parse_range("randint(1, 4)"), 9) == [1, 2, 3]
    assert cut(parse_range("choice(['a', 'b'])"), 9) == ["a", "b"]
    clusters = cut(parse_range("lograndint(10, 1001)"), 12)
    assert clusters[0] == 10 and clusters[-1] == 1000 and len(clusters) == 12
    steps = [math.log(b / a) for a, b in zip(clusters, clusters[1:], strict=False)]
    assert max(steps) - min(steps) < 0.1


def test_a_value_that_optuna_proposes_between_the_steps_is_moved_onto_one():
    domain = parse_range("qloguniform(1, 10, 0.5)")
    assert snap(domain, 3.26) == 3.5 and snap(domain, 99.0) == 10.0
    assert snap(parse_range("qrandint(0, 10, 5)"), 7.6) == 10
    assert limits(parse_range("randint(1, 4)")) == (1, 3)


def test_every_function_of_ray_tune_that_is_known_can_be_written_and_described():
    values = {"choice": "(['a', 'b'])", **{name: "(1, 9)" for name, n in OPTIONS.items() if n == 2}}
    for name in OPTIONS:
        domain = parse_range(name + values.get(name, "(1, 9, 1)"))
        assert json.dumps(describe(domain)) and describe(parse_range(describe(domain))) == describe(domain)


def test_a_space_names_methods_that_can_be_imported():
    for name, space in SPACES.items():
        for path in space.methods:
            try:
                assert issubclass(resolve(path, (Method,)), Method)
            except ConfigError as error:
                pytest.fail(f"{name}: {error}")
    assert issubclass(resolve("orchestrator.stages.cluster.Cluster", (Stage,)), Stage)
