"""Colorization: Zhang et al. 2016, arXiv:1603.08511. Tell an image's colours from its lightness.

As classification of each pixel over a grid of colours, rare ones weighted up, or as regression, whose colours are dull:
the mean of what is possible lies near grey.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Batch, Losses, Method, MethodConfig, PretextTask, View
from methods.collectives import all_gather
from methods.encoders import Encoder, tap_shapes
from methods.losses.colorization import (
    annealed_mean,
    colour_cross_entropy,
    colour_distance,
    nearest_bins,
    rebalance,
    smooth_prior,
    soft_encode,
)
from methods.views.draws import Draws
from methods.views.lab import gamut_bins, rgb_to_lab
from methods.views.policy import Augment

STRIDE = 4  # pixels of the image to one of the colour map, section 3.1
SCALE = 110.0  # regression is of ab in units of this
CHUNK = 64  # images whose colours are counted at once
REFERENCE = 64  # pixels of the image on which the encoder's strides are measured


@dataclass(frozen=True, kw_only=True)
class ColorizationConfig(MethodConfig):
    augment: Augment = Augment()  # crop and flip only, as published: jittered colours would be wrong answers
    form: Literal["classification", "regression"] = "classification"
    pitch: int = 20  # units of a and b between bins: 59 bins. 10 in the paper, section 2.1
    neighbours: int = 5  # bins that share a pixel, section 2.1; the released training layer has 10
    sigma: float = 5.0  # of the Gaussian over them, in units of a and b, section 2.1
    prior_sigma: float = 5.0  # of the Gaussian that smooths the prior, section 2.2
    uniform: float = 0.5  # λ, share of the uniform in the prior that weights invert, section 2.2; 1: no rebalancing
    temperature: float = 0.38  # T of decoding, section 2.3
    min_colour: float = 5.0  # images with no |a| or |b| above this are left out, the released code's mask
    huber: bool = False  # regression: linear beyond 20 units of a or b

    def __post_init__(self) -> None:
        if not 5 <= self.pitch <= 50:
            raise ValueError(f"pitch = {self.pitch}: must be in [5, 50], units of a and b between bins")
        if self.form == "classification" and not 1 <= self.neighbours <= len(gamut_bins(self.pitch)):
            most = len(gamut_bins(self.pitch))
            raise ValueError(
                f"neighbours = {self.neighbours}: must be in [1, {most}], pitch {self.pitch} has {most} bins"
            )
        for name in ("sigma", "prior_sigma", "temperature"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} = {value}: must be > 0")
        if not 0 < self.uniform <= 1:
            raise ValueError(
                f"uniform = {self.uniform}: must be in (0, 1], at 0 a colour never met would weigh infinitely"
            )
        if not self.min_colour >= 0:
            raise ValueError(f"min_colour = {self.min_colour}: must be >= 0")
        if self.huber and self.form != "regression":
            raise ValueError(f"huber = {self.huber}: belongs to form: regression, not {self.form}")


class ColorizationTask(PretextTask):
    """A 1 by 1 convolution on the encoder's deepest map of stride 8 or less, enlarged to stride 4.

    What an encoder has beyond that map does not learn from this; an encoder of stride 8, such as SmallCNN or a ResNet
    with the small stem, has nothing there.
    """

    bins: Tensor
    prior: Tensor

    def __init__(self, encoder: Encoder, config: ColorizationConfig) -> None:
        super().__init__()
        self.config = config
        self.tap, channels = colour_tap(encoder)
        if config.form == "regression":
            self.chance_loss = 0.02  # grey for pixels whose a and b deviate by about 15
            self.head = nn.Conv2d(channels, 2, 1)
            return
        bins = torch.tensor(gamut_bins(config.pitch))
        self.chance_loss = math.log(len(bins))
        self.register_buffer("bins", bins)  # (Q, 2)
        self.register_buffer("prior", torch.full((len(bins),), 1 / len(bins)))  # p̃, until on_start
        self.head = nn.Conv2d(channels, len(bins), 1)

    @torch.no_grad()
    def on_start(self, images: Tensor) -> None:
        """Counts the colours of clean training images (M, 3, H, W) in [0, 1] for the prior, as the loss will meet them.

        Without a coloured image among them the prior stays uniform.
        """
        if self.config.form == "regression":
            return
        counts = torch.zeros(len(self.bins), dtype=torch.float64, device=self.bins.device)
        for chunk in images.split(CHUNK):
            _, colours = lightness_and_colours(chunk)
            colours = colours[has_colour(colours, self.config.min_colour)]
            _, index = nearest_bins(colours, self.bins, count=1)
            counts += torch.bincount(index.flatten(), minlength=len(counts))
        if counts.sum() > 0:
            self.prior.copy_(smooth_prior(counts, self.bins.double(), sigma=self.config.prior_sigma))

    def forward(self, encoder: Encoder, images: Tensor, draws: Draws) -> Losses:
        """As `PretextTask.forward`; also "chroma", the mean length of the predicted (a, b). Nothing is drawn."""
        grey, target = lightness_and_colours(images)
        output = self.output(encoder, grey, target.shape[2:])
        mask = has_colour(target, self.config.min_colour)
        counted = all_gather(mask.sum(dtype=torch.float32)[None]).mean()
        if self.config.form == "regression":
            huber = 20 / SCALE if self.config.huber else None
            loss = colour_distance(output, target / SCALE, mask=mask, huber=huber, counted=counted)
        else:
            index, share = soft_encode(target, self.bins, neighbours=self.config.neighbours, sigma=self.config.sigma)
            weights = rebalance(self.prior, uniform=self.config.uniform)
            loss = colour_cross_entropy(output, index, share, weights=weights, mask=mask, counted=counted)
        with torch.no_grad():
            chroma = self.decode(output).norm(dim=1).mean()
        return {"loss": loss, "chroma": chroma}

    def output(self, encoder: Encoder, grey: Tensor, shape: torch.Size) -> Tensor:
        """The head's (B, Q or 2, h, w) of grey images (B, 3, H, W), at `shape` (h, w).

        The head comes before the enlarging: of two linear maps, one over channels and one over places, either may be
        first, and this way is cheaper.
        """
        return F.interpolate(self.head(encoder.maps(grey)[self.tap]), shape, mode="bilinear")

    def decode(self, output: Tensor) -> Tensor:
        """Colours (a, b), (B, 2, h, w) float32, of the head's output."""
        if self.config.form == "regression":
            return SCALE * output.float()
        return annealed_mean(output, self.bins, temperature=self.config.temperature)

    def colours(self, encoder: Encoder, images: Tensor) -> Tensor:
        """Predicted (a, b), (B, 2, H / 4, W / 4), of images (B, 3, H, W) in [0, 1], whose own colours are not read."""
        grey, target = lightness_and_colours(images)
        return self.decode(self.output(encoder, grey, target.shape[2:]))


