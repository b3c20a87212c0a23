"""Models from elsewhere: read bit for bit, refused in one line, and taught from by every stage that takes a model."""

import dataclasses
import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision
import yaml

from methods.encoders import SmallCNN, SmallCNNConfig
from methods.supervised import Supervised, SupervisedConfig
from orchestrator.catalog import pages
from orchestrator.errors import UserError
from orchestrator.recipe import load, parse
from orchestrator.report.html import write_report
from orchestrator.run import execute, prepare
from orchestrator.stages.pretrained import Pretrained
from orchestrator.store import Store

pytestmark = pytest.mark.usefixtures("untracked")

DIGITS = [str(digit) for digit in range(10)]
RECIPE = """
name: elsewhere
data:
  pixels: 16
  include_labelled: true
  labelled: {from: digits/train, per_class: 3}
  unlabelled: {from: digits/train, labels: false}
  test: digits/test
resources: {threads: 1}
stages:
  given:
    use: orchestrator.stages.pretrained.Pretrained
    encoder: &encoder {use: methods.encoders.SmallCNN, width: 0.25}
    pixels: 16
"""
TRAIN = """
  {name}:
    use: orchestrator.stages.train.Train
    inputs: {inputs}
    encoder: {{use: methods.encoders.SmallCNN, width: 0.25}}
    method: {method}
    optim: {{lr: 0.05}}
    steps: 2
    batch: 8
"""
DISTILLED = TRAIN.format(
    name="student", inputs="{labelled: labelled, teacher: given}", method="{use: methods.distillation.Distillation}"
)
EMBEDDED = TRAIN.format(
    name="student", inputs="{images: unlabelled, teacher: given}",
    method="{use: methods.embedding_distillation.EmbeddingDistillation, teacher_dim: 64}",
)  # fmt: skip


def model(classes=10, seed=5):
    """A classifier that somebody trained: weights and statistics of no initialisation."""
    torch.manual_seed(seed)
    found = Supervised(SmallCNN(SmallCNNConfig(width=0.25)), SupervisedConfig(), classes=classes, images=0)
    found.train()
    found.logits(torch.rand(32, 3, 16, 16))
    return found.eval()


def plain(found):
    """Its weights as another code base would save them: no constants, other names."""
    names = {name: name.removeprefix("encoder.").replace("head.1", "fc") for name in found.state_dict()}
    return {names[n]: v for n, v in found.state_dict().items() if n not in ("encoder.mean", "encoder.std")}


def saved(tmp_path, state, name="net.safetensors"):
    if name.endswith(".safetensors"):
        safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    return tmp_path / name


def asked(tmp_path, *overrides, text=""):
    given = [o if o.startswith("data.") else f"stages.given.{o}" for o in overrides]
    return prepare(parse(RECIPE + text, overrides=given), tmp_path / "store", label="elsewhere.yaml")


def checkpoint(tmp_path, *overrides, text=""):
    prepared = asked(tmp_path, *overrides, text=text)
    result = execute(prepared, use_ray=False)
    assert {stage["state"] for stage in result.stages} == {"ran"}
    return Store.open(tmp_path / "store").open_artifact(prepared.plans[0].key("given"))


def refused(tmp_path, *overrides, text=""):
    """The one line that says why."""
    with pytest.raises(UserError) as caught:
        asked(tmp_path, *overrides, text=text)
    first, line = str(caught.value).split("\n")
    assert first == "elsewhere.yaml: 1 error, nothing was run"
    return line


