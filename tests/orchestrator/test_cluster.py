"""From a teacher's features to a student of their clusters, in one process."""

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import adjusted_rand_score
from sklearn.svm import LinearSVC

from methods.metrics import mean_average_precision
from orchestrator import svm
from orchestrator.artifacts import Labels
from orchestrator.errors import UserError
from orchestrator.recipe import parse
from orchestrator.run import execute, prepare
from orchestrator.stages.cluster import Cluster
from orchestrator.svm import COSTS, svm_map

pytestmark = pytest.mark.usefixtures("untracked")

CLUSTERS = 6


def recipe_of(small, **changes):
    """SMALL's pretraining, its clusters, and a narrower student of them."""
    recipe = yaml.safe_load(small)
    pretrain = recipe["stages"]["pretrain"]
    pretrain["encoder"] = {**pretrain["encoder"], "width": 0.5}
    student = {
        "use": pretrain["use"], "inputs": {"images": "unlabelled", "labels": "clusters"},
        "encoder": {**pretrain["encoder"], "width": 0.25},
        "method": {"use": "methods.supervised.Supervised", "augment": {"flip": False, "padding": 1}},
        "optim": {"lr": 0.05}, "steps": 5, "batch": 16,
    }  # fmt: skip
    recipe["stages"] = {
        "pretrain": pretrain,
        "clusters": {"use": "orchestrator.stages.cluster.Cluster", "clusters": CLUSTERS, "restarts": 2,
                     "inputs": {"teacher": "pretrain", "images": "unlabelled"}, **changes},
        "student": student,
        "fresh": {**student, "encoder": pretrain["encoder"], "steps": 0},
    }  # fmt: skip
    return yaml.safe_dump(recipe, sort_keys=False)


def run(text, root, *overrides):
    prepared = prepare(parse(text, overrides=overrides), root, label="clusters")
    result = execute(prepared, use_ray=False)
    stages = {stage["name"]: stage for stage in result.stages}
    return stages, {name: prepared.store.open_artifact(stage["key"]) for name, stage in stages.items()}


@pytest.fixture(scope="module")
def first(untracked, tmp_path_factory):
    from tests.conftest import SMALL

    root = tmp_path_factory.mktemp("clusters")
    return root, *run(recipe_of(SMALL), root)


class TestCluster:
    def test_every_image_has_a_cluster_and_the_facts_count_them(self, first):
        _, _, answers = first
        labels = answers["clusters"]
        assert isinstance(labels, Labels) and labels.classes == tuple(f"cluster {k}" for k in range(CLUSTERS))
        table, facts = labels.table(), labels.facts
        sizes = np.bincount(table["class"].to_numpy(), minlength=CLUSTERS)
        assert facts["clusters"] == CLUSTERS and facts["images"] == len(table) == sizes.sum()
        assert (facts["sizes_min"], facts["sizes_max"]) == (sizes.min(), sizes.max()) and sizes.min() > 0
        assert facts["sizes_median"] == np.median(sizes)
        assert facts["teacher"] == answers["pretrain"].key and facts["inertia"] > 0 and facts["refilled"] >= 0
        assert table["name"].to_pylist() == [f"cluster {k}" for k in table["class"].to_pylist()]
        assert table["copies"].to_pylist() == [1] * len(table) == table["confidence"].to_pylist()
        for column in ("probabilities", "margin", "entropy", "changed"):
            assert table[column].null_count == len(table)

    def test_the_rows_are_the_images_of_the_split_in_order(self, first, small):
        root, _, answers = first
        images = prepare(parse(recipe_of(small)), root, label="clusters").plans[0].images["unlabelled"]
        assert answers["clusters"].table()["id"].to_pylist() == images.ids.tolist()

    def test_a_student_tells_the_clusters_apart_and_shares_nothing_with_its_teacher(self, first):
        _, _, answers = first
        teacher, student = answers["pretrain"], answers["student"]
        assert student.classes == answers["clusters"].classes
        theirs, own = teacher.build(), student.build()
        assert sum(p.numel() for p in own.encoder.parameters()) < sum(p.numel() for p in theirs.encoder.parameters())
        assert not {p.data_ptr() for p in own.parameters()} & {p.data_ptr() for p in theirs.parameters()}
        assert own.logits(torch.rand(2, 3, 16, 16)).shape == (2, CLUSTERS)

    def test_a_student_of_the_same_size_starts_from_other_weights(self, first):
        _, _, answers = first
        theirs, own = answers["pretrain"].state(), answers["fresh"].state()
        drawn = [name for name in own if name.startswith("encoder.") and name.endswith("weight") and own[name].ndim > 1]
        assert len(drawn) >= 4 and not [name for name in drawn if torch.equal(own[name], theirs[name])]

    def test_another_student_leaves_the_clusters_as_they_are_stored(self, first, small):
        root, before, _ = first
        after, _ = run(recipe_of(small), root, "stages.student.optim.lr=0.06")
        assert after["student"]["state"] == "ran" and after["clusters"]["state"] == "stored"
        assert after["clusters"]["digest"] == before["clusters"]["digest"]

    def test_the_same_recipe_gives_the_same_clusters_in_another_store(self, first, small, tmp_path):
        after, _ = run(recipe_of(small), tmp_path)
        assert {n: s["digest"] for n, s in after.items()} == {n: s["digest"] for n, s in first[1].items()}

    def test_lengths_of_features_matter_only_where_they_are_asked_for(self, first, small):
        root, _, answers = first
        _, other = run(recipe_of(small, normalise=False), root)
        a, b = (found["clusters"].table()["class"].to_numpy() for found in (answers, other))
        assert adjusted_rand_score(a, b) < 1

    def test_more_clusters_than_images_are_refused_with_both_numbers_before_anything_runs(self, small, tmp_path):
        with pytest.raises(UserError, match=r"stages\.clusters\.clusters +99999 of \d+ images: give at most \d+"):
            prepare(parse(recipe_of(small, clusters=99999), label="r.yaml"), tmp_path, label="clusters")

    @pytest.mark.parametrize("field", ["clusters", "iterations", "restarts"])
    def test_nothing_is_done_no_times(self, field):
        with pytest.raises(ValueError, match=f"{field} = 0: must be > 0"):
            Cluster(**{"clusters": 3, field: 0})

    def test_the_clusters_of_a_method_that_learns_from_probabilities_are_refused(self, small, tmp_path):
        recipe = yaml.safe_load(recipe_of(small))
        recipe["stages"]["student"]["method"] = {"use": "methods.noisy_student.NoisyStudent"}
        recipe["stages"]["student"]["inputs"]["labelled"] = "labelled"
        with pytest.raises(UserError, match="are not of the data's classes"):
            prepare(parse(yaml.safe_dump(recipe, sort_keys=False), label="r.yaml"), tmp_path, label="clusters")


