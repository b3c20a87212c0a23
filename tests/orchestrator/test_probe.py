"""What each protocol of a probe says of features that are made for it."""

import json

import pytest
import torch

from orchestrator.artifacts import Scores
from orchestrator.context import Context
from orchestrator.errors import UserError
from orchestrator.recipe import parse
from orchestrator.report.html import write_report
from orchestrator.run import execute, prepare
from orchestrator.store import Store

pytestmark = pytest.mark.usefixtures("untracked")

RECIPE = """
name: probes
data:
  pixels: 16
  labelled: {from: digits/train, per_class: 6}
  unlabelled: {from: digits/train, labels: false}
  test: digits/test
resources: {threads: 1}
stages:
  model:
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled}
    encoder: {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.supervised.Supervised}
    optim: {lr: 0.05}
    steps: 3
    batch: 16
  probe:
    use: orchestrator.stages.probe.Probe
    inputs: {model: model, labelled: labelled, images: test}
    protocols: [classifier, knn, linear, layers, retrieval, clusters, svm]
"""


@pytest.fixture(scope="module")
def perfect(untracked, tmp_path_factory):
    """Scores of a model whose features are the images' classes, with a little noise."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:

        def features(images):
            noise = torch.randn(len(images), 10, generator=torch.Generator().manual_seed(0))
            return torch.eye(10)[torch.from_numpy(images.label)] + 0.01 * noise

        patch.setattr(Context, "extract", lambda self, model, images: features(images))
        patch.setattr(Context, "extract_taps", lambda self, model, images: {"gap": features(images)})
        patch.setattr(Context, "predict", lambda self, model, images: features(images))
        prepared = prepare(parse(RECIPE), root / "store", label="probes")
        execute(prepared, use_ray=False)
        store = Store.open(root / "store")
        scores = store.open_artifact(prepared.plans[0].key("probe"))
        assert isinstance(scores, Scores)
        return store, prepared, scores


@pytest.mark.parametrize(
    ("protocol", "metric"),
    [("classifier", "accuracy"), ("knn", "accuracy"), ("linear", "accuracy"), ("layers", "accuracy"),
     ("retrieval", "precision@10"), ("retrieval", "mAP"), ("clusters", "NMI"), ("clusters", "ARI"),
     ("clusters", "purity"), ("svm", "mAP")],
)  # fmt: skip
def test_features_that_are_the_classes_score_one(perfect, protocol, metric):
    (score,) = [s for s in perfect[2].scores() if (s["protocol"], s["metric"]) == (protocol, metric)]
    assert score["value"] == pytest.approx(1, abs=1e-6) and score["n"] == 360
    assert 0.98 < score["low"] <= score["value"] + 1e-6 <= score["high"] + 2e-6


def test_every_query_of_the_figure_finds_its_class_and_never_itself(perfect):
    rows = perfect[2].neighbours()
    assert len(rows) == 6
    for row in rows:
        assert all(near["label"] == row["query"]["label"] for near in row["nearest"])
        assert row["query"]["id"] not in [near["id"] for near in row["nearest"]]


def test_the_report_shows_queries_with_their_neighbours(perfect):
    store, prepared, _ = perfect
    page = write_report(store, prepared.folder).read_text(encoding="utf-8")
    assert "nearest neighbours after them" in page and page.count("✓") >= 36


def test_features_are_extracted_once_for_all_stages_of_a_run(tmp_path, monkeypatch):
    asked = []
    whole = Context._forward

    def counted(self, checkpoint, images, verb):
        asked.append((verb, len(images)))
        return whole(self, checkpoint, images, verb)

    monkeypatch.setattr(Context, "_forward", counted)
    again = RECIPE + RECIPE[RECIPE.index("  probe:") :].replace("  probe:", "  again:").replace(
        "[classifier, knn, linear, layers, retrieval, clusters, svm]", "[knn]"
    )
    execute(prepare(parse(again, overrides=["stages.probe.protocols=[knn, retrieval, clusters]"]),
                    tmp_path / "store", label="probes"), use_ray=False)  # fmt: skip
    assert sorted(asked) == [("features", 60), ("features", 360)]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.probe.inputs.images=null", "missing: svm needs other images"),
        ("stages.probe.protocols=[]", "name at least one"),
        ("stages.probe.protocols=[liner]", "stages.probe.protocols"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused_before_anything_runs(tmp_path, override, expected):
    with pytest.raises(UserError, match="nothing was run") as caught:
        prepare(parse(RECIPE, overrides=[override]), tmp_path / "store", label="probes")
    assert expected in str(caught.value)


def test_scores_without_a_figure_have_no_neighbours(tmp_path):
    scores = Scores.write(tmp_path, [{"protocol": "knn", "metric": "accuracy", "value": 0.5}])
    assert scores.neighbours() == [] and json.loads((tmp_path / "scores.json").read_text())[0]["value"] == 0.5
