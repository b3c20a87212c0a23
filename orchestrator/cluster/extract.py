"""Forward passes by a pool of actors, each with the model resident: shards in flight are bounded, lost ones redone."""

from __future__ import annotations

from collections.abc import Sequence

import ray
import torch
from torch import Tensor

from orchestrator.context import Forward

IN_FLIGHT = 2  # shards an actor has at a time: one in work, one waiting


class Labeller:
    """Holds one model and answers for rows of images; a killed one comes back, and its shard is asked again."""

    def __init__(self, job: Forward) -> None:
        torch.set_num_threads(1)
        self.run = job.open()

    def answer(self, rows: Tensor) -> Tensor:
        """Outputs of the rows, float32 on the CPU."""
        return self.run(rows)


LabellerActor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Labeller)


def predict_in_pool(job: Forward, shards: Sequence[Tensor], actors: int, gpus: float = 0) -> list[Tensor]:
    """The outputs of every shard, in order, whatever actor answered."""
    kept = ray.put(job)  # an argument above 100 KB would be dropped once read, and a killed actor could not come back
    labeller = LabellerActor.options(num_gpus=gpus)
    pool = [labeller.remote(kept) for _ in range(min(actors, max(1, len(shards))))]
    answers: dict[int, Tensor] = {}
    pending: dict[ray.ObjectRef, tuple[int, int]] = {}
    todo = iter(enumerate(shards))

    def ask(actor: int) -> None:
        number, rows = next(todo, (None, None))
        if number is not None:
            pending[pool[actor].answer.remote(rows)] = (number, actor)

    try:
        for _ in range(IN_FLIGHT):
            for actor in range(len(pool)):
                ask(actor)
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            number, actor = pending.pop(ready[0])
            answers[number] = torch.from_numpy(ray.get(ready[0]).numpy().copy())
            ask(actor)
    finally:
        for actor in pool:
            ray.kill(actor)
    return [answers[number] for number in range(len(shards))]
