"""ReMixMatch: Berthelot et al. 2019, arXiv:1911.09785. MixMatch with aligned guesses, strong views and a rotation task.

Strong views take the guess made for the weak one (augmentation anchoring), and the guesses' classes are brought to the
frequencies of the labels (distribution alignment).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.collectives import all_reduce, workers
from methods.consistency import acceptance, early_ramp, linear_ramp, norm_statistics_kept, sharpen, together
from methods.encoders import Encoder
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.mixup import mix_up, pool_draws
from methods.precision import full_precision
from methods.views.ctaugment import CTAugment, CTAugmentConfig, recognised
from methods.views.draws import Draws
from methods.views.policy import Augment
from methods.views.tiles import turn

TURN, PROBE = 1, 2  # what an image's draws are for, besides mixing
HISTORY = 128  # batches whose predictions are remembered, section 3.1
LABEL_DECAY = 0.999  # of the running mean of the labels, the released code
SMALLEST = 1e-6  # added to both frequencies, the released code


@dataclass(frozen=True, kw_only=True)
class ReMixMatchConfig(MethodConfig):
    weak: Augment = Augment()  # flip and shift, section 3.2
    strong: CTAugmentConfig = CTAugmentConfig()  # section 3.2.2
    strong_views: int = 1  # K of each unlabelled image, as in TorchSSL's form; section 4: 8
    marginal: tuple[float, ...] | None = None  # frequency of each class among the unlabelled, where known
    temperature: float = 0.5  # T that sharpens the guess, section 4
    alpha: float = 0.75  # of MixUp's Beta(α, α), section 4
    unlabelled_weight: float = 1.5  # λ_U of the mixtures, section 4
    strong_weight: float = 0.5  # λ_Û1 of one strong view that is not mixed, section 4
    rotation_weight: float = 0.5  # λ_r, section 4
    ramp: float = 1 / 64  # share of training in which the first two rise: 1024 · 1024 of 2^26 images, released code
    dropout: float = 0.0  # on the pooled features; the paper has none

    def __post_init__(self) -> None:
        if self.strong_views < 1:
            raise ValueError(f"strong_views = {self.strong_views}: must be >= 1")
        if self.marginal is not None:
            if not all(share > 0 for share in self.marginal) or abs(sum(self.marginal) - 1) > 1e-3:
                raise ValueError(f"marginal = {self.marginal}: must be frequencies > 0 that sum to 1")
        for name, what in (("temperature", "1 does not sharpen"), ("alpha", "small mixes little")):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} = {value}: must be > 0; {what}")
        self.check_weights("unlabelled_weight", "strong_weight", "rotation_weight")
        self.check_shares("ramp")
        self.check_fractions("dropout")

    def advice(self, steps: int) -> str | None:
        return early_ramp(self.ramp, steps)


class ReMixMatch(Method):
    """A classifier on mixtures, as MixMatch, and on one strong view of each unlabelled image, as it is and turned.

    How strong the strong views are is learned by CTAugment from labelled images that the average is asked about.

    Labelled images are weakly augmented, as in the released code; algorithm 1 of the paper has them strongly so.

    Batch norm: the mixtures go through in one pass, which moves the running statistics; the guess and the views that
    are not mixed are normalised by those of their own batches and move nothing.
    """

    Config = ReMixMatchConfig
    needs_average = True

    def __init__(self, encoder: Encoder, config: ReMixMatchConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder, self.classes = config, encoder, classes
        self.head = classifier(encoder.dim, classes, config.dropout)
        self.rotation_head = nn.Linear(encoder.dim, 4)
        self.alignment = Alignment(classes, config.marginal)
        self.policy = CTAugment(config.strong)
        self._probed: list[tuple[Tensor, Tensor]] = []  # of this step, one a micro-batch; empty between steps
        self.strong_names = ("strong", *(f"strong{number}" for number in range(2, config.strong_views + 1)))

    def views(self, pixels: int) -> tuple[View, ...]:
        weak, strong = self.config.weak.build(pixels), self.policy.strong(pixels)
        return (
            View("labelled", weak, stream="labelled"), View("weak", weak),
            *(View(name, strong) for name in self.strong_names),
        )  # fmt: skip

    def training_step(self, batch: Batch, progress: float) -> Losses:
        c, label = self.config, batch["label"]
        strong = [batch[name] for name in self.strong_names]
        with torch.no_grad(), norm_statistics_kept(self):
            prediction = self.logits(batch["weak"])
        target = sharpen(self.alignment(prediction, label), c.temperature)
        known = F.one_hot(label, self.classes).to(target.dtype)
        images, mixed = mix_up(
            torch.cat([batch["labelled"], batch["weak"], *strong]), torch.cat([known, *[target] * (1 + len(strong))]),
            pool_draws(batch, views=1 + len(strong)), alpha=c.alpha,
        )  # fmt: skip
        logits, rows = self.logits(images), len(label)
        quarters = quarter_turns(Draws(batch["unlabelled.key"]).fork(TURN))
        with norm_statistics_kept(self):
            plain, turned = together(self.encoder, strong[0], turn(strong[0], quarters))
        self.probe(batch["labelled"], label, Draws(batch["labelled.key"]).fork(PROBE))
        labelled_loss = cross_entropy(logits[:rows], mixed[:rows])
        unlabelled_loss = cross_entropy(logits[rows:], mixed[rows:])
        strong_loss = cross_entropy(self.head(plain), target)
        rotation_loss = cross_entropy(self.rotation_head(turned), quarters)
        weighted = c.unlabelled_weight * unlabelled_loss + c.strong_weight * strong_loss
        return {
            "loss": labelled_loss + linear_ramp(progress, c.ramp) * weighted + c.rotation_weight * rotation_loss,
            "labelled_loss": labelled_loss.detach(), "unlabelled_loss": unlabelled_loss.detach(),
            "strong_loss": strong_loss.detach(), "rotation_loss": rotation_loss.detach(),
            "train_accuracy": (logits[:rows].argmax(dim=1) == label).float().mean(),  # of mixtures
            **acceptance(target, target.new_ones(len(target))),
        }  # fmt: skip

    @torch.no_grad()
    def probe(self, images: Tensor, label: Tensor, draws: Draws) -> None:
        """Asks the average what it makes of labelled images under random operations, for the policy's next update."""
        assert isinstance(self.average, ReMixMatch), "the average was not lent: see Method.attach"
        probes, record = self.policy.probe(images, draws)
        probability = full_precision(torch.softmax)(self.average.logits(probes.to(images.dtype)), 1)
        self._probed.append((record, recognised(probability, label)))

    def on_step_end(self, progress: float) -> None:
        self.alignment.update()
        if self._probed:
            record, match = (torch.cat(parts) for parts in zip(*self._probed, strict=True))
            self.policy.update(record, match)
        self._probed = []

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))


