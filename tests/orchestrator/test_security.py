"""What a recipe, a file of weights or somebody on the network can make this program do: nothing that was not asked."""

import ast
import inspect
import os
import pickle
from pathlib import Path

import pytest
import ray
import torch
import yaml

from methods.base import Method
from methods.encoders import Encoder
from orchestrator.cluster import connect as connecting
from orchestrator.component import ConfigError, resolve
from orchestrator.errors import UserError
from orchestrator.recipe import Resources, parse
from orchestrator.stage import Stage
from orchestrator.stages import pretrained
from orchestrator.training import checkpoint

ROOT = Path(__file__).parents[2]
PRODUCT = [path for top in ("methods", "orchestrator") for path in sorted((ROOT / top).rglob("*.py"))]
UNPICKLING = {"pickle.load", "pickle.loads", "joblib.load", "dill.load", "cloudpickle.load", "cloudpickle.loads",
              "pandas.read_pickle", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load", "marshal.load"}  # fmt: skip


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def calls(source):
    """(dotted name, keywords) of every call in a source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def unsafe(source):
    """The calls of a source that would run code out of a file."""
    return [
        name for name, words in calls(source)
        if name in UNPICKLING or (name == "torch.load" and words.get("weights_only") != "True")
        or words.get("allow_pickle", "False") != "False"
    ]  # fmt: skip


class TestFiles:
    def test_no_code_out_of_a_file_is_ever_run(self):
        assert {path.name: found for path in PRODUCT if (found := unsafe(path.read_text(encoding="utf-8")))} == {}

    @pytest.mark.parametrize("line", [
        "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(p, allow_pickle=True)", "pickle.load(f)",
    ])  # fmt: skip
    def test_a_line_that_would_run_code_is_found(self, line):
        assert unsafe(line) and not unsafe("torch.load(p, weights_only=True)")

    @pytest.mark.parametrize("write", [lambda o, f: f.write_bytes(pickle.dumps(o)), lambda o, f: torch.save(o, f)])
    def test_weights_that_hold_code_are_refused_and_the_code_does_not_run(self, tmp_path, write):
        file, mark = tmp_path / "weights.pth", tmp_path / "it-ran"
        write({"encoder.weight": torch.zeros(2), "more": Payload(mark)}, file)
        with pytest.raises(UserError, match="is no file of weights that can be opened without running code from it"):
            pretrained._read(str(file))
        assert not mark.exists()

    def test_a_training_s_state_that_holds_code_is_set_aside_and_the_code_does_not_run(self, tmp_path):
        mark = tmp_path / "it-ran"
        torch.save({"step": 3, "more": Payload(mark)}, tmp_path / checkpoint.NAME)
        assert checkpoint.load(tmp_path) is None
        assert not mark.exists() and not (tmp_path / checkpoint.NAME).exists()

    def test_a_recipe_s_yaml_makes_no_objects(self, tmp_path):
        mark = tmp_path / "it-ran"
        with pytest.raises(UserError, match="not YAML: could not determine a constructor"):
            parse(f"name: !!python/object/apply:os.mkdir ['{mark}']")
        assert not mark.exists()


OWN = """
from pathlib import Path
from methods.base import Method

MARK = Path({mark!r})


def function(*_, **__):
    MARK.mkdir()


class Other:
    def __init__(self, *_, **__):
        MARK.mkdir()


instance = object.__new__(Other)
"""


class TestUse:
    @pytest.mark.parametrize("name", ["function", "Other", "instance", "MARK.mkdir", "Method", "Path", "nothing"])
    @pytest.mark.parametrize("bases", [(Method, Encoder), (Stage,)])
    def test_what_is_no_method_encoder_or_stage_is_refused_and_not_called(self, tmp_path, monkeypatch, name, bases):
        mark = tmp_path / "it-ran"
        (tmp_path / "foreign_module.py").write_text(OWN.format(mark=str(mark)))
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match="foreign_module"):
            resolve(f"foreign_module.{name}", bases)
        assert not mark.exists()

    @pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "builtins.eval", "eval", "", "os.", ".system"])
    def test_functions_and_classes_of_the_library_are_refused_in_a_recipe(self, small, path):
        recipe = yaml.safe_load(small)
        recipe["stages"]["pretrain"]["method"] = {"use": path, "command": "true"}
        recipe["stages"]["probe"]["use"] = path
        with pytest.raises(UserError) as refused:
            parse(yaml.safe_dump(recipe))
        assert "stages.pretrain.method.use" in str(refused.value) and "stages.probe.use" in str(refused.value)


class TestNetwork:
    def test_ray_here_listens_to_this_machine_alone(self, monkeypatch):
        asked = {}
        assert inspect.signature(ray.init).parameters["dashboard_host"].default == "127.0.0.1"
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **given: asked.update(given))
        monkeypatch.setattr(ray, "nodes", lambda: [
            {"NodeID": "n", "NodeManagerAddress": "127.0.0.1", "NodeManagerHostname": "x", "Alive": True,
             "Resources": {"CPU": 2.0}}
        ])  # fmt: skip
        connecting.connect(Resources(workers=2))
        assert asked["address"] == "local" and asked["include_dashboard"]
        assert "dashboard_host" not in asked