class Colorization(Method):
    """An encoder of grey images, trained to tell their colours."""

    Config = ColorizationConfig
    clean_norm = True  # trains on grey images
    skips_weights = True  # an encoder of stride 16 or more has blocks beyond the map that is read

    def __init__(self, encoder: Encoder, config: ColorizationConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.task = ColorizationTask(encoder, config)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("image", self.config.augment.build(pixels)),)

    def on_start(self, images: Tensor) -> None:
        self.task.on_start(images)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        return self.task(self.encoder, batch["image"], Draws(batch["unlabelled.key"]))

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)


def lightness_and_colours(images: Tensor) -> tuple[Tensor, Tensor]:
    """What is seen and what is asked.

    Args:
        images: (B, 3, H, W) in [0, 1].
    Returns:
        L / 100 in three equal channels, (B, 3, H, W) in [0, 1], so that the same first layer later reads colour images;
        and the means of (a, b) over 4 by 4 pixels, (B, 2, H / 4, W / 4): picking every fourth would alias.
    """
    lab = rgb_to_lab(images)
    lightness = (lab[:, :1] / 100).clamp(0, 1).expand_as(images)  # white is 100.00001 in float32
    shape = [max(1, round(side / STRIDE)) for side in images.shape[2:]]
    return lightness, F.interpolate(lab[:, 1:], shape, mode="area")


def has_colour(colours: Tensor, minimum: float) -> Tensor:
    """(B,) bool: whether any |a| or |b| of colours (B, 2, h, w) is above `minimum`."""
    return (colours.abs() > minimum).flatten(1).any(dim=1)


def colour_tap(encoder: Encoder) -> tuple[str, int]:
    """Name and channels of the encoder's deepest map with at least an eighth of the image's side.

    Raises:
        ValueError: all its maps are smaller.
    """
    maps = {name: shape for name, shape in tap_shapes(encoder, REFERENCE).items() if len(shape) == 3}
    fine = [name for name, shape in maps.items() if 8 * min(shape[1:]) >= REFERENCE]
    if not fine:
        raise ValueError(
            f"{type(encoder).__name__}: its maps {', '.join(maps)} are all of stride above 8; "
            "colorization needs a finer one, such as ResNet's layer2"
        )
    return fine[-1], maps[fine[-1]][0]
