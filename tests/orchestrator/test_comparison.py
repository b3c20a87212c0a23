"""Arms, their one table, and the rule by which one is better."""

import json
import math
import statistics

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.comparison import combine, exceeds, finding, share_interval, short_names, t_interval
from orchestrator.errors import UserError
from orchestrator.recipe import load, parse
from orchestrator.report.html import write_report
from orchestrator.run import execute, prepare
from orchestrator.store import Store

pytestmark = pytest.mark.usefixtures("untracked")

ARMS = """
name: arms
data:
  pixels: 16
  include_labelled: true
  labelled: {from: digits/train, per_class: 3}
  train: {from: digits/train, labels: false}
  test: digits/test
resources: {threads: 1}
stages:
  arms:
    each:
      random: {pretrain.steps: 0}
      supervised:
        pretrain.method: {use: methods.supervised.Supervised, augment: {flip: false}}
        pretrain.inputs: {labelled: labelled}
      simclr: {}
    stages:
      pretrain:
        use: orchestrator.stages.train.Train
        inputs: {images: train}
        encoder: {use: methods.encoders.SmallCNN, width: 0.25}
        method: {use: methods.simclr.SimCLR, flip: false}
        optim: {lr: 0.1}
        steps: 3
        batch: 16
      probe:
        use: orchestrator.stages.probe.Probe
        inputs: {model: pretrain, labelled: labelled, images: test}
        protocols: [knn, layers]
  comparison:
    use: orchestrator.stages.compare.Compare
    inputs: {scores: arms.probe, random: arms.random.probe, supervised: arms.supervised.probe}
    protocol: knn
    claims: [[supervised, simclr]]
"""


def problems(*overrides):
    with pytest.raises(UserError) as caught:
        parse(ARMS, label="arms.yaml", overrides=overrides)
    return str(caught.value)


class TestRule:
    def test_a_difference_must_exceed_twice_its_standard_error(self):
        difference, needed, holds = exceeds((3, 4, 5), (0, 1, 2))
        assert difference == 3 and needed == pytest.approx(1.632993, abs=1e-6) and holds
        assert exceeds((0.5, 0.7, 0.9), (0.4, 0.6, 0.8))[2] is False

    @pytest.mark.parametrize(
        ("difference", "says"), [(1.1, "better"), (1.0, "not shown"), (-1.0, "not shown"), (-1.1, "worse")]
    )
    def test_what_exceeds_the_rule_downwards_is_worse_and_not_merely_not_shown(self, difference, says):
        assert finding(difference, needed=1.0) == says

    @pytest.mark.parametrize("n", [2, 3, 10, 11, 12, 13, 40])
    def test_an_interval_over_seeds_is_students_and_never_narrower(self, n):
        values = [0.3 + 0.01 * place for place in range(n)]
        low, high = t_interval(values)
        exact = scipy.stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
        assert (low + high) / 2 == pytest.approx(statistics.fmean(values))
        assert -1e-3 < (high - low) / 2 / exact - 1 < (1e-3 if n <= 12 else 0.1)

    def test_an_interval_of_shares_stays_among_them(self):
        assert t_interval((0.01, 0.02, 0.03)) == pytest.approx((-0.0048, 0.0448), abs=1e-4)
        assert share_interval((0.01, 0.02, 0.03))[0] == 0.0 and share_interval((0.97, 0.98, 0.99))[1] == 1.0

    def test_one_seed_decides_nothing(self):
        assert exceeds((1.0,), (0.0,)) == (1.0, None, None)

    @given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
    def test_nothing_is_better_than_itself(self, values):
        assert exceeds(values, values)[2] is False

    def test_arms_are_named_without_their_group_unless_two_groups_share_the_name(self):
        assert short_names(["arms.rotation.probe", "more.k50.probe", "final"]) == {
            "arms.rotation.probe": "rotation", "more.k50.probe": "k50", "final": "final",
        }  # fmt: skip
        assert set(short_names(["a.x.probe", "b.x.probe"]).values()) == {"a.x", "b.x"}

    def test_seeds_are_joined_by_the_names_of_arms_and_not_by_keys(self):
        score = {"protocol": "knn", "metric": "accuracy", "low": 0.0, "high": 1.0, "n": 9}
        seeds = [
            ({"arms": [{"key": f"{seed}{arm}", "scores": [{**score, "value": value + seed}]} for arm, value in
                       (("a", 0.1), ("b", 0.3))], "claims": [["b", "a"]], "protocol": "knn", "random": f"{seed}a",
              "supervised": None}, {f"{seed}a": "g.a.probe", f"{seed}b": "g.b.probe"})
            for seed in (0, 1)
        ]  # fmt: skip
        found = combine(seeds)
        assert found.arms == ["b", "a"] and found.anchors == {"random": "a"}
        assert found.of("b").values == (0.3, 1.3) and found.of("b").deviation == pytest.approx(0.5**0.5)
        assert [test[:2] for test in found.tests()] == [("b", "a")]  # claimed and by rule: told once


