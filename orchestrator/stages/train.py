"""Train one method on one or two streams of images: a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from methods.base import Method, is_classifier
from methods.ema import averaged_copy
from methods.encoders import Encoder, freeze
from methods.representation import alignment, effective_rank, uniformity
from methods.views.draws import Draws
from methods.views.policy import Augment
from orchestrator.artifacts import Checkpoint, Labels
from orchestrator.component import Component
from orchestrator.context import Context, Interrupted
from orchestrator.data.images import Images
from orchestrator.data.loader import Order
from orchestrator.stage import Stage, StopRound, Wiring, foreign
from orchestrator.training import checkpoint as training_state
from orchestrator.training.health import Guard, Limits, Watch
from orchestrator.training.loop import Stream, train_steps
from orchestrator.training.norm import clean_images, clean_rows, reset_norm
from orchestrator.training.optim import Optim
from orchestrator.training.precision import auto_precision, autocast, device

LOG_EVERY = 20  # steps between logged losses: reading one is a device synchronisation
SIGNALS = 10  # how often pretraining without labels looks at its features
LOOKED_AT = 256  # images it looks at them on
LOOK_SECONDS = 2.0  # between questions whether a machine is about to be taken away: all workers wait for the answer
SAMPLE = 4096  # clean images that priors and the statistics of batch norm are taken from


@dataclass(frozen=True, kw_only=True)
class Train(Stage):
    """Train `method` on `encoder`; `steps` or `epochs` (of the unlabelled stream if there is one) say for how long.

    A method of labelled images alone learns from `labelled`, or from `images` with `labels`: clusters, or a teacher's.
    """

    encoder: Component
    method: Component
    optim: Optim
    batch: int  # images of the method's first stream a step, over all workers
    unlabelled_ratio: int = 1  # with two streams: unlabelled images for each labelled one
    steps: int | None = None  # 0: the weights as they are drawn, the anchor of comparisons
    epochs: float | None = None
    ema: float = 0.0  # decay of the weights' average, which then is the answer; 0: the weights themselves
    clip: float | None = None  # largest gradient norm
    accumulate: int = 1  # parts a batch is split into where memory is short
    precision: Literal["auto", "float32", "bf16"] = "auto"
    pixels: int | None = None  # side of the images it trains on; left out, the data's
    keep_head: bool = False  # go on from the classifier of `init` as well, not from its encoder alone
    frozen: str | None = None  # tap of the encoder up to which weights and batch norm's statistics stay as they are
    guard: Guard = "warn"  # when self-training looks ill: say so; lower a threshold that nothing reaches; or end it
    limits: Limits = Limits()  # of what is healthy

    takes_several: ClassVar[frozenset[str]] = frozenset({"images"})  # reads no labels of theirs

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps = {self.steps}, epochs = {self.epochs}: give exactly one of the two")
        for name in ("batch", "unlabelled_ratio", "accumulate", "epochs", "clip", "pixels"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value}: must be > 0")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"steps = {self.steps}: must be >= 0; 0 leaves the weights as they are drawn")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema = {self.ema}: must be in [0, 1)")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate}: must divide batch = {self.batch}")

    # what is asked, before anything runs

    def build(self, classes: int, images: int) -> tuple[Method, Encoder]:
        """The method with fresh weights from the current generator, and its encoder."""
        encoder = self.encoder.cls(self.encoder.config)
        return self.method.cls(encoder, self.method.config, classes=classes, images=images), encoder

    def vocabulary(self, wiring: Wiring) -> tuple[str, ...]:
        return wiring.vocabulary["labels"][0] if "labels" in wiring.stages else wiring.classes

    def _draft(self, wiring: Wiring) -> tuple[Method, set[str]]:
        """The method without memory for its weights, and the streams it reads."""
        with torch.device("meta"):
            images = sum(len(images) for images in wiring.images.get("images", ()))
            method, encoder = self.build(len(self.vocabulary(wiring)), images)
            if self.frozen is not None:
                freeze(encoder, self.frozen)
            return method, {view.stream for view in method.views(self.pixels or wiring.pixels)}

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        try:
            method, streams = self._draft(wiring)
        except ValueError as error:
            return [("frozen" if str(error).startswith("frozen") else "method", str(error))]
        name = self.method.use.rpartition(".")[2]
        given = {*wiring.images, *wiring.stages}
        if streams == {"labelled"} and {"images", "labels"} & given and "labelled" not in given:
            needed = {"labelled": False, "images": True, "labels": True}
        else:
            needed = {
                "labelled": "labelled" in streams, "images": "unlabelled" in streams, "labels": method.needs_targets
            }  # fmt: skip
        needed["teacher"] = method.needs_teacher
        for key, need in needed.items():
            if need and key not in given:
                found.append((f"inputs.{key}", f"missing: {name} learns from it"))
            if not need and key in given:
                found.append((f"inputs.{key}", f"{name} does not read it; leave it out"))
        if getattr(self.method.config, "soft", False) and needed["labels"] is False:
            found.append(("method.soft", "learns a teacher's distributions: give inputs.images and inputs.labels"))
        if found:
            return found
        if getattr(self.method.config, "soft", False) and self.vocabulary(wiring) != wiring.classes:
            found.append(("method.soft", "clusters have no distributions; leave it out"))
        if method.needs_targets and self.vocabulary(wiring) != wiring.classes:
            found.append(("inputs.labels", f"are not of the data's classes, and {name} learns both together"))
        for key, size in self._sizes(streams).items():
            rows = sum(len(images) for images in wiring.images.get(key, ()))
            if key == "images" and method.needs_distinct and rows < size:
                found.append((
                    "batch", f"{size} images a step but inputs.images has {rows}: {name} compares the images of a "
                    f"batch, so none may be in it twice; use batch: {max(2, rows)} or less",
                ))  # fmt: skip
            if key in wiring.images and rows == 0:
                found.append((f"inputs.{key}", "has no images"))
        found += self._unfit_start(method, wiring)
        found += self._unfit_for_health(method, wiring)
        if method.needs_teacher:
            found += self._teacher_problems(method, wiring)
        if method.needs_average and not self.ema:
            found.append(("ema", f"{self.ema}: {name} reads the average of its weights; use ema: 0.999"))
        if method.needs_distinct and self.accumulate > 1:
            found.append(("accumulate", f"{self.accumulate}: {name} compares all images of a batch; use accumulate: 1"))
        for image in wiring.images.get("labelled", ()):
            if not image.labelled.all():
                found.append(
                    ("inputs.labelled", f"{int((~image.labelled).sum())} of {len(image)} images have no label")
                )
        return found

    def _unfit_start(self, method: Method, wiring: Wiring) -> list[tuple[str, str]]:
        """What is wrong with `init` and with what is kept of it."""
        if "init" not in wiring.stages:
            return [
                (name, f"{value}: there is nothing to keep; give inputs.init")
                for name, value in (("keep_head", self.keep_head), ("frozen", self.frozen)) if value
            ]  # fmt: skip
        found: list[tuple[str, str]] = []
        for stage in wiring.stages["init"]:
            encoder: Component | None = getattr(stage, "encoder", None)
            if encoder is None:  # somebody's own stage, which says nothing of its model
                continue
            with torch.device("meta"):
                models = [one.cls(_unfilled(one.config)) for one in (self.encoder, encoder)]
            here, there = ({name: value.shape for name, value in model.state_dict().items()} for model in models)
            if here != there:
                found.append(
                    ("encoder", "is not the one of inputs.init, whose weights it starts from; write the same encoder "
                     "in both")
                )  # fmt: skip
        if self.keep_head and not is_classifier(method):
            found.append(("keep_head", f"{type(method).__name__} has no classifier to keep; leave it out"))
        elif self.keep_head and not all(isinstance(stage, Train) for stage in wiring.stages["init"]):
            found.append(("keep_head", "inputs.init was not trained here, so its classifier may be any; leave it out"))
        elif self.keep_head:
            found += foreign(replace(wiring, classes=self.vocabulary(wiring)), "init")
        return found

    def _unfit_for_health(self, method: Method, wiring: Wiring) -> list[tuple[str, str]]:
        found, name = [], type(method).__name__
        if self.guard == "adapt" and getattr(self.method.config, "min_confidence", None) is None:
            found.append(("guard", f"adapt lowers min_confidence, which {name} does not have; use warn or stop"))
        if "holdout" not in {*wiring.images, *wiring.stages}:
            return found
        if not is_classifier(method):
            found.append(("inputs.holdout", f"{name} tells no classes apart, so it measures nothing; leave it out"))
        elif self.vocabulary(wiring) != wiring.classes:
            found.append(("inputs.holdout", "has labels of other classes than those that are learned; leave it out"))
        elif not any(images.labelled.any() for images in wiring.images.get("holdout", ())):
            found.append(("inputs.holdout", "has no labels, so it measures nothing"))
        return found

    def _teacher_problems(self, method: Method, wiring: Wiring) -> list[tuple[str, str]]:
        if method.teacher_dim is None:
            return [
                (path, f"{message}, learn its features alone with EmbeddingDistillation, or give a model from "
                 "elsewhere a class_map")
                for path, message in foreign(replace(wiring, classes=self.vocabulary(wiring)), "teacher")
            ]  # fmt: skip
        found: list[tuple[str, str]] = []
        for stage in wiring.stages.get("teacher", ()):
            encoder: Component | None = getattr(stage, "encoder", None)
            if encoder is None:  # somebody's own stage, which says nothing of its model
                continue
            with torch.device("meta"):
                dim = encoder.cls(encoder.config).dim
            if dim != method.teacher_dim:
                found.append(
                    ("method.teacher_dim", f"{method.teacher_dim}: the teacher's features have {dim} numbers; "
                     f"use teacher_dim: {dim}")
                )  # fmt: skip
        return found

    def resolved(self, wiring: Wiring) -> dict[str, Any]:
        if self.precision != "auto":
            return {"precision": self.precision}
        with torch.device("meta"):
            return {"precision": auto_precision(self.encoder.cls(self.encoder.config))}

    def work(self, wiring: Wiring) -> dict[str, Any]:
        method, streams = self._draft(wiring)
        sizes = self._sizes(streams)
        rows = {key: sum(len(i) for i in wiring.images.get(key, ())) for key in sizes if key in wiring.images}
        steps = self._steps(rows, sizes)
        advice = self.method.config.advice(steps)
        return {
            **({"advice": advice} if advice else {}), "steps": steps, "images": steps * sum(sizes[key] for key in rows),
            "bookkeeping": bookkeeping(steps, rows, sizes),
            "parameters": sum(p.numel() for p in method.parameters()),
            "passes": {key: round(steps * sizes[key] / max(1, n), 1) for key, n in rows.items()},
        }  # fmt: skip

    def _sizes(self, streams: Collection[str]) -> dict[str, int]:
        """Images a step, by input."""
        return {"labelled": self.batch, "images": self.batch * (self.unlabelled_ratio if len(streams) == 2 else 1)}

    def shares(self, method: Method, parts: int, wanted: int) -> int:
        """How many parts a worker's share of a batch is split into: as small ones as `wanted` workers would have.

        A batch of 64 that 4 workers take in one part each is 2 parts for each of 2 workers. A method that compares the
        images of a batch has them all at once whatever there is.
        """
        if method.needs_distinct:
            return 1
        least = -(-self.accumulate * wanted // parts)
        return next(count for count in range(least, self.batch + 1) if self.batch % (count * parts) == 0)

    def _steps(self, rows: dict[str, int], sizes: dict[str, int]) -> int:
        if self.steps is not None:
            return self.steps
        key = "images" if "images" in rows else "labelled"
        return max(1, round((self.epochs or 0) * rows[key] / sizes[key]))

    # the answer

    def run(
        self, context: Context, *, labelled: Images | None = None, images: Images | None = None,
        labels: Labels | None = None, init: Checkpoint | None = None, teacher: Checkpoint | None = None,
        holdout: Images | None = None,
    ) -> Checkpoint:  # fmt: skip
        heard: list[str] = []  # other processes cannot be heard: what they would have said stands in their checkpoint

        def notice(line: str) -> None:
            heard.append(line)
            context.notice(line)

        job = Fit(self, replace(context, notice=notice), labelled, images, labels, init, teacher, holdout)
        earlier = training_state.load(context.workdir)
        if context.workers is not None:
            context.workers.fit(job)
        else:
            job.run()
        state = training_state.load(context.workdir)
        if state is None:
            raise RuntimeError(f"{context.workdir}: the finished training left no checkpoint")
        context.computing += state["seconds"] - (earlier["seconds"] if earlier else 0.0)
        watched = state.get("health")
        said = [line for _, _, line in watched["said"]] if watched else []
        for line in said:
            if line not in heard:
                context.notice(line)
        if watched and watched["stopped"]:
            raise StopRound(f"{'; '.join(said)}; its checkpoint is kept")
        changes = state["workers"][1:]
        for (_, before), (step, now) in zip(state["workers"], changes, strict=False):
            context.notice(f"from step {step} on {now} instead of {before} workers; a batch stays {self.batch}")
        weights = state["average"] or state["method"]
        return Checkpoint.write(
            context.output, state=weights, encoder=self.encoder, method=self.method, classes=job.classes,
            images=job.unlabelled,
            pixels=state["pixels"], precision=state["precision"], curves=[tuple(row) for row in state["curves"]],
            facts={"steps": state["step"], "images_seen": state["images"], "precision": state["precision"],
                   "parameters": sum(v.numel() for v in state["method"].values() if v.is_floating_point()),
                   **({"workers": state["workers"]} if changes else {}),
                   **({"health": watched["facts"]} if watched and watched["facts"] else {})},
        )  # fmt: skip


def bookkeeping(steps: int, rows: dict[str, int], sizes: dict[str, int]) -> str:
    """In plain words how often each image is seen; `rows` and `sizes` by input: images there are, and of a step.

    {"labelled": 250, "images": 49750} and {"labelled": 64, "images": 192} at 1,200 steps: "1,200 steps of 64 labelled +
    192 unlabelled images: each of 250 labelled is seen 307 times, each of 49,750 unlabelled 4.6 times".
    """
    words = {"labelled": "labelled", "images": "unlabelled"}
    batch = " + ".join(f"{sizes[key]:,} {words[key]}" for key in rows)
    seen: list[str] = []
    for key, count in rows.items():
        often = steps * sizes[key] / max(1, count)
        times = f"{often:,.0f}" if often >= 10 else f"{often:.1f}"
        seen.append(f"each of {count:,} {words[key]} {'' if seen else 'is seen '}{times} times")
    return f"{steps:,} steps of {batch} images: {', '.join(seen)}"


def _unfilled(config: Any) -> Any:
    """An encoder's configuration without the wish for published weights, which a look at its shape does not need."""
    return replace(config, pretrained=False) if getattr(config, "pretrained", False) else config


