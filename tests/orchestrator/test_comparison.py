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
from orchestrator.stages.compare import Compare
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

    def test_two_scores_of_one_arm_are_two_and_not_one_with_more_seeds(self):
        assert short_names(["a.x.probe", "a.x.last", "a.y.probe"]) == {
            "a.x.probe": "a.x.probe", "a.x.last": "a.x.last", "a.y.probe": "y",
        }  # fmt: skip

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
            ("stages.arms.each.simclr={1: 2}", "1 leads nowhere in stages"),
            ("stages.arms.only=[[]]", "[] is no arm; arms are random, supervised, simclr"),
            ("stages.arms.only=[null]", "None is no arm; arms are random, supervised, simclr"),
            ("stages.arms.each={simclr: null}", "1 error, nothing was run\n  stages.arms.each  no arm is left"),
            ("stages.comparison.inputs.scores=[]", "inputs.scores  []: must be the name of a split or stage"),
        ],
    )
    def test_a_mistake_in_arms_names_its_place(self, override, expected):
        assert expected in problems(override)

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("stages.comparison.claims=[[simclar, random]]", "did you mean simclr"),
            ("stages.comparison.protocol=linear", "does not score by it, but by knn, layers"),
            ("stages.comparison.inputs.scores=[arms.probe, arms.simclr.probe]", "arms.simclr.probe is listed 2 times"),
        ],
    )
    def test_a_claim_or_protocol_that_no_arm_has_is_told_before_anything_runs(self, override, expected, tmp_path):
        with pytest.raises(UserError, match=expected):
            prepare(parse(ARMS, overrides=[override]), tmp_path / "store", label="arms")


NUMBERED = "50: {}\n      100: {pretrain.steps: 5}"
SWEEP = ARMS.replace("simclr: {}", NUMBERED).replace("[supervised, simclr]", "[50, 100]")


class TestNames:
    @pytest.mark.parametrize(("name", "other"), [
        ("lr0.1", "lr0_1"), ("0.1", "v0_1"), ("'0.1'", "v0_1"), ("a/b", "a_b"), ("../up", "up"), ("-0.5", "v-0_5"),
        ("1.0e-5", "v1e-05"), ("..", "a"),
    ])  # fmt: skip
    def test_an_arm_whose_name_would_divide_is_refused_with_one_that_does_not(self, name, other):
        with pytest.raises(UserError) as caught:
            parse(ARMS.replace("      simclr: {}", f"      simclr: {{}}\n      {name}: {{pretrain.steps: 2}}"))
        first, line = str(caught.value).splitlines()
        assert "1 error" in first and line.startswith("  stages.arms.each  ") and line.endswith(f"; call it {other}")

    @pytest.mark.parametrize("name", ["on", "null", "2024-01-01", '""', '"a\\tb"'])
    def test_an_arm_whose_name_is_no_plain_text_is_refused(self, name):
        with pytest.raises(UserError, match=r"1 error.*\n  stages\.arms\.each  .*(in quotes|plain text)"):
            parse(ARMS.replace("      simclr: {}", f"      simclr: {{}}\n      {name}: {{pretrain.steps: 2}}"))

    def test_arms_of_a_sweep_may_be_numbers(self):
        recipe = parse(SWEEP, overrides=["stages.arms.each.50.pretrain.method.temperature=0.2"])
        assert recipe.node("comparison").inputs["scores"][2:] == ("arms.50.probe", "arms.100.probe")
        assert recipe.node("comparison").stage.claims == (("50", "100"),)
        assert recipe.node("arms.100.pretrain").stage.steps == 5
        assert recipe.node("arms.50.pretrain").stage.method.config.temperature == 0.2
        assert parse(recipe.text).nodes == recipe.nodes

    @pytest.mark.parametrize("only", ["[50, random]", "['50', random]"])
    def test_numbered_arms_can_be_chosen(self, only):
        recipe = parse(SWEEP, overrides=[f"stages.arms.only={only}"])
        assert {node.name.split(".")[1] for node in recipe.nodes if "." in node.name} == {"50", "random"}
        assert recipe.node("comparison").stage.claims == ()

    @pytest.mark.parametrize("only", ["[51]", "['51']"])
    def test_a_number_that_is_no_arm_is_refused(self, only):
        told = r"1 error.*\n  stages.arms.only  51 is no arm; arms are random, supervised, 50, 100"
        with pytest.raises(UserError, match=told):
            parse(SWEEP, overrides=[f"stages.arms.only={only}"])

    def test_a_misspelt_claim_is_refused_though_arms_are_left_out(self, tmp_path):
        claims = "stages.comparison.claims=[[simclar, random], [supervised, random]]"
        recipe = parse(ARMS, overrides=["stages.arms.only=[random, simclr]", claims])
        assert recipe.node("comparison").stage.claims == (("simclar", "random"),)
        with pytest.raises(UserError, match="simclar is no arm; did you mean simclr?"):
            prepare(recipe, tmp_path / "store", label="arms")

    def test_arms_left_out_of_one_group_keep_the_claims_about_another(self):
        second = ARMS[ARMS.index("    each:") : ARMS.index("  comparison:")]
        third = ARMS[ARMS.index("    use: orchestrator.stages.compare") :].replace("arms.", "more.")
        few = ["stages.arms.only=[random, supervised]"]
        recipe = parse(f"{ARMS}  more:\n{second}  further:\n{third}", overrides=few)
        assert recipe.node("comparison").stage.claims == ()
        assert recipe.node("further").stage.claims == (("supervised", "simclr"),)


class TestTwins:
    @pytest.mark.parametrize(
        ("twin", "told"),
        [
            ("{}", "simclr and twin are the same training: change one or leave it out"),
            ("{pretrain.steps: 3}", "simclr and twin are the same training"),
            ("{pretrain.method: {use: methods.simclr.SimCLR, flip: false, temperature: 0.5}}", "simclr and twin are"),
            ("{pretrain.steps: 0}", "random and twin are the same training"),
        ],
    )
    def test_arms_that_are_the_same_training_are_refused_before_anything_runs(self, twin, told, tmp_path):
        recipe = parse(ARMS, overrides=[f"stages.arms.each.twin={twin}"])
        with pytest.raises(UserError) as caught:
            prepare(recipe, tmp_path / "store", label="arms")
        first, line = str(caught.value).splitlines()
        assert "1 error" in first and line.startswith("  stages.comparison.inputs.scores  ") and told in line

    def test_arms_that_differ_anywhere_are_planned(self, tmp_path):
        recipe = parse(ARMS, overrides=["stages.arms.each.twin={pretrain.steps: 4}"])
        assert len(prepare(recipe, tmp_path / "store", label="arms").plans[0].stages) == 9

    def test_three_of_a_kind_are_one_line(self):
        keys = {"g.a.probe": "1", "g.b.probe": "2", "g.c.probe": "1", "g.d.probe": "1"}
        assert [message for _, message in Compare.same(keys)] == [
            "a, c and d are the same training: change one or leave it out"
        ]


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