class TestFiles:
    @pytest.mark.parametrize(
        ("wrap", "name"),
        [
            (lambda found: plain(found), "net.safetensors"),
            (lambda found: found.state_dict(), "net.safetensors"),
            (lambda found: plain(found), "net.pt"),
            (lambda found: {"epoch": 3, "state_dict": {f"module.{n}": v for n, v in plain(found).items()}}, "net.pth"),
            (lambda found: {"model": {"state_dict": {f"a.b.{n}": v for n, v in plain(found).items()}}}, "net.tar"),
        ],
        ids=["plain", "own", "pickled", "parallel", "nested"],
    )
    def test_a_file_gives_the_model_that_was_saved_however_it_was_wrapped(self, tmp_path, wrap, name):
        original = model()
        path = saved(tmp_path, wrap(original), name)
        built = checkpoint(tmp_path, f"weights={path}", f"classes={DIGITS}").build()
        images = torch.rand(4, 3, 16, 16)
        assert torch.equal(built.logits(images), original.logits(images))
        assert torch.equal(built.features(images), original.features(images))

    def test_a_file_of_half_precision_without_counters_is_read(self, tmp_path):
        state = {n: v.half() for n, v in plain(model()).items() if not n.endswith("num_batches_tracked")}
        found = checkpoint(tmp_path, f"weights={saved(tmp_path, state)}")
        assert found.state()["encoder.blocks.c2.0.weight"].dtype == torch.float32
        assert torch.equal(found.state()["encoder.blocks.c2.0.weight"].half(), state["blocks.c2.0.weight"])

    def test_the_key_is_of_the_content_and_not_of_the_place(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        places = (tmp_path, tmp_path / "elsewhere", tmp_path)
        files = zip(places, ("a", "b", "c"), (1, 1, 2), strict=True)
        one, same, other = (saved(place, plain(model(seed=seed)), f"{n}.safetensors") for place, n, seed in files)
        keys = [asked(tmp_path, f"weights={path}").plans[0].key("given") for path in (one, same, other)]
        assert keys[0] == keys[1] != keys[2]

    def test_no_code_in_a_file_is_run(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (open, (str(tmp_path / "sprung"), "w"))

        torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
        assert "trap.pt: is no file of weights that can be opened without running code" in refused(
            tmp_path, f"weights={tmp_path / 'trap.pt'}"
        )
        torch.save(model(), tmp_path / "whole.pt")
        assert "save the model's state_dict()" in refused(tmp_path, f"weights={tmp_path / 'whole.pt'}")
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
    def test_a_file_that_is_something_else_or_is_not_there_is_named(self, tmp_path, name):
        (tmp_path / name).write_text("weights")
        assert f"{name}: is no file of weights" in refused(tmp_path, f"weights={tmp_path / name}")
        line = refused(tmp_path, f"weights={tmp_path / 'lost.pt'}")
        assert "stages.given.weights" in line and "lost.pt: no such file" in line

    def test_what_a_file_lacks_or_holds_besides_is_listed_by_name_and_shape(self, tmp_path):
        state = plain(model())
        state["blocks.c1.0.weight"] = torch.zeros(8, 3, 5, 5)
        del state["blocks.c4.1.bias"]
        state["projector.0.weight"] = torch.zeros(4, 7)
        line = refused(tmp_path, f"weights={saved(tmp_path, state)}")
        assert "net.safetensors: lacks 1 of SmallCNN's weights (blocks.c4.1.bias); holds 1 unknown ones " in line
        assert "(projector.0.weight), which `ignore` can leave out; 1 of another shape " in line
        assert "(blocks.c1.0.weight is 8 x 3 x 5 x 5, needed 8 x 3 x 3 x 3)" in line

    def test_a_file_of_another_network_says_what_it_holds(self, tmp_path):
        path = saved(tmp_path, {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(2)}, "other.pt")
        line = refused(tmp_path, f"weights={path}")
        assert "other.pt: holds none of SmallCNN's weights, such as " in line and "conv1.weight, fc.bias" in line
        torch.save({"epoch": 3, "lr": 0.1}, path)
        assert "other.pt: holds the entries epoch, lr, not weights by name" in refused(tmp_path, f"weights={path}")

    def test_parts_that_are_not_wanted_are_left_out_by_name(self, tmp_path):
        state = plain(model()) | {"projector.0.weight": torch.zeros(4, 64), "projector.1.bias": torch.zeros(3)}
        path = saved(tmp_path, state)
        assert "holds 4 unknown ones" in refused(tmp_path, f"weights={path}")
        found = checkpoint(tmp_path, f"weights={path}", "ignore=[projector]", f"classes={DIGITS}")
        assert torch.equal(found.state()["head.1.weight"], state["fc.weight"])

    def test_its_images_are_normalised_as_the_recipe_says(self, tmp_path):
        path = saved(tmp_path, plain(model()))
        found = checkpoint(tmp_path, f"weights={path}", "mean=[0.5, 0.5, 0.5]", "std=[0.25, 0.25, 0.25]").build()
        images = torch.rand(2, 3, 16, 16)
        expected = model().encoder((images - 0.5) / 0.25, normalised=True)
        torch.testing.assert_close(found.features(images), expected)


class TestClasses:
    def test_a_map_reads_its_own_classes_as_the_datas(self, tmp_path):
        original, names = model(classes=23), [f"own {number}" for number in range(23)]
        groups = {digit: [f"own {int(digit)}", int(digit) + 10] for digit in DIGITS[:9]} | {"9": ["19-21"]}
        path = saved(tmp_path, plain(original))
        found = checkpoint(tmp_path, f"weights={path}", f"classes={names}", f"class_map={yaml.safe_dump(groups)}")
        assert list(found.classes) == DIGITS and found.facts["outputs"] == 23
        images = torch.rand(4, 3, 16, 16)
        own = original.logits(images).softmax(dim=1)
        known = 1 - own[:, [9, 22]].sum(dim=1)
        read = found.build().logits(images).softmax(dim=1)
        torch.testing.assert_close(read[:, 3], (own[:, 3] + own[:, 13]) / known)
        torch.testing.assert_close(read[:, 9], own[:, 19:22].sum(dim=1) / known)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["classes=[a, b]"], "stages.given.classes .*2 are named, the model has 10 outputs"),
            (["classes=[a, a]"], "a is named twice"),
            (["class_map={'0': [0]}"], "stages.given.class_map .*says nothing of 1, 2, 3, 4, 5, 6, 7, 8, 9"),
            (["class_map={zero: [0]}"], "zero is no class of the data"),
            ([f"class_map={ {d: [3] for d in DIGITS} }"], "output 3 is named twice; it may mean one class only"),
            ([f"class_map={ {d: [int(d) + 1] for d in DIGITS} }"], "10: the model's outputs are 0 to 9"),
            ([f"class_map={ {d: ['seven'] for d in DIGITS} }"], "seven: name outputs by number, or give their names"),
            ([f"classes={['seven', *'123456789']}", f"class_map={ {d: ['sevn'] for d in DIGITS} }"],
             "sevn is none of the model's classes; did you mean seven"),
        ],
    )  # fmt: skip
    def test_classes_that_cannot_be_are_refused_with_what_to_do(self, tmp_path, options, expected):
        path = saved(tmp_path, plain(model()))
        with pytest.raises(UserError) as caught:
            asked(tmp_path, f"weights={path}", *options)
        assert re.search(expected, str(caught.value)), caught.value

    def test_a_head_needs_weights_and_a_file_with_a_head(self, tmp_path):
        assert "a head as it is drawn tells no classes apart" in refused(tmp_path, f"classes={DIGITS}")
        headless = {n: v for n, v in plain(model()).items() if not n.startswith("fc")}
        line = refused(tmp_path, f"weights={saved(tmp_path, headless)}", f"classes={DIGITS}")
        assert "holds no head, a linear layer on 64 numbers; leave out classes and class_map" in line

    def test_without_weights_it_is_as_drawn_and_says_so(self, tmp_path):
        prepared = asked(tmp_path)
        result = execute(prepared, use_ray=False)
        assert "its weights are as they are drawn" in result.stages[0]["note"]
        assert Store.open(tmp_path / "store").open_artifact(prepared.plans[0].key("given")).classes == ()

    def test_another_size_of_images_is_refused(self, tmp_path):
        assert "224: the recipe's images have 16; use that" in refused(tmp_path, "pixels=224")