@dataclass
class Fit:
    """One training, to be run by one process or by each of several: everything travels in here."""

    stage: Train
    context: Context
    labelled: Images | None
    images: Images | None
    labels: Labels | None
    init: Checkpoint | None
    teacher: Checkpoint | None = None
    holdout: Images | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """What the answer tells apart."""
        return self.context.classes if self.labels is None else self.labels.classes or self.context.classes

    @property
    def unlabelled(self) -> int:
        """How many unlabelled images there are."""
        return 0 if self.images is None else len(self.images)

    def streams(self, views: set[str]) -> tuple[Stream, ...]:
        """The streams the method's views name, in their endless orders."""
        seed, sizes = self.context.seed, self.stage._sizes(views)
        found = []
        if "labelled" in views and self.labelled is not None:
            order = Order.of(self.labelled, sizes["labelled"], seed * 2)
            found.append(Stream("labelled", self.labelled, order, label=torch.from_numpy(self.labelled.label.copy())))
        if self.images is None:
            return tuple(found)
        if self.labels is None:
            found.append(Stream("unlabelled", self.images, Order.of(self.images, sizes["images"], seed * 2 + 1)))
            return tuple(found)
        table = self.labels.table(["copies", "class"])
        copies = torch.from_numpy(table["copies"].to_numpy().astype("int64"))
        rows = torch.arange(len(self.images)).repeat_interleave(copies)
        order = Order.of(self.images, sizes["images"], seed * 2 + 1, copies=copies)
        label = torch.from_numpy(table["class"].to_numpy().astype("int64"))
        soft = getattr(self.stage.method.config, "soft", False)  # 4 bytes a class and image, which others need not hold
        target = torch.from_numpy(self.labels.probabilities()) if soft else None
        if "unlabelled" in views:
            found.append(
                Stream("unlabelled", self.images, order, target=label if target is None else target, rows=rows)
            )
        else:
            found.append(Stream("labelled", self.images, order, label=label, target=target, rows=rows))
        return tuple(found)

    def watch(
        self, method: Method, average: Method | None, total: int, precision: str, *, part: int, parts: int
    ) -> Watch | None:
        """What looks at the health of self-training: with a hold-out, or where the method makes its own labels."""
        own_labels = self.images is not None and self.labels is None and is_classifier(method)
        if self.holdout is None and not own_labels:
            return None
        return Watch(
            method, average, classes=self.classes, limits=self.stage.limits, guard=self.stage.guard, total=total,
            seed=self.context.seed, precision=precision, holdout=self.holdout, unlabelled=self.images, part=part,
            parts=parts,
        )  # fmt: skip

    def run(
        self,
        *,
        part: int = 0,
        parts: int = 1,
        wanted: int | None = None,
        wrap: Any = None,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train to the end from the last checkpoint, in this process: worker `part` of `parts`.

        Args:
            wanted: how many workers there should be; with fewer, each takes more and smaller parts of the same batches.
            wrap: makes the data-parallel wrapper of the method, where there are several workers.
            leaving: whether a worker's machine is about to be taken away; all workers ask at the same steps.
        Raises:
            Interrupted: the user asked to stop; the checkpoint is written.
            FloatingPointError: a loss is not finite.
        """
        stage, context = self.stage, self.context
        torch.set_num_threads(context.threads)
        where = device()
        torch.manual_seed(context.seed)
        method, encoder = stage.build(len(self.classes), self.unlabelled)
        precision = auto_precision(encoder) if stage.precision == "auto" else stage.precision
        if self.init is not None:
            self._start_from(self.init, method)
        method = method.to(where).to(memory_format=torch.channels_last).train()
        if stage.frozen is not None:
            freeze(encoder, stage.frozen)
        average = averaged_copy(method) if stage.ema else None
        teacher = None if self.teacher is None else self.teacher.build().to(where).to(memory_format=torch.channels_last)
        method.attach(average=average, teacher=teacher)
        optimizer = stage.optim.build(method)
        clean = next(i for i in (self.images, self.labelled) if i is not None)
        pixels = stage.pixels or clean.pixels
        streams = self.streams({view.stream for view in method.views(pixels)})
        sizes = {stream.name: stream.order.batch for stream in streams}
        named = {("images" if s.images is self.images else "labelled"): s.order for s in streams}
        total = stage._steps({k: o.rows for k, o in named.items()}, {k: o.batch for k, o in named.items()})
        start, seconds, curves = 0, 0.0, []
        workers = [[0, parts]]  # from which step on there were how many
        watch = self.watch(method, average, total, precision, part=part, parts=parts)
        saved = training_state.load(context.workdir)
        if saved is not None:
            method.load_state_dict(saved["method"])
            optimizer.load_state_dict(saved["optimizer"])
            if average is not None:
                average.load_state_dict(saved["average"])
            start, seconds, curves = saved["step"], saved["seconds"], [tuple(row) for row in saved["curves"]]
            workers = saved["workers"]
            if workers[-1][1] != parts:
                workers = [*workers, [start, parts]]
            if watch is not None and saved.get("health") is not None:
                watch.load(saved["health"])
                if watch.stopped:
                    return
            context.notice(f"goes on from step {start} of {total}")
        elif self.images is not None:
            method.on_start(clean_images(self.images, SAMPLE, context.seed).to(where))

        def save(step: int) -> None:
            if watch is not None:
                watch.settle()
            if part == 0:
                training_state.save(context.workdir, {
                    "step": step, "method": method.state_dict(), "optimizer": optimizer.state_dict(),
                    "average": average.state_dict() if average is not None else None,
                    "curves": [list(c) for c in curves], "images": step * sum(sizes.values()), "seconds": seconds,
                    "pixels": clean.pixels, "precision": precision, "workers": workers,
                    "health": None if watch is None else watch.state(),
                })  # fmt: skip

        steps = train_steps(
            method, wrap(method) if wrap else method, streams, optimizer, stage.optim, pixels=pixels, start=start,
            total=total, seed=context.seed, precision=precision, average=average, ema=stage.ema, clip=stage.clip,
            accumulate=stage.shares(method, parts, wanted or parts), part=part, parts=parts,
        )  # fmt: skip
        unsupervised = all(stream.label is None and stream.target is None for stream in streams)
        last_save = last_look = time.monotonic()
        saved_leaving = False
        waited, since, done = 0.0, time.perf_counter(), start
        for step in steps:
            seconds += step.seconds
            waited += step.waited
            number = step.number + 1
            if step.number % LOG_EVERY == 0 or number == total:
                values = self._read(step.losses, step.number, parts)
                curves += [(step.number, name, value) for name, value in values.items()]
                curves.append((step.number, "learning_rate", step.rate))
                elapsed = time.perf_counter() - since
                rate = (number - done) * sum(sizes.values()) / max(elapsed, 1e-9)
                if part == 0:
                    context.log(step.number, {**values, "learning_rate": step.rate, "images_per_second": rate,
                                              "reading_share": waited / max(elapsed, 1e-9)})  # fmt: skip
                waited, since, done = 0.0, time.perf_counter(), number
            if unsupervised and (number % max(1, total // SIGNALS) == 0 or number == total):
                signals = self._signals(method, clean, precision)
                curves += [(step.number, name, value) for name, value in signals.items()]
                if part == 0:
                    context.log(step.number, signals)
            if watch is not None:
                watch.note(step.losses)
                if watch.due(number):
                    found, lines = watch.look(number)
                    curves += [(step.number, name, value) for name, value in found.items()]
                    if part == 0:
                        context.log(step.number, found)
                    if context.watcher is not None:
                        save(number)  # whoever watches may end the training here, and its state is kept
                        context.watcher(number, total, found)
                    for line in lines:
                        context.notice(line)
                    if watch.stopped:
                        save(number)
                        return
            if part == 0:
                context.progress(number, total)
            now = time.monotonic()
            stop, due, look = (
                context.stopping(),
                now - last_save >= context.save_seconds,
                now - last_look >= LOOK_SECONDS,
            )
            if parts > 1:
                stop, due, look = _agree(stop, due, look)
            if look:
                last_look = now
                if leaving():
                    due, saved_leaving = due or not saved_leaving, True
            if number < total and (stop or due):
                save(number)
                last_save = time.monotonic()
                if stop:
                    raise Interrupted
        if start < total or total == 0:  # a finished checkpoint has this behind it
            if method.clean_norm or total == 0:
                sample = clean_images(clean, SAMPLE, context.seed).to(where)
                for model in (method, average):
                    if model is not None:
                        reset_norm(model, sample, precision)
            save(total)

    def _start_from(self, init: Checkpoint, method: Method) -> None:
        """Take over the encoder, and with `keep_head` the classifier."""
        given = init.state()
        for part in ("encoder", "head") if self.stage.keep_head else ("encoder",):
            own = {k.removeprefix(f"{part}."): v for k, v in given.items() if k.startswith(f"{part}.")}
            method.get_submodule(part).load_state_dict(own)

    def _signals(self, method: Method, images: Images, precision: str) -> dict[str, float]:
        """Alignment, uniformity and effective rank of the features of some images, in two weakly augmented views."""
        model, where = averaged_copy(method), device()
        rows = clean_rows(images, LOOKED_AT, self.context.seed)
        if method.clean_norm:
            reset_norm(model, (images.batch(rows).float() / 255).to(where), precision)
        augment, found = Augment().build(images.pixels), []
        with torch.no_grad(), autocast(precision, where.type):
            for view in range(2):
                pixels = augment(images.batch(rows).to(where), Draws.of(self.context.seed, 0, rows, view).to(where))
                found.append(model.features(pixels.contiguous(memory_format=torch.channels_last)).float().cpu())
        return {"alignment": float(alignment(*found)), "uniformity": float(uniformity(found[0])),
                "effective_rank": float(effective_rank(found[0]))}  # fmt: skip

    def _read(self, losses: dict[str, Tensor], step: int, parts: int) -> dict[str, float]:
        values = {name: float(value) for name, value in losses.items()}
        bad = [name for name, value in values.items() if not abs(value) < float("inf")]
        if _agree(bool(bad))[0] if parts > 1 else bad:  # all stop, or the others would wait for this one
            found = f"{bad[0]} is {values[bad[0]]}" if bad else "another worker's loss is not finite"
            raise FloatingPointError(
                f"{found} at step {step}: lower optim.lr, set clip: 1.0, or precision: float32; "
                "the last checkpoint is kept"
            )
        return values


def _agree(*here: bool) -> tuple[bool, ...]:
    """Of each, whether it is so for any worker: all must save, stop and fail at the same step."""
    flags = torch.tensor(here, dtype=torch.float32, device=device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in flags.tolist())
