"""Multi-task pretext training: Doersch and Zisserman 2017, arXiv:1708.07860. One encoder, a head for each puzzle."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from methods.base import Batch, Losses, Method, MethodConfig, PretextTask, View
from methods.colorization import ColorizationConfig, ColorizationTask
from methods.encoders import Encoder
from methods.inpainting import InpaintingConfig, InpaintingTask
from methods.jigsaw import JigsawConfig, JigsawTask
from methods.relative_patch import RelativePatchConfig, RelativePatchTask
from methods.rotation import RotationConfig, RotationTask
from methods.views.draws import Draws
from methods.views.policy import Augment
from methods.views.tiles import greyscale


@dataclass(frozen=True, kw_only=True)
class MultiTaskConfig(MethodConfig):
    """At least two tasks, each with its own options: `{}` takes its defaults, null leaves it out."""

    rotation: RotationConfig | None = None
    relative_patch: RelativePatchConfig | None = RelativePatchConfig()  # with colorization the pair of table 2
    jigsaw: JigsawConfig | None = None
    colorization: ColorizationConfig | None = ColorizationConfig()
    inpainting: InpaintingConfig | None = None
    augment: Augment = Augment()  # of all tasks; their own are not used
    schedule: Literal["alternate", "together"] = "alternate"  # a task a step in turn, or all and their sum: section 3.3
    weights: dict[str, float] | None = None  # λ by task; None: 1 over the loss of guessing, so that all start equal
    grey: bool = False  # every task sees grey images: harmonised inputs, section 3.2, for sets with colorization

    def __post_init__(self) -> None:
        if len(self.tasks) < 2:
            raise ValueError(f"tasks = {', '.join(self.tasks) or 'none'}: name at least two of {', '.join(TASKS)}")
        for name, weight in (self.weights or {}).items():
            if name not in self.tasks or not weight >= 0:
                raise ValueError(f"weights = {name}: {weight}: must be >= 0, of one of {', '.join(self.tasks)}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in the order of the fields."""
        return tuple(field.name for field in fields(self) if field.name in TASKS and getattr(self, field.name))


TASKS: dict[str, type[PretextTask]] = {
    "rotation": RotationTask, "relative_patch": RelativePatchTask, "jigsaw": JigsawTask,
    "colorization": ColorizationTask, "inpainting": InpaintingTask,
}  # fmt: skip


class MultiTask(Method):
    """An encoder shared by several puzzles, each with its head.

    A step of one task leaves the other heads as they are, momentum and weight decay too: without a gradient the
    optimiser passes them over. Compare with single tasks at equal updates of the encoder.
    """

    Config = MultiTaskConfig
    clean_norm = True
    skips_weights = True
    step: Tensor

    def __init__(self, encoder: Encoder, config: MultiTaskConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.heads = nn.ModuleDict({name: TASKS[name](encoder, getattr(config, name)) for name in config.tasks})  # type: ignore[call-arg]
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("image", self.config.augment.build(pixels)),)

    def on_start(self, images: Tensor) -> None:
        for head in self.heads.values():
            head.on_start(images)  # type: ignore[operator]

    def weight(self, name: str) -> float:
        """λ of a task: what the recipe says, or 1 over the loss of guessing, in nats."""
        if self.config.weights is not None:
            return self.config.weights.get(name, 1.0)
        return 1 / self.heads[name].chance_loss  # type: ignore[operator,return-value]

    def training_step(self, batch: Batch, progress: float) -> Losses:
        images, draws = batch["image"], Draws(batch["unlabelled.key"])
        if self.config.grey:
            images = greyscale(images, torch.ones(len(images), dtype=torch.bool, device=images.device))
        names = self.config.tasks
        if self.config.schedule == "alternate":
            names = (names[int(self.step) % len(names)],)
        found: Losses = {"loss": torch.zeros((), device=images.device)}
        for name in names:
            losses = self.heads[name](self.encoder, images, draws)  # the draws it would have alone
            found["loss"] = found["loss"] + self.weight(name) * losses["loss"]
            found |= {f"{name}_{key}": value.detach() for key, value in losses.items() if key == "loss"}
            found |= {key: value for key, value in losses.items() if key != "loss"}
        return found

    def on_step_end(self, progress: float) -> None:
        self.step += 1

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)
