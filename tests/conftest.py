"""What tests share: the small recipe on embedded digits, and running it in this process."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from orchestrator import cli

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

SMALL = """
name: small
data:
  pixels: 16
  labelled: {from: digits/train, per_class: 2}
  holdout: {from: digits/train, per_class: 3}
  unlabelled: {from: digits/train, labels: false}
  test: digits/test
resources: {threads: 1}
stages:
  pretrain:
    use: orchestrator.stages.train.Train
    inputs: {images: unlabelled}
    encoder: &encoder {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.simclr.SimCLR, flip: false}
    optim: {name: lars, lr: 0.5}
    steps: 6
    batch: 16
  probe: {use: orchestrator.stages.probe.Probe, inputs: {model: pretrain, labelled: labelled}}
  teacher: &supervised
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled}
    encoder: *encoder
    method: {use: methods.supervised.Supervised, dropout: 0.2,
             augment: &augment {flip: false, padding: 1, randaugment: 5}}
    optim: &sgd {lr: 0.05}
    steps: 8
    batch: 8
    ema: 0.9
  students:
    rounds: 2
    carry: {teacher: student, previous: pseudo, first: teacher}
    gate: {images: holdout, tolerance: 0.5}
    stages:
      pseudo:
        use: orchestrator.stages.pseudo_label.PseudoLabel
        inputs: {teacher: teacher, images: unlabelled, previous: previous, holdout: holdout}
        min_confidence: 0.0
        max_class_share: 1.0
      student:
        <<: *supervised
        inputs: {labelled: labelled, images: unlabelled, labels: pseudo}
        method: {use: methods.noisy_student.NoisyStudent, augment: *augment}
        unlabelled_ratio: 2
  verdict:
    use: orchestrator.stages.judge.Judge
    inputs: {baseline: teacher, final: students, images: test}
"""


@pytest.fixture
def small() -> str:
    """A whole pipeline, every stage kind, in a second or two of training."""
    return SMALL


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data sets, where there is one."""
    if "ORCHESTRATOR_DATA" not in os.environ:
        pytest.skip("ORCHESTRATOR_DATA is not set: no real data sets here")
    return Path(os.environ["ORCHESTRATOR_DATA"])


@pytest.fixture(scope="module")
def untracked():
    """Nothing is sent to MLflow, whose database takes longer to make than a small run is; it has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.tracking.Sender.start", lambda self: None)
        patch.setattr("orchestrator.tracking.Sender.finish", lambda self, timeout_seconds: None)
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "ORCHESTRATOR_STORE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def orchestrator(monkeypatch, capsys):
    """Types a command; gives (exit code, output, errors). An exception that is no clean end fails the test."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["orchestrator", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return command