def scene(seed, count, classes=4, dim=12, noise=0.7):
    """Rows that hold some of several classes, each a direction, as an image holds objects."""
    rng = torch.Generator().manual_seed(seed)
    present = (torch.rand(count, classes, generator=rng) < 0.3).long()
    direction = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(9))).Q[:classes]
    return present.float() @ direction * 2 + noise * torch.randn(count, dim, generator=rng), present


class TestSVM:
    def test_directions_of_classes_are_found_and_noise_is_not(self):
        train, targets = scene(0, 150)
        test, wanted = scene(1, 200)
        found = svm_map(train, targets, test, wanted, costs=(0.1, 1.0, 10.0))
        assert found["value"] > 0.9 and (found["n"], found["labelled"]) == (200, 150)
        assert found["value"] == pytest.approx(sum(found["by_class"]) / 4) and set(found["costs"]) <= {0.1, 1.0, 10.0}
        rng = torch.Generator().manual_seed(2)
        chance = svm_map(torch.randn(150, 12, generator=rng), targets, torch.randn(200, 12, generator=rng), wanted,
                         costs=(0.1, 1.0))  # fmt: skip
        assert chance["value"] < 0.5

    def test_with_one_cost_it_is_scikit_learns_classifier_on_rows_of_length_one(self):
        train, targets = scene(0, 80, classes=2)
        test, wanted = scene(1, 60, classes=2)
        found = svm_map(train * 9, targets, test / 9, wanted, costs=(2.0,))

        def unit(x):
            return (x / (x.norm(dim=1, keepdim=True) + 1e-5)).numpy()

        scores = [
            LinearSVC(C=2.0, class_weight={0: 1, 1: 2}, max_iter=2000, tol=1e-4, dual=True, random_state=0)
            .fit(unit(train * 9), targets[:, k].numpy()).decision_function(unit(test / 9)) for k in range(2)
        ]  # fmt: skip
        expected, by_class = mean_average_precision(torch.from_numpy(np.stack(scores, axis=1)), wanted)
        assert found["value"] == pytest.approx(expected, abs=1e-9) and found["by_class"] == pytest.approx(by_class)

    def test_a_difficult_row_counts_as_absent_in_training_and_not_at_all_in_the_test(self):
        train, targets = scene(0, 80, classes=2)
        test, wanted = scene(1, 60, classes=2)
        hard = targets.masked_fill(targets == 0, -1)
        one, two = (svm_map(train, t, test, wanted, costs=(1.0,)) for t in (targets, hard))
        assert one == two
        marked = wanted.clone()
        marked[:20, 0] = -1
        kept = svm_map(train, targets, test[20:], wanted[20:], costs=(1.0,))
        found = svm_map(train, targets, test, marked, costs=(1.0,))
        assert found["by_class"][0] == pytest.approx(kept["by_class"][0])

    def test_each_class_takes_the_cost_of_the_best_cross_validated_precision(self, monkeypatch):
        train, targets = scene(0, 60, classes=2)
        tried = []
        fit = svm._fit
        monkeypatch.setattr(svm, "_fit", lambda x, y, cost: tried.append((len(x), cost)) or fit(x, y, cost))
        found = svm_map(train, targets, *scene(1, 30, classes=2), costs=(0.01, 1.0))
        assert sorted(set(tried)) == [(40, 0.01), (40, 1.0), *sorted({(60, cost) for cost in found["costs"]})]
        assert len(tried) == 2 * (2 * 3 + 1)  # classes x (costs x folds, then all rows)

    def test_a_class_nobody_has_is_left_out_and_a_rare_one_takes_the_cost_without_choice(self):
        train, targets = scene(0, 60, classes=3)
        targets[:, 0] = 0
        targets[:, 1] = 0
        targets[0, 1] = 1
        found = svm_map(train, targets, *scene(1, 60, classes=3), costs=COSTS[:3])
        assert found["by_class"][0] is None and found["costs"][0] is None and found["costs"][1] == svm.COST
        assert found["value"] == pytest.approx(sum(found["by_class"][1:]) / 2)

    def test_targets_that_do_not_fit_are_refused(self):
        train, targets = scene(0, 20, classes=2)
        with pytest.raises(ValueError, match=r"test: features \(20, 12\), targets \(19, 2\)"):
            svm_map(train, targets, train, targets[1:])
        with pytest.raises(ValueError, match="train: targets must be 1"):
            svm_map(train, targets + 1, train, targets)
        with pytest.raises(ValueError, match="none of 2 classes"):
            svm_map(train, targets * 0, train, targets)