class TestLayout:
    def test_every_arm_has_every_stage_with_its_own_overrides(self):
        recipe = parse(ARMS)
        assert [node.name for node in recipe.nodes] == [
            *(f"arms.{arm}.{stage}" for arm in ("random", "supervised", "simclr") for stage in ("pretrain", "probe")),
            "comparison",
        ]
        assert recipe.node("arms.random.pretrain").stage.steps == 0
        assert recipe.node("arms.simclr.pretrain").stage.steps == 3
        assert recipe.node("arms.supervised.probe").inputs["model"] == ("arms.supervised.pretrain",)
        assert recipe.node("comparison").inputs["scores"] == tuple(
            f"arms.{arm}.probe" for arm in ("random", "supervised", "simclr")
        )

    def test_arms_can_be_chosen_and_dropped(self):
        chosen = parse(ARMS, overrides=["stages.arms.only=[random, simclr]"])
        assert {node.name.split(".")[1] for node in chosen.nodes if "." in node.name} == {"random", "simclr"}
        comparison = chosen.node("comparison")  # claims about arms that are not there go with them, and so do anchors
        assert comparison.stage.claims == () and set(comparison.inputs) == {"scores", "random"}
        dropped = parse(ARMS, overrides=["stages.arms.each.simclr=null"])
        assert not any("simclr" in node.name for node in dropped.nodes)

    def test_an_override_reaches_into_an_arm(self):
        each = "stages.arms.each"
        changed = parse(ARMS, overrides=[f"{each}.simclr.pretrain.method.temperature=0.2",
                                         f"{each}.supervised.pretrain.method.label_smoothing=0.3",
                                         f"{each}.random.pretrain.steps=1"])  # fmt: skip
        simclr, supervised = (changed.node(f"arms.{arm}.pretrain").stage.method for arm in ("simclr", "supervised"))
        assert (simclr.config.temperature, simclr.config.flip) == (0.2, False)
        assert (supervised.config.label_smoothing, supervised.config.augment.flip) == (0.3, False)
        assert changed.node("arms.random.pretrain").stage.steps == 1
        assert changed.node("arms.supervised.pretrain").stage.steps == 3

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("stages.arms.each.simclr.pretrian.steps=1", "leads nowhere in stages; did you mean pretrain?"),
            ("stages.arms.each.simclr.pretrain.stesp=1", "did you mean steps"),
            ("stages.arms.only=[simclar]", "did you mean simclr"),
            ("stages.arms.each.random={pretrian.steps: 0}", "pretrian.steps leads nowhere"),
            ("stages.arms.each={}", "must map the name of each arm"),
            ("stages.arms.eech=1", "did you mean each"),
            ("stages.arms.each.random={pretrain.steps: -1}", "stages.arms.each.random.pretrain"),
        ],
    )
    def test_a_mistake_in_arms_names_its_place(self, override, expected):
        assert expected in problems(override)

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("stages.comparison.claims=[[simclar, random]]", "did you mean simclr"),
            ("stages.comparison.protocol=linear", "does not score by it, but by knn, layers"),
        ],
    )
    def test_a_claim_or_protocol_that_no_arm_has_is_told_before_anything_runs(self, override, expected, tmp_path):
        with pytest.raises(UserError, match=expected):
            prepare(parse(ARMS, overrides=[override]), tmp_path / "store", label="arms")