class TestTimmAndTorchvision:
    @pytest.mark.parametrize(
        "encoder", ["{use: methods.encoders.ResNet}", "{use: methods.encoders.Timm, name: resnet18}"]
    )
    def test_a_file_of_torchvisions_resnet_gives_its_logits(self, tmp_path, encoder):
        torch.manual_seed(3)
        original = torchvision.models.resnet18(num_classes=10).eval()
        path = saved(tmp_path, original.state_dict(), "resnet18.pth")
        found = checkpoint(tmp_path, f"encoder={encoder}", f"weights={path}", f"classes={DIGITS}").build()
        images = torch.rand(2, 3, 32, 32)
        expected = original((images - found.encoder.mean) / found.encoder.std)
        torch.testing.assert_close(found.logits(images), expected, rtol=1e-4, atol=1e-4)

    def published(self, monkeypatch, name):
        """The hub, with weights drawn here."""
        create = timm.create_model
        torch.manual_seed(4)
        whole = create(name, pretrained=False).eval()
        monkeypatch.setattr(
            timm, "create_model",
            lambda asked, *, pretrained=False, **options: whole if pretrained else create(asked, **options),
        )  # fmt: skip
        return whole

    def test_published_weights_are_kept_in_the_checkpoint_with_their_constants(self, tmp_path, monkeypatch):
        whole = self.published(monkeypatch, "test_resnet.r160_in1k")
        assert whole.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)  # not ImageNet's
        groups = {digit: [int(digit) * 10] for digit in DIGITS[:9]} | {"9": ["281-285"]}
        asked_for = "encoder={use: methods.encoders.Timm, name: test_resnet.r160_in1k, pretrained: true}"
        found = checkpoint(tmp_path, asked_for, f"class_map={yaml.safe_dump(groups)}")
        assert found.model["encoder"]["pretrained"] is False  # whoever reads it needs no network
        images = torch.rand(2, 3, 32, 32)
        own = whole((images - 0.5) / torch.tensor(whole.pretrained_cfg["std"])[:, None, None])
        expected = torch.cat([own[:, :90:10], own[:, 281:286].logsumexp(dim=1, keepdim=True)], dim=1)
        torch.testing.assert_close(found.build().logits(images), expected, rtol=1e-4, atol=1e-4)

    def test_a_hub_that_cannot_be_reached_is_one_line_with_a_way_out(self, tmp_path, monkeypatch):
        create = timm.create_model

        def unreachable(name, *, pretrained=False, **options):
            if pretrained:
                raise ConnectionError("no route to the hub")
            return create(name, **options)

        monkeypatch.setattr(timm, "create_model", unreachable)
        prepared = asked(tmp_path, "encoder={use: methods.encoders.Timm, name: test_resnet, pretrained: true}")
        with pytest.raises(
            UserError, match=r"not to be had here \(no route to the hub\); where there is a network, save"
        ):
            execute(prepared, use_ray=False)

    @pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
    def test_a_network_whose_head_is_more_than_a_layer_has_features_alone(self, tmp_path, name):
        encoder = f"encoder={{use: methods.encoders.Timm, name: {name}, pretrained: true}}"
        groups = f"class_map={ {digit: [int(digit)] for digit in DIGITS} }"
        size = ("data.pixels=32", "pixels=32")
        line = refused(tmp_path, encoder, groups, *size)
        assert f"{name}: its head is more than a linear layer on the mean over places" in line
        asked(tmp_path, encoder, *size)

    def test_a_network_that_cannot_read_such_images_is_refused(self, tmp_path):
        line = refused(tmp_path, "encoder={use: methods.encoders.Timm, name: vit_tiny_patch16_224}")
        assert "stages.given.encoder" in line and "does not read images of 16 px" in line

    def test_two_sources_of_weights_are_refused(self, tmp_path):
        path = saved(tmp_path, plain(model()))
        encoder = "encoder={use: methods.encoders.Timm, name: resnet18, pretrained: true}"
        assert "two sources of weights; leave one out" in refused(tmp_path, encoder, f"weights={path}")


