"""Methods that wait at a named moment, so that a fault test kills or interrupts a process exactly there.

A test writes a moment into the file `at` of the folder that HALT_FOLDER names. Every process that comes to it leaves
`reached-PID` and waits until the file says something else. Moments are "CLASS PROGRESS" after a training step, such as
"SimCLR 0.50", "labelling" in a classifier's forward pass without gradients, "k-means N" in the Nth of a process's
iterations of k-means, and "before commit STAGE ROUND" and "after commit STAGE ROUND", such as "after commit Gate 0".
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

import methods.clustering
import methods.fixmatch
import methods.mean_teacher
import methods.noisy_student
import methods.pirl
import methods.simclr
import methods.supervised
from orchestrator.artifacts import Artifact
from orchestrator.store import Store

FOLDER = os.environ.get("HALT_FOLDER")


def moment(name: str) -> None:
    """Wait here while the test asks for this moment."""
    if FOLDER is None or not _asked(name):
        return
    (Path(FOLDER) / f"reached-{os.getpid()}").touch()
    while _asked(name):
        time.sleep(0.02)


def _asked(name: str) -> bool:
    try:
        return (Path(str(FOLDER)) / "at").read_text() == name
    except FileNotFoundError:
        return False


class SimCLR(methods.simclr.SimCLR):
    """SimCLR that may wait after a step."""

    def on_step_end(self, progress: float) -> None:
        super().on_step_end(progress)
        moment(f"SimCLR {progress:.2f}")


class PIRL(methods.pirl.PIRL):
    """PIRL that may wait after a step, when its bank holds what no checkpoint does."""

    def on_step_end(self, progress: float) -> None:
        super().on_step_end(progress)
        moment(f"PIRL {progress:.2f}")


class Supervised(methods.supervised.Supervised):
    """Supervised training that may wait after a step, and in labelling."""

    def on_step_end(self, progress: float) -> None:
        super().on_step_end(progress)
        moment(f"Supervised {progress:.2f}")

    def logits(self, images: Tensor) -> Tensor:
        if not self.training:
            moment("labelling")
        return super().logits(images)


class NoisyStudent(methods.noisy_student.NoisyStudent):
    """A student that may wait after a step."""

    def on_step_end(self, progress: float) -> None:
        super().on_step_end(progress)
        moment(f"NoisyStudent {progress:.2f}")


class MeanTeacher(methods.mean_teacher.MeanTeacher):
    """A student that may wait after a step, when its teacher has not followed yet."""

    def on_step_end(self, progress: float) -> None:
        super().on_step_end(progress)
        moment(f"MeanTeacher {progress:.2f}")


class FixMatchCTA(methods.fixmatch.FixMatchCTA):
    """FixMatch that may wait after a step, when its bins hold what no checkpoint does."""

    def on_step_end(self, progress: float) -> None:
        super().on_step_end(progress)
        moment(f"FixMatchCTA {progress:.2f}")


def _waiting_commit(self: Store, key: str, artifact: Artifact, manifest: dict[str, Any]) -> Artifact:
    stage = f"{manifest['stage'].rpartition('.')[2]} {manifest['round']}"
    moment(f"before commit {stage}")
    kept = _commit(self, key, artifact, manifest)
    moment(f"after commit {stage}")
    return kept


def _waiting_sums(self: methods.clustering._Points, label: Tensor, clusters: int) -> Tensor:
    found = _sums(self, label, clusters)
    moment(f"k-means {next(_iteration)}")
    return found


_commit, _sums, _iteration = Store.commit, methods.clustering._Points.sums, itertools.count(1)
if FOLDER is not None:
    Store.commit = _waiting_commit  # type: ignore[method-assign]
    methods.clustering._Points.sums = _waiting_sums  # type: ignore[method-assign]
