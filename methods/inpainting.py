"""Context encoders: Pathak et al. 2016, arXiv:1604.07379. Fill what was cut out of an image from what is around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.func import functional_call

from methods.base import Batch, Losses, Method, MethodConfig, PretextTask, View
from methods.collectives import all_gather
from methods.encoders import IMAGENET_MEAN, Encoder, tap_shapes
from methods.losses.inpainting import fooling_loss, masked_l2, overlap_weight, telling_loss
from methods.precision import full_precision
from methods.views.draws import Draws
from methods.views.policy import Augment

REFERENCE = 64  # pixels of the image on which the encoder's stride is measured
WAVES = 16  # plane waves whose sum gives a region its shape
WAVELENGTHS = (1.0, 3.0)  # of them to an image's side: a region is one to a few blobs


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig(MethodConfig):
    augment: Augment = Augment()
    mask: Literal["center", "blocks", "region"] = "region"  # a fixed centre teaches to ignore it, section 3.3
    area: float = 0.25  # share of the image: all of a region, the most that blocks cover, section 3.3
    blocks: int = 4  # of one image, possibly overlapping; "several" in section 3.3
    overlap: int = 1  # center: pixels of context that are predicted too. 4 of 128 in the paper, section 5.1
    overlap_weight: float = 10.0  # ω there, section 5.1
    decoder_dim: int = 256  # channels of the bottleneck; 4000 units in the released code
    lambda_adv: float = 0.0  # share of the adversarial loss, which mainly sharpens; 0.001 in the paper, section 5.1
    discriminator_dim: int = 32  # channels of its first convolution; 64 in the released code

    def __post_init__(self) -> None:
        if not 0 < self.area <= 0.5:
            raise ValueError(f"area = {self.area}: must be in (0, 0.5], a share of the image")
        for name in ("blocks", "decoder_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} = {value}: must be >= 1")
        if self.overlap < 0:
            raise ValueError(f"overlap = {self.overlap}: must be >= 0 pixels")
        if not self.overlap_weight > 0:
            raise ValueError(f"overlap_weight = {self.overlap_weight}: must be > 0")
        if not 0 <= self.lambda_adv < 1:
            raise ValueError(f"lambda_adv = {self.lambda_adv}: must be in [0, 1), the rest is the reconstruction's")
        if self.discriminator_dim < 8 or self.discriminator_dim % 8:
            raise ValueError(
                f"discriminator_dim = {self.discriminator_dim}: must be a multiple of 8, its norm has 8 groups"
            )


class InpaintingTask(PretextTask):
    """A decoder from the encoder's last map to pixels, and with `lambda_adv` a discriminator of what it fills in.

    In mode center the decoder gives the middle half of the image, as published; the hole is that less the overlap. In
    the other modes it gives the whole image, and only the holes count.
    """

    chance_loss = 0.25  # the mean colour for pixels that deviate by 0.5 of [-1, 1], as in CIFAR-10
    fill: Tensor

    def __init__(self, encoder: Encoder, config: InpaintingConfig) -> None:
        super().__init__()
        self.config = config
        channels, *sides = list(tap_shapes(encoder, REFERENCE).values())[-2]  # the last is the feature
        doublings = round(math.log2(REFERENCE / min(sides))) - (config.mask == "center")
        self.decoder = decoder(channels, config.decoder_dim, max(0, doublings))
        self.register_buffer("fill", torch.tensor(IMAGENET_MEAN))  # mean colour in [0, 1], until on_start
        self.discriminator = discriminator(config.discriminator_dim) if config.lambda_adv else None

    @torch.no_grad()
    def on_start(self, images: Tensor) -> None:
        """Takes the mean colour of clean training images (M, 3, H, W) in [0, 1], with which holes are filled."""
        self.fill.copy_(reduce(images, "m c h w -> c", "mean"))

    def forward(self, encoder: Encoder, images: Tensor, draws: Draws) -> Losses:
        """As `PretextTask.forward`, with errors in units of [-1, 1].

        With a discriminator also "reconstruction", "adversarial" and "discriminator". The last one is added to the
        paper's loss: one backward pass serves both players, since neither's loss reaches the other's weights.
        """
        c = self.config
        side = images.shape[-1]
        if c.mask == "center":
            patch = side // 2
            weight = overlap_weight(patch, overlap=c.overlap, strength=c.overlap_weight, device=images.device)
            window = slice((side - patch) // 2, (side - patch) // 2 + patch)
            hole, counted = center_hole(side, c.overlap, images.device), None
        else:
            hole = random_hole(draws, side, mode=c.mask, area=c.area, blocks=c.blocks)
            weight, window = hole.float(), slice(None)
            counted = all_gather(
                weight.sum()[None]
            ).mean()  # blocks overlap, so workers have different numbers of pixels
        predicted = self.predict(encoder, images, hole)
        target = 2 * images[..., window, window] - 1
        reconstruction = masked_l2(predicted, target, weight, counted=counted)
        if self.discriminator is None:
            return {"loss": reconstruction}
        fake = torch.where(weight > 0, predicted.float(), target)  # what lies around a region is not the decoder's
        fooling, telling = adversarial(self.discriminator, real=target, fake=fake)
        return {
            "loss": (1 - c.lambda_adv) * reconstruction + c.lambda_adv * fooling + telling,
            "reconstruction": reconstruction.detach(),
            "adversarial": fooling.detach(),
            "discriminator": telling.detach(),
        }

    def predict(self, encoder: Encoder, images: Tensor, hole: Tensor) -> Tensor:
        """The decoder's pixels in [-1, 1], (B, 3, H, W), or (B, 3, H // 2, W // 2) in mode center.

        Args:
            images: (B, 3, H, W) in [0, 1]. hole: bool (B, 1, H, W) or (1, 1, H, W): not seen, filled with the mean.
        """
        seen = torch.where(hole, self.fill[:, None, None], images)
        *_, last, _ = encoder.maps(seen).values()
        predicted = self.decoder(last)
        shape = [side // 2 if self.config.mask == "center" else side for side in images.shape[2:]]
        if list(predicted.shape[2:]) != shape:  # a side that is no multiple of the encoder's stride
            predicted = F.interpolate(predicted, shape, mode="bilinear")
        return predicted


class Inpainting(Method):
    """An encoder of images with holes, trained to tell what was there."""

    Config = InpaintingConfig
    clean_norm = True  # trains on images with holes

    def __init__(self, encoder: Encoder, config: InpaintingConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.task = InpaintingTask(encoder, config)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("image", self.config.augment.build(pixels)),)

    def on_start(self, images: Tensor) -> None:
        self.task.on_start(images)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        return self.task(self.encoder, batch["image"], Draws(batch["unlabelled.key"]))

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)


def decoder(channels: int, dim: int, doublings: int) -> nn.Sequential:
    """(B, channels, h, w) to (B, 3, h 2^doublings, w 2^doublings) in [-1, 1].

    For SmallCNN and a central hole: 1 by 1 to 256, twice doubled to 128 and 64, 3 by 3 to 3, tanh.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
    for _ in range(doublings):
        before, dim = dim, max(32, dim // 2)
        up = nn.ConvTranspose2d(before, dim, 4, stride=2, padding=1, bias=False)
        layers += [up, nn.BatchNorm2d(dim), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(dim, 3, 3, padding=1), nn.Tanh())


def discriminator(dim: int) -> nn.Sequential:
    """(B, 3, h, w) to logits (B, 1), of being real.

    Groups are normalised where the paper has batch norm: its statistics would be one more thing that generator and
    discriminator share. And the last map is averaged, so that any size is read.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, dim, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for before in (dim, 2 * dim):
        conv = nn.Conv2d(before, 2 * before, 4, stride=2, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(8, 2 * before), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * dim, 1))


def adversarial(judge: nn.Module, *, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Both players' losses: the first has gradients for `fake` alone, the second for the judge's weights alone.

    Returns:
        The generator's and the discriminator's, 0-d float32 in nats.
    """
    frozen = {name: weight.detach() for name, weight in judge.named_parameters()}
    fooling = fooling_loss(functional_call(judge, frozen, (fake,)))
    return fooling, telling_loss(judge(real), judge(fake.detach()))


def center_hole(side: int, overlap: int, device: torch.device | None = None) -> Tensor:
    """The middle half of an image less `overlap` pixels on each side, (1, 1, side, side) bool."""
    patch = side // 2
    first = (side - patch) // 2 + overlap
    hole = torch.zeros(1, 1, side, side, dtype=torch.bool, device=device)
    hole[..., first : first + patch - 2 * overlap, first : first + patch - 2 * overlap] = True
    return hole


def random_hole(draws: Draws, side: int, *, mode: Literal["blocks", "region"], area: float, blocks: int) -> Tensor:
    """Where each image is cut out, (B, 1, side, side) bool, at random places: see `block_holes` and `region_hole`."""
    if mode == "blocks":
        return block_holes(draws, side, area=area, count=blocks)
    return region_hole(draws, side, area=area)


def block_holes(draws: Draws, side: int, *, area: float, count: int) -> Tensor:
    """`count` rectangles, possibly overlapping, that cover at most `area` of the image, section 3.3.

    Returns:
        (B, 1, side, side) bool; height and width of a rectangle are each between half and all of what may be.
    """
    largest = max(1, math.floor(side * math.sqrt(area / count)))
    smallest = (largest + 1) // 2
    pixel = torch.arange(side, device=draws.key.device)

    def spans(stream: int) -> Tensor:
        unit = draws.fork(stream).uniform(2 * count)
        length = smallest + (unit[:, :count] * (largest - smallest + 1)).long()
        first = (unit[:, count:] * (side - length + 1)).long()
        return (pixel >= first[..., None]) & (pixel < (first + length)[..., None])

    down, across = spans(0), spans(1)
    return rearrange((down[..., :, None] & across[..., None, :]).any(dim=1), "b h w -> b 1 h w")


@full_precision
def region_hole(draws: Draws, side: int, *, area: float) -> Tensor:
    """The `area` of the image where a random smooth field is highest: a region of arbitrary shape, section 3.3.

    The field is a sum of plane waves. The paper takes the shapes of objects from PASCAL VOC.

    Returns:
        (B, 1, side, side) bool, each image with round(area · side²) pixels, at least one.
    """
    direction, length, phase = draws.uniform(3 * WAVES).chunk(3, dim=1)
    low, high = WAVELENGTHS
    frequency = 2 * math.pi * (low + (high - low) * length)
    direction = 2 * math.pi * direction
    place = (torch.arange(side, device=draws.key.device) + 0.5) / side
    down = (frequency * direction.sin())[..., None] * place
    across = (frequency * direction.cos())[..., None] * place + (2 * math.pi * phase)[..., None]
    field = einsum(down.cos(), across.cos(), "b k h, b k w -> b h w")
    field = field - einsum(down.sin(), across.sin(), "b k h, b k w -> b h w")
    flat = rearrange(field, "b h w -> b (h w)")
    highest = flat.topk(max(1, round(area * side**2)), dim=1).indices
    hole = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, highest, True)
    return rearrange(hole, "b (h w) -> b 1 h w", h=side)