READERS = (
    DISTILLED.replace("student", "distilled")
    + EMBEDDED.replace("student", "embedded")
    + TRAIN.format(name="tuned", inputs="{labelled: labelled, init: given}",
                   method="{use: methods.supervised.Supervised}")
    + """
  pseudo:
    use: orchestrator.stages.pseudo_label.PseudoLabel
    inputs: {teacher: given, images: unlabelled}
    min_confidence: 0.0
    max_class_share: 1.0
  clusters: {use: orchestrator.stages.cluster.Cluster, inputs: {teacher: given, images: unlabelled}, clusters: 5}
  probe:
    use: orchestrator.stages.probe.Probe
    inputs: {model: given, labelled: labelled, images: test}
    protocols: [knn, classifier]
"""
)  # fmt: skip


def test_everything_that_takes_a_model_reads_it(tmp_path):
    original = model()
    path = saved(tmp_path, plain(original))
    prepared = asked(tmp_path, f"weights={path}", f"classes={DIGITS}", text=READERS)
    result = execute(prepared, use_ray=False)
    assert {stage["state"] for stage in result.stages} == {"ran"} and len(result.stages) == 7
    store, plan = Store.open(tmp_path / "store"), prepared.plans[0]
    curves = store.open_artifact(plan.key("distilled")).curves().to_pylist()
    assert {"soft_loss", "teacher_agreement"} <= {row["name"] for row in curves}
    images = plan.images["unlabelled"]
    expected = original.logits(images.batch(torch.arange(len(images))).float() / 255).softmax(dim=1)
    told = torch.tensor(store.open_artifact(plan.key("pseudo")).probabilities())
    torch.testing.assert_close(told, expected, rtol=0.05, atol=0.02)  # bf16 where it is faster
    page = write_report(store, prepared.folder).read_text(encoding="utf-8")
    assert "distilled" in page and "soft loss" in page
    given = store.open_artifact(plan.key("given")).state()
    assert torch.equal(given["encoder.blocks.c1.1.running_mean"], original.encoder.blocks["c1"][1].running_mean)


