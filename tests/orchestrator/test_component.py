"""What of a configuration enters a key."""

from dataclasses import dataclass, field

from orchestrator.component import Component, chosen, to_plain
from orchestrator.plan import make_plan
from orchestrator.recipe import parse
from orchestrator.run import prepare


@dataclass(frozen=True)
class Inner:
    size: int = 3
    names: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Outer:
    rate: float
    inner: Inner = Inner()
    maybe: Inner | None = None
    made: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Later(Outer):
    """Outer, after somebody added an option."""

    added: bool = False


def test_defaults_enter_no_key_and_what_has_none_always_does():
    assert chosen(Outer(rate=1.0)) == {"rate": 1.0}
    assert to_plain(Outer(rate=1.0))["inner"] == {"size": 3, "names": ["a", "b"]}


def test_what_differs_enters_and_only_that():
    config = Outer(rate=1.0, inner=Inner(size=4), maybe=Inner(), made={"x": 1})
    assert chosen(config) == {"rate": 1.0, "inner": {"size": 4}, "maybe": {}, "made": {"x": 1}}


def test_an_option_that_is_added_with_a_default_leaves_answers_valid():
    assert chosen(Later(rate=1.0, inner=Inner(size=4))) == chosen(Outer(rate=1.0, inner=Inner(size=4)))
    assert chosen(Later(rate=1.0, added=True)) != chosen(Outer(rate=1.0))


def test_a_component_keeps_its_class():
    assert chosen(Component("a.B", Outer(rate=2.0))) == {"use": "a.B", "rate": 2.0}


def test_a_default_written_out_is_the_same_question(small, tmp_path):
    def keys(*overrides):
        prepared = prepare(parse(small, overrides=overrides), tmp_path / "store", label="small")
        plan = make_plan(prepared.recipe, prepared.data[0], 0, "small")
        return [stage.key for stage in plan.stages]

    assert keys("stages.pretrain.method.temperature=0.5") == keys()
    assert keys("stages.pretrain.method.temperature=0.6") != keys()
