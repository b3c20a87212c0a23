"""Forward passes by a pool of actors, each with the model resident: shards in flight are bounded, lost ones redone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import ray
import torch
from torch import Tensor

from orchestrator.context import Forward

IN_FLIGHT = 2  # shards an actor has at a time: one in work, one waiting


class Labeller:
    """Holds one model and answers for rows of images."""

    def __init__(self, job: Forward) -> None:
        torch.set_num_threads(1)
        self.run = job.open()

    @ray.method(max_task_retries=-1)
    def ready(self) -> None:
        """Answers once the model is there: at the start, and again after it was lost and has found another place."""

    def answer(self, rows: Tensor) -> Tensor:
        """Outputs of the rows, float32 on the CPU."""
        return self.run(rows)


LabellerActor = ray.remote(num_cpus=1, max_restarts=-1)(Labeller)


def predict_in_pool(
    job: Forward, shards: Sequence[Tensor], actors: int, gpus: float = 0
) -> Iterator[tuple[int, Tensor]]:
    """The outputs of every shard with its number, as they come, whatever actor answered.

    An actor gets shards while it is there. Those of a lost one go to the others, and it gets new ones when it is back:
    on a cluster with less room than before, that may be never.
    """
    kept = ray.put(job)  # an argument above 100 KB would be dropped once read, and a killed actor could not come back
    labeller = LabellerActor.options(num_gpus=gpus)
    pool = [labeller.remote(kept) for _ in range(min(actors, max(1, len(shards))))]
    left = len(shards)
    todo = deque(range(len(shards)))
    coming: dict[ray.ObjectRef, int] = {actor.ready.remote(): place for place, actor in enumerate(pool)}
    away = set(coming.values())
    asked: dict[ray.ObjectRef, tuple[int, int]] = {}  # (shard, actor's place in the pool)
    flying = [0] * len(pool)  # shards each has

    def give(places: Iterable[int]) -> None:
        for load in range(IN_FLIGHT):
            for place in places:
                # one that is still coming finds a shard to begin with; a second one in flight is for what is more
                more = len(todo) > (len(coming) if load else 0)
                if more and flying[place] <= load and place not in away:
                    shard = todo.popleft()
                    asked[pool[place].answer.remote(shards[shard])] = (shard, place)
                    flying[place] += 1

    try:
        while left:
            (done, *_), _ = ray.wait([*coming, *asked], num_returns=1)
            if done in coming:
                ray.get(done)  # a model that cannot be opened is no accident
                place = coming.pop(done)
                away.discard(place)
                give([place])
                continue
            shard, place = asked.pop(done)
            flying[place] -= 1
            try:
                answer = torch.from_numpy(ray.get(done).numpy().copy())
                give([place])
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                todo.appendleft(shard)
                if place not in away:
                    away.add(place)
                    coming[pool[place].ready.remote()] = place
                give(range(len(pool)))
                continue
            left -= 1
            yield shard, answer
    finally:
        for actor in pool:
            ray.kill(actor)