class TestTeachers:
    def test_a_teacher_of_other_classes_is_refused_with_three_ways_out(self, tmp_path):
        path, names = saved(tmp_path, plain(model(classes=4))), "classes=[cat, dog, cow, hen]"
        line = refused(tmp_path, f"weights={path}", names, text=DISTILLED)
        assert "stages.student.inputs.teacher" in line
        assert "tells 4 other classes apart (cat ...), not the data's 10: fine-tune it on labelled images" in line
        assert "learn its features alone with EmbeddingDistillation" in line and "class_map" in line
        asked(tmp_path, f"weights={path}", names, text=EMBEDDED)  # which reads its features
        for reader in ("pseudo", "probe"):
            text = "\n  " + READERS[READERS.index(f"{reader}:") :].split("\n  clusters")[0].split("\n  probe")[0]
            assert "tells 4 other classes apart" in refused(tmp_path, f"weights={path}", names, text=text)

    def test_a_teacher_without_classes_is_refused_where_classes_are_learned(self, tmp_path):
        path = saved(tmp_path, plain(model()))
        assert "tells no classes apart" in refused(tmp_path, f"weights={path}", text=DISTILLED)
        asked(tmp_path, f"weights={path}", text=EMBEDDED)

    def test_a_network_pretrained_without_a_classifier_is_no_teacher_of_classes(self, tmp_path):
        simclr = TRAIN.format(name="ours", inputs="{images: unlabelled}", method="{use: methods.simclr.SimCLR}")
        line = refused(tmp_path, text=simclr + DISTILLED.replace("teacher: given", "teacher: ours"))
        assert "SimCLR has features and no classifier: fine-tune it" in line
        asked(tmp_path, text=simclr + EMBEDDED.replace("teacher: given", "teacher: ours"))

    def test_a_teachers_feature_of_another_length_is_refused_with_the_right_one(self, tmp_path):
        path = saved(tmp_path, plain(model()))
        text = EMBEDDED.replace("teacher_dim: 64", "teacher_dim: 128")
        line = refused(tmp_path, f"weights={path}", text=text)
        assert "stages.student.method.teacher_dim" in line
        assert "128: the teacher's features have 64 numbers; use teacher_dim: 64" in line

    def test_a_method_that_needs_a_teacher_says_so(self, tmp_path):
        line = refused(tmp_path, text=DISTILLED.replace(", teacher: given", ""))
        assert "stages.student.inputs.teacher" in line and "missing: Distillation learns from it" in line

    def test_training_leaves_the_stored_teacher_as_it_is_and_resumes_with_it(self, tmp_path):
        path = saved(tmp_path, plain(model()))
        prepared = asked(tmp_path, f"weights={path}", f"classes={DIGITS}", text=DISTILLED)
        execute(prepared, use_ray=False)
        store, plan = Store.open(tmp_path / "store"), prepared.plans[0]
        student = store.open_artifact(plan.key("student"))
        assert not any("teacher" in name for name in student.state())
        again = execute(asked(tmp_path, f"weights={path}", f"classes={DIGITS}", text=DISTILLED), use_ray=False)
        assert {stage["state"] for stage in again.stages} == {"stored"}


