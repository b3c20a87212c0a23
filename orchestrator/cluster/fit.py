"""Training on Ray Train: one worker in this process, several as a worker group. Checkpoints are the stage's own."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup
from torch import nn

from methods.bank import MemoryBank
from methods.base import Method
from orchestrator.cluster.connect import joined
from orchestrator.cluster.extract import predict_in_pool
from orchestrator.context import Forward, Interrupted
from orchestrator.errors import UserError
from orchestrator.recipe import Resources
from orchestrator.stages.train import Fit

CONTROLLER_TRIES = 3  # a controller that dies is not restarted by Ray; training goes on from its checkpoint
LOST_WORKERS = 5  # how many times a worker group is started again; a machine taken away with notice does not count
START_SECONDS = "15"  # how long a group that may shrink waits for all its workers before it goes on with fewer
GROUP = "group"  # file in a stage's working folder: the placement group its workers run in


class RayWorkers:
    """Spreads trainings and forward passes over Ray, as the resources say."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    def fit(self, job: Fit) -> None:
        """Run a training to its end, from its last checkpoint.

        Raises:
            Interrupted: the user asked to stop. FloatingPointError: a loss is not finite. UserError: the cluster has no
                room for the workers.
        """
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        if (self.resources.min_workers or self.resources.workers) < self.resources.workers:
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_SECONDS)
        if self.resources.workers == 1 and _may_work():
            TorchTrainer(_alone, train_loop_config={"job": job}, scaling_config=ScalingConfig(num_workers=0)).fit()
            return
        end = self._group(job)
        if end == "interrupted":
            raise Interrupted
        if end:
            raise FloatingPointError(end)

    def _group(self, job: Fit) -> str:
        workers, fewest = self.resources.workers, self.resources.min_workers or self.resources.workers
        gpus = {"GPU": self.resources.gpus} if self.resources.gpus else {}
        scaling = ScalingConfig(
            num_workers=workers if fewest == workers else (fewest, workers), use_gpu=self.resources.gpus > 0,
            resources_per_worker={"CPU": job.context.threads, **gpus},
        )  # fmt: skip
        travelling = replace(job, context=replace(job.context, workers=None, notice=_silent))
        for attempt in range(CONTROLLER_TRIES):
            _free_lost_group(job.context.workdir)
            config = RunConfig(
                name=f"fit-{uuid.uuid4().hex[:8]}", storage_path=str(job.context.workdir / "ray"),
                failure_config=FailureConfig(max_failures=LOST_WORKERS, controller_failure_limit=2),
                logging_config=LoggingConfig(log_level="ERROR"),
            )  # fmt: skip
            try:
                trainer = TorchTrainer(
                    _in_group,
                    train_loop_config={"job": travelling, "wanted": workers},
                    scaling_config=scaling,
                    run_config=config,
                )
                return _beside(trainer).return_value
            except ray.exceptions.ActorDiedError:
                if attempt + 1 == CONTROLLER_TRIES:
                    raise
            except TrainingFailedError as error:
                failures = getattr(error, "worker_failures", {})
                if "startup timed out" in str(error):
                    raise UserError(
                        f"resources.workers: {self.resources.workers} workers could not start, other work holds the "
                        "cluster's CPUs or GPUs; wait for it, or lower resources.workers"
                    ) from error
                raise next(iter(failures.values()), error) from error
        raise AssertionError("unreachable")

    def predict(self, job: Forward, shards: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """The outputs of every shard with its number, as they come: by this process, or by labelling actors."""
        if not self.resources.labellers and (not self.resources.gpus or _may_work()):
            return job.answers(shards)
        return predict_in_pool(job, shards, max(1, self.resources.labellers), self.resources.gpus)


def _may_work() -> bool:
    """Whether this process may do the work itself: on its own machine, or where the cluster gave it CPUs for it.

    A driver and a coordinator on a cluster hold none, and the node they are on may have none to give, and no GPU.
    """
    if not joined():
        return True
    here = ray.get_runtime_context()
    return here.get_actor_id() is not None and here.get_assigned_resources().get("CPU", 0) > 0


def _beside(trainer: TorchTrainer) -> ray.train.Result:
    """`trainer.fit()` in a thread: in the main one it takes Ctrl-C over and aborts between two checkpoints."""
    end: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            end.set_result(trainer.fit())
        except BaseException as error:  # handed on to the caller, whatever it is
            end.set_exception(error)

    threading.Thread(target=fit, name="fit", daemon=True).start()
    return end.result()


def _free_lost_group(workdir: Path) -> None:
    """End the workers that a dead controller or coordinator left of this training, and give back what they hold.

    Ray has this done by an actor that looks its own cluster up on the machine, and gives up where it finds two of them.
    """
    path = workdir / GROUP
    if not path.exists():
        return
    group = path.read_text()
    if ray.util.placement_group_table().get(group, {}).get("state", "REMOVED") != "REMOVED":
        ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
    path.unlink()


def _silent(line: str) -> None:
    """Notices are the driver's."""


def _alone(config: dict[str, Any]) -> None:
    config["job"].run()


def _in_group(config: dict[str, Any]) -> str:
    """One worker of several: its end in a word, since Ray would retry an exception that is no accident."""
    job: Fit = config["job"]
    here = ray.train.get_context()
    part, parts = here.get_world_rank(), here.get_world_size()
    if part == 0:
        (job.context.workdir / GROUP).write_text(ray.util.get_current_placement_group().id.hex())
    else:
        job = replace(job, context=replace(job.context, recorder=None))
    try:
        job.run(
            part=part, parts=parts, wanted=config["wanted"], wrap=_data_parallel,
            leaving=lambda: ray.train.get_preemption_info() is not None,
        )  # fmt: skip
    except Interrupted:
        return "interrupted"
    except FloatingPointError as error:
        return str(error)
    return ""


def _data_parallel(method: Method) -> nn.Module:
    on_gpu = next(method.parameters()).is_cuda
    if on_gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(method)
    banks = [f"{name}.rows" for name, module in method.named_modules() if isinstance(module, MemoryBank)]
    # each worker writes all workers' rows itself; sending the whole bank at every step would cost more than the step
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, banks)
    return nn.parallel.DistributedDataParallel(
        method, device_ids=[torch.cuda.current_device()] if on_gpu else None,
        find_unused_parameters=method.skips_weights,
    )  # fmt: skip