class Alignment(nn.Module):
    """Brings predictions to the frequencies of the classes, section 3.1: those of the labels, or given ones.

    What a step predicts and its labels are remembered in `update`, after it: its own guesses are aligned by those
    before. Every worker remembers the same, the mean over all.
    """

    predicted: Tensor
    place: Tensor
    marginal: Tensor

    def __init__(self, classes: int, marginal: tuple[float, ...] | None) -> None:
        super().__init__()
        if marginal is not None and len(marginal) != classes:
            raise ValueError(f"marginal = {marginal}: has {len(marginal)} frequencies, and there are {classes} classes")
        self.known = marginal is not None
        self.register_buffer("predicted", torch.full((HISTORY, classes), 1 / classes))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer(
            "marginal", torch.full((classes,), 1 / classes) if marginal is None else torch.tensor(marginal)
        )
        self._seen: list[Tensor] = []  # of this step, one a micro-batch; empty between steps

    @torch.no_grad()
    @full_precision
    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """The aligned predictions (B, K) of logits (B, K), which with the labels (N,) int64 are kept for `update`."""
        probability = logits.softmax(dim=1)
        known = F.one_hot(label, probability.shape[1]).to(probability.dtype)
        self._seen.append(torch.stack([probability.mean(dim=0), known.mean(dim=0)]))
        return align(probability, marginal=self.marginal, predicted=self.predicted.mean(dim=0))

    @torch.no_grad()
    def update(self) -> None:
        """After the optimiser's step: the oldest of the batches makes way for this step's."""
        if not self._seen:
            return
        prediction, labels = all_reduce(torch.stack(self._seen).mean(dim=0)) / workers()
        self._seen = []
        self.predicted[self.place] = prediction
        self.place.add_(1).remainder_(HISTORY)
        if not self.known:
            self.marginal.lerp_(labels, 1 - LABEL_DECAY)


@full_precision
def align(probability: Tensor, *, marginal: Tensor, predicted: Tensor) -> Tensor:
    """q ∝ p · p̂ / p̄ of distributions (B, K), section 3.1: equal frequencies change nothing.

    Args:
        marginal: p̂, of the labels. predicted: p̄, the running mean of predictions. Both (K,).
    Returns:
        (B, K): (.6, .3, .1) with p̂ uniform and p̄ = (.5, .3, .2) is (.444, .370, .185).
    """
    aligned = probability * (marginal + SMALLEST) / (predicted + SMALLEST)
    return aligned / aligned.sum(dim=1, keepdim=True)


def quarter_turns(draws: Draws) -> Tensor:
    """By how many quarters each image is turned, (B,) int64: each of 0 .. 3 for a quarter of the batch, drawn which."""
    rank = draws.fork(0).bits(1)[:, 0].argsort(stable=True).argsort()
    return (rank + draws.fork(1).integers(1, 4)[0]) % 4  # else a batch of fewer than four had no last quarter
