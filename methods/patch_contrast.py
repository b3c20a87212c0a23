"""Contrastive patches: near ones belong together, far ones and other images' do not.

Pairs of patches, and the prediction of patches from those above, follow CPC: van den Oord et al. 2018,
arXiv:1807.03748, section 3.3, and Hénaff et al. 2019, arXiv:1905.09272. Instance discrimination, crops of an image
against all other images, is Wu et al. 2018, arXiv:1805.01978.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from methods.bank import BankContrast, Form, Negatives, check_contrast
from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.collectives import all_gather, own_rows
from methods.encoders import Encoder
from methods.losses.nce import info_nce, mean_cosine
from methods.precision import full_precision
from methods.views.draws import Draws
from methods.views.policy import Augment
from methods.views.simclr import simclr_augment
from methods.views.tiles import cut_tiles, greyscale

CUT, FLIP, GREY, POSITIVE, NEGATIVES = range(5)  # streams of an image's draws


@dataclass(frozen=True, kw_only=True)
class NearbyPatchesConfig(MethodConfig):
    augment: Augment = Augment()
    grid: int = 4  # cells a side; they do not overlap, or pixels could be matched
    cell: int = 8  # pixels, after scaling the image to grid x cell; CPC's patches are 64 of 256 pixels
    tile: int = 7  # pixels, at a random place of its cell; 60 of 64 in CPC
    near: int = 1  # greatest distance of a positive, in cells
    far: int = 2  # least distance of a negative of the same image, in cells: 4 strides of CPC's overlapping patches
    grey: float = 0.2  # chance of a patch to lose its colours, each on its own
    temperature: float = 0.1  # τ; a greater 1/τ punishes twins, such as two patches of sky, harder
    negative_count: int = 256  # patches of the batch that every anchor is compared with, the own image's left out
    out_dim: int = 128

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: must be > 0, it divides similarities")
        if not 1 <= self.near < self.far:
            raise ValueError(f"near = {self.near}, far = {self.far}: need 1 <= near < far, distances in cells")
        if self.grid <= self.far:
            raise ValueError(f"grid = {self.grid}: must be > far = {self.far}, or no patch is far from another")
        if not 1 <= self.tile <= self.cell:
            raise ValueError(f"tile = {self.tile}: must be in [1, cell = {self.cell}] pixels")
        if not 0 <= self.grey <= 1:
            raise ValueError(f"grey = {self.grey}: must be in [0, 1], a chance")
        _check_sizes(self.out_dim, self.negative_count)


class NearbyPatches(Method):
    """An encoder of patches: each picks one of its neighbours among far patches of its image and other images' patches.

    Use an encoder with `norm: group`: batch norm's statistics would tell which patches share an image.
    """

    Config = NearbyPatchesConfig
    needs_distinct = True  # an image that is in a batch twice would be its own negative
    clean_norm = True  # trains on patches

    def __init__(self, encoder: Encoder, config: NearbyPatchesConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = nn.Linear(encoder.dim, config.out_dim)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("image", self.config.augment.build(pixels)),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        c, draws = self.config, Draws(batch["unlabelled.key"])
        patches = self.projector(self.encoder(self.patches(batch["image"], draws))).unflatten(0, (-1, c.grid**2))
        distance = cell_distance(c.grid).to(draws.key.device)
        near = (distance > 0) & (distance <= c.near)
        # the greatest of random numbers on the neighbours' places names one of them
        chance = draws.fork(POSITIVE).uniform(c.grid**4).unflatten(1, (c.grid**2, -1))
        positive = torch.where(near, chance, -1).argmax(dim=2)
        every = all_gather(patches)
        chosen = draw_patches(all_gather(draws.key[:1])[:1], len(every) * c.grid**2, c.negative_count)
        loss = nearby_loss(
            patches, every.flatten(0, 1).index_select(0, chosen), positive=positive, far=distance >= c.far,
            image=chosen // c.grid**2, first=own_rows(len(patches)).start, temperature=c.temperature,
        )  # fmt: skip
        return {"loss": loss, "mean_cosine": mean_cosine(patches.flatten(0, 1))}

    @full_precision
    def patches(self, images: Tensor, draws: Draws) -> Tensor:
        """Patches (B · grid², 3, tile, tile) of images (B, 3, H, W), an image's together, cells row by row; each is
        shifted, mirrored and greyed on its own."""
        c = self.config
        patches = cut_tiles(_resized(images, c.grid * c.cell), draws.fork(CUT), grid=c.grid, tile=c.tile)
        return vary(patches.flatten(0, 1), draws, count=c.grid**2, grey=c.grey, flip=c.augment.flip)

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)


@full_precision
def nearby_loss(
    patches: Tensor, negatives: Tensor, *, positive: Tensor, far: Tensor, image: Tensor, first: int,
    temperature: float,
) -> Tensor:  # fmt: skip
    """InfoNCE of each patch with its positive against far patches of its image and patches of other images.

    Args:
        patches: (B, P, D), negatives: (K, D), of any length: normalised here.
        positive: (B, P) int64, which patch of its image each should be like.
        far: (P, P) bool, which patches of one image are negatives of each other.
        image: (K,) int64, whose patches the negatives are; those of an anchor's own image do not count. Anchors' images
            are first .. first + B - 1.
        temperature: τ > 0, dividing cosine similarities.
    Returns:
        Mean over the B · P anchors, 0-d float32 in nats; equal similarities and n candidates give ln n.
    """
    patches, negatives = F.normalize(patches, dim=2), F.normalize(negatives, dim=1)
    inside = patches @ patches.mT / temperature  # (B, P, P)
    outside = patches @ negatives.T / temperature  # (B, P, K)
    column = positive[:, :, None]
    inside = inside.masked_fill(~far.expand_as(inside).scatter(2, column, True), -torch.inf)
    own = image == torch.arange(first, first + len(patches), device=image.device)[:, None]
    outside = outside.masked_fill(own[:, None], -torch.inf)
    return info_nce(torch.cat([inside, outside], dim=2).flatten(0, 1), positive.flatten())


@dataclass(frozen=True, kw_only=True)
class PredictivePatchesConfig(MethodConfig):
    augment: Augment = Augment()
    side: int = 32  # pixels an image is scaled to; 256 in CPC
    patch: int = 8  # pixels; 64 in CPC
    stride: int = 4  # pixels, half a patch: 7 x 7 patches, as in CPC
    jitter: int = 1  # pixels that each patch is shifted by at most, a random crop of patch - jitter; 4 in CPC
    grey: float = 0.2  # chance of a patch to lose its colours, each on its own
    rows: int = 5  # how many rows below are predicted, as in CPC
    layers: int = 2  # masked convolutions
    negative_count: int = 256  # patches of the batch that every prediction is compared with
    out_dim: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.patch <= self.side:
            raise ValueError(f"patch = {self.patch}: must be in [1, side = {self.side}] pixels")
        if not self.patch <= 2 * self.stride:
            raise ValueError(
                f"stride = {self.stride}: must be >= patch / 2 = {self.patch / 2}, or a context holds predicted pixels"
            )
        if (self.side - self.patch) % self.stride:
            raise ValueError(f"stride = {self.stride}: must divide side - patch = {self.side - self.patch}")
        if not 0 <= self.jitter < self.patch:
            raise ValueError(f"jitter = {self.jitter}: must be in [0, patch = {self.patch})")
        if not 1 <= self.rows <= self.grid - 2:
            raise ValueError(
                f"rows = {self.rows}: must be in [1, {self.grid - 2}], below the second of {self.grid} rows of patches"
            )
        if self.layers < 1:
            raise ValueError(f"layers = {self.layers}: must be >= 1")
        if not 0 <= self.grey <= 1:
            raise ValueError(f"grey = {self.grey}: must be in [0, 1], a chance")
        _check_sizes(self.out_dim, self.negative_count)

    @property
    def grid(self) -> int:
        """Patches a side."""
        return (self.side - self.patch) // self.stride + 1


class PredictivePatches(Method):
    """An encoder of overlapping patches and a context of those above, from which the patches below are picked.

    Use an encoder with `norm: group`: batch norm's statistics would tell which patches share an image.
    """

    Config = PredictivePatchesConfig
    needs_distinct = True  # an image that is in a batch twice would be its own negative
    clean_norm = True  # trains on patches

    def __init__(self, encoder: Encoder, config: PredictivePatchesConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = nn.Linear(encoder.dim, config.out_dim)
        self.context = RowsAbove(config.out_dim, config.layers)
        self.predict = nn.ModuleList(nn.Linear(config.out_dim, config.out_dim) for _ in range(config.rows))

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("image", self.config.augment.build(pixels)),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        c, draws = self.config, Draws(batch["unlabelled.key"])
        patches = self.embed(batch["image"], draws)  # (B, D, grid, grid)
        context = rearrange(self.context(patches), "b d i j -> i j b d")
        number = torch.arange(patches[:, 0].numel(), device=draws.key.device).view(-1, c.grid, c.grid)
        number = rearrange(number, "b i j -> i j b")
        # row 0 has nothing above it and predicts nothing
        predicted = torch.cat([w(context[1 : c.grid - k]).flatten(0, 2) for k, w in enumerate(self.predict, start=1)])
        target = torch.cat([number[1 + k :].flatten() for k in range(1, c.rows + 1)])
        rows = rearrange(patches, "b d i j -> (b i j) d")
        every = all_gather(rows)
        chosen = draw_patches(all_gather(draws.key[:1])[:1], len(every), c.negative_count)
        loss = predictive_loss(
            predicted,
            rows.index_select(0, target),
            every.index_select(0, chosen),
            itself=chosen == (target + own_rows(len(rows)).start)[:, None],
        )
        return {"loss": loss, "mean_cosine": mean_cosine(rows)}

    def embed(self, images: Tensor, draws: Draws) -> Tensor:
        """Embeddings (B, D, grid, grid) of the patches of images (B, 3, H, W)."""
        embedding = self.projector(self.encoder(self.patches(images, draws)))
        return rearrange(embedding, "(b i j) d -> b d i j", i=self.config.grid, j=self.config.grid)

    @full_precision
    def patches(self, images: Tensor, draws: Draws) -> Tensor:
        """Patches (B · grid², 3, h, h) of images (B, 3, H, W), h = patch - jitter, an image's together, row by row;
        each is shifted, mirrored and greyed on its own."""
        c = self.config
        windows = _resized(images, c.side).unfold(2, c.patch, c.stride).unfold(3, c.patch, c.stride)
        patches = rearrange(windows, "b c i j h w -> (b i j) c h w")
        parts = draws.fork(CUT).parts(c.grid**2)
        patches = cut_tiles(patches, parts, grid=1, tile=c.patch - c.jitter)[:, 0]
        return vary(patches, draws, count=c.grid**2, grey=c.grey, flip=c.augment.flip)

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)


class RowsAbove(nn.Module):
    """A context of each patch from the rows above its own only, (B, D, H, W) to (B, D, H, W).

    The first convolution leaves out its own row, so patches that half overlap share no pixel with the row below.
    """

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(dim, dim, (1, 3))
        self.rest = nn.ModuleList(nn.Conv2d(dim, dim, (2, 3)) for _ in range(layers - 1))

    def forward(self, patches: Tensor) -> Tensor:
        context = self.first(F.pad(patches[:, :, :-1], (1, 1, 1, 0)))  # a row of zeros above, the last row dropped
        for conv in self.rest:
            context = context + conv(F.pad(F.relu(context), (1, 1, 1, 0)))
        return context


@full_precision
def predictive_loss(predicted: Tensor, target: Tensor, negatives: Tensor, *, itself: Tensor) -> Tensor:
    """InfoNCE with inner products, van den Oord et al. 2018, eq. 4, of each prediction with its patch.

    Args:
        predicted, target: (M, D), a row a pair of position and offset. negatives: (K, D).
        itself: (M, K) bool, which negatives are the target: they count once, as the positive.
    Returns:
        Mean over M, 0-d float32 in nats.
    """
    right = (predicted * target).sum(dim=1, keepdim=True)
    wrong = (predicted @ negatives.T).masked_fill(itself, -torch.inf)
    return info_nce(torch.cat([right, wrong], dim=1), torch.zeros(len(right), dtype=torch.int64, device=right.device))


@dataclass(frozen=True, kw_only=True)
class InstanceDiscriminationConfig(MethodConfig):
    form: Form = "info_nce"  # the sampled softmax, or the full one where negative_count reaches; the paper: constant_z
    temperature: float = 0.1  # τ; 0.07 in the paper, section 5.1
    negatives: Negatives = "shared"  # one set a batch; own, a set an image, is the paper's and slow (`BankContrast`)
    negative_count: int = 1024  # 4,096 in the paper, section 5.2; at most the other images
    momentum: float = 0.5  # share of the old row in the bank, the released code
    proximal: float = 0.0  # λ of |v - m|², section 3.3; 0.0 is the NCE alone
    out_dim: int = 128  # section 5.3
    min_area: float = 0.2  # smallest crop, fraction of the image, the released code
    jitter: float = 0.5  # colour strength: 0.4, 0.4, 0.4, hue 0.1 (0.4 in the released code)
    flip: bool = True  # off where a mirror image changes the meaning
    colour: Literal["exact", "linear"] = "exact"  # linear folds the jitter into one matrix: faster, without clamps

    def __post_init__(self) -> None:
        check_contrast(
            form=self.form, temperature=self.temperature, negatives=self.negatives, count=self.negative_count,
            momentum=self.momentum,
        )  # fmt: skip
        if not self.proximal >= 0:
            raise ValueError(f"proximal = {self.proximal}: must be >= 0")
        if self.out_dim < 1:
            raise ValueError(f"out_dim = {self.out_dim}: must be >= 1")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area = {self.min_area}: must be in (0, 1]")
        if not 0 <= self.jitter <= 1.25:
            raise ValueError(f"jitter = {self.jitter}: must be in [0, 1.25]")


class InstanceDiscrimination(Method):
    """Every image a class of its own: a crop's embedding is picked out of the bank by its image's remembered one."""

    Config = InstanceDiscriminationConfig

    def __init__(self, encoder: Encoder, config: InstanceDiscriminationConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = nn.Linear(encoder.dim, config.out_dim)
        self.contrast = BankContrast(
            images, config.out_dim, form=config.form, temperature=config.temperature, negatives=config.negatives,
            count=config.negative_count, momentum=config.momentum,
        )  # fmt: skip

    def views(self, pixels: int) -> tuple[View, ...]:
        c = self.config
        return (
            View("crop", simclr_augment(pixels, jitter=c.jitter, min_area=c.min_area, flip=c.flip, colour=c.colour)),
        )

    def training_step(self, batch: Batch, progress: float) -> Losses:
        index = batch["unlabelled.index"]
        embedding = self.head(self.encoder(batch["crop"]))
        contrast = self.contrast(embedding[None], index, Draws(batch["unlabelled.key"]).fork(NEGATIVES))[0]
        moved = proximity(embedding, self.contrast.bank.rows[index])
        self.contrast.remember(index, embedding)
        return {
            "loss": contrast + self.config.proximal * moved, "contrast_loss": contrast.detach(),
            "moved": moved.detach(), "mean_cosine": mean_cosine(embedding),
        }  # fmt: skip

    def on_step_end(self, progress: float) -> None:
        self.contrast.update()

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)


@full_precision
def proximity(embedding: Tensor, remembered: Tensor) -> Tensor:
    """Mean of |v - m|² of normalised embeddings (B, D) and unit rows (B, D), 0-d float32, in [0, 4]."""
    return (F.normalize(embedding, dim=1) - remembered).square().sum(dim=1).mean()


def cell_distance(grid: int) -> Tensor:
    """(grid², grid²) int64: Chebyshev's distance of cells, counted row by row."""
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))
    return (place[:, None] - place).abs().amax(dim=2)


def draw_patches(key: Tensor, patches: int, count: int) -> Tensor:
    """(min(count, patches),) int64: different patches of 0 .. patches - 1, by the draws of one image, `key` (1,)."""
    return Draws(key).fork(NEGATIVES).bits(patches).topk(min(count, patches)).indices[0]


def vary(patches: Tensor, draws: Draws, *, count: int, grey: float, flip: bool) -> Tensor:
    """Patches (B · count, 3, h, w), `count` an image, half of them mirrored and some greyed, each on its own."""
    if flip:
        mirror = draws.fork(FLIP).parts(count).chance(0.5)
        patches = torch.where(mirror[:, None, None, None], patches.flip(3), patches)
    return greyscale(patches, draws.fork(GREY).parts(count).chance(grey)) if grey else patches


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


def _check_sizes(out_dim: int, negative_count: int) -> None:
    if out_dim < 1:
        raise ValueError(f"out_dim = {out_dim}: must be >= 1")
    if negative_count < 1:
        raise ValueError(f"negative_count = {negative_count}: must be >= 1")