def test_without_weight_on_the_teacher_a_training_ends_in_the_bits_of_a_supervised_one(tmp_path):
    path = saved(tmp_path, plain(model()))
    text = DISTILLED.replace("Distillation}", "Distillation, alpha: 0.0, dropout: 0.2}") + TRAIN.format(
        name="alone", inputs="{labelled: labelled}", method="{use: methods.supervised.Supervised, dropout: 0.2}"
    )
    prepared = asked(tmp_path, f"weights={path}", f"classes={DIGITS}", text=text)
    execute(prepared, use_ray=False)
    store = Store.open(tmp_path / "store")
    taught, alone = (store.open_artifact(prepared.plans[0].key(name)).state() for name in ("student", "alone"))
    assert taught.keys() == alone.keys()
    assert [name for name in taught if not torch.equal(taught[name], alone[name])] == []


def test_the_page_lists_every_option_of_the_stage_in_order():
    (table,) = re.findall(r"^## The stage Pretrained\n\n((?:\|.*\n)+)", pages()["distillation"], re.MULTILINE)
    named = [line.split("|")[1].strip(" `") for line in table.splitlines()[2:]]
    assert named == [option.name for option in dataclasses.fields(Pretrained)]


@pytest.mark.slow
def test_the_comparison_of_teachers_runs_on_digits_and_makes_one_table(tmp_path):
    """The shipped recipe with small networks for a few steps: every arm trains, is scored, and is claimed about."""
    groups = ("baselines", "distilled", "embedded")
    overrides = [
        "data.labelled={from: digits/train, per_class: 3}", "data.test=digits/test", "data.pixels=16",
        "resources.threads=1", "stages.embedded.stages.matched.epochs=1", "stages.embedded.stages.matched.batch=16",
        *(f"stages.{group}.stages.model.{option}" for group in groups for option in ("epochs=2", "batch=16")),
    ]  # fmt: skip
    prepared = prepare(load("compare-distillation", overrides), tmp_path / "store", label="compare-distillation")
    result = execute(prepared, use_ray=False)
    assert {stage["state"] for stage in result.stages} == {"ran"}
    found = result.json()["comparison"]
    assert {score["arm"] for score in found["arms"]} == {
        "student", "strong", "poor", "smoothing", "tf_kd_reg", "kd", "re_kd", "de_kd", "tf_kd_self",
        "embedding",
    }  # fmt: skip
    assert found["protocol"] == "classifier" and ("kd", "student") in {
        (claim["better"], claim["worse"]) for claim in found["claims"]
    }
    digests = {stage["name"]: stage["digest"] for stage in result.stages if stage["name"].endswith(".model")}
    assert len(set(digests.values())) == len(digests)  # no two arms learned the same