def test_a_comparison_over_two_seeds_is_told_shown_and_stored(tmp_path):
    prepared = prepare(parse(ARMS, overrides=["seeds=2"]), tmp_path / "store", label="arms")
    result = execute(prepared, use_ray=False)
    found = result.json()["comparison"]
    json.dumps(found)
    assert found["seeds"] == 2 and found["anchors"] == {"random": "random", "supervised": "supervised"}
    by_arm = {(s["arm"], s["protocol"], s["tap"]): s for s in found["arms"]}
    assert {arm for arm, _, _ in by_arm} == {"random", "supervised", "simclr"}
    assert [tap for arm, protocol, tap in by_arm if arm == "random" and protocol == "layers"] == [
        "c1", "c2", "c3", "c4", "gap",
    ]  # fmt: skip
    assert all(len(score["values"]) == 2 and score["n"] == 360 for score in by_arm.values())
    assert {(c["better"], c["worse"]) for c in found["claims"]} == {("simclr", "random"), ("supervised", "simclr")}
    page = write_report(Store.open(tmp_path / "store"), prepared.folder).read_text(encoding="utf-8")
    assert "Which method&#39;s features are best?" in page and "anchors are dashed" in page
    assert not (tmp_path / "store" / "features").exists()  # a cache, gone with the run


def test_untrained_weights_differ_between_seeds_and_are_set_on_clean_images(tmp_path):
    few = ["stages.arms.stages.probe.protocols=[knn]", "stages.arms.only=[random]"]
    prepared = prepare(parse(ARMS, overrides=["seeds=2", *few]), tmp_path / "store", label="arms")
    execute(prepared, use_ray=False)
    store = Store.open(tmp_path / "store")
    first, second = (store.open_artifact(plan.key("arms.random.pretrain")).state() for plan in prepared.plans)
    assert (first["encoder.blocks.c1.0.weight"] != second["encoder.blocks.c1.0.weight"]).any()
    assert first["encoder.blocks.c1.1.running_var"].ne(1).all()  # as they are drawn, they would be 1


TINY = (
    "data.pixels=16", "data.labelled.from=digits/train", "data.labelled.per_class=1",
    "data.unlabelled.from=digits/train", "data.test=digits/test", "resources.threads=1",
    "stages.arms.stages.model.encoder.width=0.25", "stages.rounds.stages.model.encoder.width=0.25",
    "stages.arms.stages.model.steps=4", "stages.rounds.stages.model.steps=4",
)  # fmt: skip


@pytest.mark.slow
def test_every_semi_supervised_arm_learns_from_one_labelled_image_a_class(tmp_path):
    recipe = load("compare-selftraining", TINY)
    prepared = prepare(recipe, tmp_path, label="compare-selftraining")
    result = execute(prepared, use_ray=False)
    assert {stage["state"] for stage in result.stages} == {"ran"}
    assert {arm["arm"] for arm in result.comparison["arms"]} == {
        "supervised", "pseudo_labelling", "pi_model", "mean_teacher", "vat", "mixmatch", "uda", "remixmatch",
        "fixmatch", "fixmatch_cta", "noisy_student",
    }  # fmt: skip
    assert all(0 <= arm["mean"] <= 1 and arm["n"] == 360 for arm in result.comparison["arms"])
