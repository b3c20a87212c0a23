"""Trunks: images to features. Each names its taps, the places where per-layer probes read."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import timm
import torch
import torch.nn.functional as F
from einops import reduce
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # any fixed affine map serves a trunk from scratch; pretrained ones need this
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Base of every encoder's configuration."""


class Encoder(nn.Module, ABC):
    """A trunk. It normalises its images itself, with constants that travel in its state, so no reader can forget to.

    `dim` is the length of the pooled feature, `taps` the names `maps` returns, in order of depth.
    """

    Config: ClassVar[type[EncoderConfig]]
    dim: int
    taps: tuple[str, ...]
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    @abstractmethod
    def trunk(self, images: Tensor) -> dict[str, Tensor]:
        """Every tap's map (B, C, H, W) of normalised images (B, 3, H, W); the last is pooled to the feature."""

    def maps(self, images: Tensor, *, normalised: bool = False) -> dict[str, Tensor]:
        """Every tap by name, of images (B, 3, H, W) in [0, 1]: maps (B, C, H, W), and "gap", the feature (B, dim).

        Args:
            normalised: the images are normalised already, such as tiles with mean 0 and deviation 1 each.
        """
        taps = self.trunk(images if normalised else (images - self.mean) / self.std)
        return {**taps, "gap": reduce(next(reversed(taps.values())), "b c h w -> b c", "mean")}

    def forward(self, images: Tensor, *, normalised: bool = False) -> Tensor:
        """The feature (B, dim) of images (B, 3, H, W) in [0, 1]; `normalised` as in `maps`."""
        return self.maps(images, normalised=normalised)["gap"]


def freeze(encoder: Encoder, tap: str) -> None:
    """Keeps weights and running statistics of everything up to a tap as they are, until `train()` is called again.

    Touvron et al. 2019, arXiv:1906.06423, section 4: only the last layers adapt to another resolution.

    Raises:
        ValueError: the encoder has no such tap.
    """
    if tap not in encoder.taps:
        raise ValueError(f"frozen = {tap}: must be a tap of the encoder, one of {', '.join(encoder.taps)}")
    weights, training = list(encoder.parameters()), encoder.training
    before = encoder.eval().maps(torch.zeros(1, 3, 32, 32, device=encoder.mean.device))[tap]
    reached = torch.autograd.grad(before.sum(), weights, allow_unused=True)
    kept = {id(weight) for weight, slope in zip(weights, reached, strict=True) if slope is not None}
    for module in encoder.train(training).modules():
        own = list(module.parameters(recurse=False))
        if own and all(id(weight) in kept for weight in own):
            module.eval().requires_grad_(False)


@torch.no_grad()
def tap_shapes(encoder: Encoder, pixels: int = 32) -> dict[str, tuple[int, ...]]:
    """Tap name to the shape of its map, (C, H, W), for images of `pixels`; "gap" to (dim,)."""
    training = encoder.training
    maps = encoder.eval().maps(torch.zeros(1, 3, pixels, pixels, device=encoder.mean.device))
    encoder.train(training)
    return {name: tuple(value.shape[1:]) for name, value in maps.items()}


TAP_NUMBERS = 1152  # of a pooled tap: of SmallCNN's taps this makes 32 x 6 x 6, 64 x 4 x 4, 128 x 3 x 3 and 256 x 2 x 2


def _pooled_side(channels: int, side: int) -> int:
    return max(1, min(side, math.isqrt(TAP_NUMBERS // channels)))


def pooled_size(shape: tuple[int, ...]) -> int:
    """How many numbers `pooled_taps` leaves of a map (C, H, W) or a feature (dim,)."""
    return shape[0] if len(shape) == 1 else shape[0] * _pooled_side(shape[0], min(shape[1:])) ** 2


def pooled_taps(encoder: Encoder, images: Tensor) -> Tensor:
    """All taps of images (B, 3, H, W) in [0, 1] side by side, (B, D), each pooled to at most TAP_NUMBERS numbers.

    Maps of few channels keep more places, so that depth is compared and not width (Goyal et al. 2019,
    arXiv:1905.01235, appendix).
    """
    found = []
    for value in encoder.maps(images).values():
        if value.ndim == 4:
            value = F.adaptive_avg_pool2d(value, _pooled_side(value.shape[1], min(value.shape[2:]))).flatten(1)
        found.append(value.float())
    return torch.cat(found, dim=1)


def survival(blocks: int, last: float) -> tuple[float, ...]:
    """Survival of residual blocks 1 .. L: p_l = 1 - (l / L)(1 - p_L), Huang et al. 2016, arXiv:1603.09382, eq. 4.

    survival(4, 0.8) is (0.95, 0.90, 0.85, 0.80).
    """
    return tuple(1 - block / blocks * (1 - last) for block in range(1, blocks + 1))


def set_drop_path(encoder: nn.Module, rate: float) -> None:
    """Stochastic depth per sample, with linear decay to `rate` at the last block; blocks without an identity skip stay.

    Raises:
        ValueError: rate > 0 and the encoder has no residual block that could be skipped.
    """
    blocks = [module for module in encoder.modules() if hasattr(module, "drop_path")]
    if rate > 0 and not blocks:
        raise ValueError(
            f"drop_path = {rate}: {type(encoder).__name__} has no residual blocks; use ResNet, WideResNet or "
            "Timm, or drop_path: 0"
        )
    for block, keep in zip(blocks, survival(len(blocks), 1 - rate) if blocks else (), strict=True):
        skips = getattr(block, "downsample", None) is None
        block.drop_path = DropPath(1 - keep) if rate > 0 and skips else nn.Identity()


@dataclass(frozen=True, kw_only=True)
class SmallCNNConfig(EncoderConfig):
    width: float = 1.0  # multiplies the channels; 388,896 parameters at 1.0
    norm: Literal["batch", "group"] = "batch"  # group (8 groups) where a worker's batch is under 16

    def __post_init__(self) -> None:
        if not 0.25 <= self.width <= 8 or (self.width * 32) % 8:
            raise ValueError(f"width = {self.width}: must be a multiple of 0.25 in [0.25, 8]")


class SmallCNN(Encoder):
    """Four conv blocks, channels 32-64-128-256, strides 1, 2, 2, 2: the small reference trunk for 32-pixel images."""

    Config = SmallCNNConfig

    def __init__(self, config: SmallCNNConfig) -> None:
        super().__init__()
        self.config = config
        channels = [3, *(round(c * config.width) for c in (32, 64, 128, 256))]
        self.taps = ("c1", "c2", "c3", "c4", "gap")
        self.dim = channels[-1]
        self.blocks = nn.ModuleDict()
        for name, before, after, stride in zip(self.taps, channels, channels[1:], (1, 2, 2, 2), strict=False):
            norm = nn.BatchNorm2d(after) if config.norm == "batch" else nn.GroupNorm(8, after)
            conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            self.blocks[name] = nn.Sequential(conv, norm, nn.ReLU(inplace=True))

    def trunk(self, images: Tensor) -> dict[str, Tensor]:
        taps: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            images = taps[name] = block(images)
        return taps


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(EncoderConfig):
    depth: Literal[10, 18, 34, 50] = 18  # 10 is one basic block a stage, for small runs
    width: float = 1.0  # multiplies the channels
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3 stride 1, no max-pool (SimCLR, appendix B.9)

    def __post_init__(self) -> None:
        if not 0.125 <= self.width <= 8 or (self.width * 64) % 8:
            raise ValueError(f"width = {self.width}: must be a multiple of 0.125 in [0.125, 8]")


class ResNet(Encoder):
    """ResNet, He et al. 2015, arXiv:1512.03385, in timm's form, with a stem for small images."""

    Config = ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        layers = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[config.depth]
        block = Bottleneck if config.depth == 50 else BasicBlock
        channels = tuple(round(c * config.width) for c in (64, 128, 256, 512))
        # timm widens what follows the stem only for its deep stem, so that is asked for and replaced by the plain one
        self.net = TimmResNet(
            block, layers, num_classes=0, channels=channels, stem_type="deep", stem_width=channels[0] // 2
        )
        small = config.stem == "cifar"
        kernel, stride = (3, 1) if small else (7, 2)
        self.net.conv1 = nn.Conv2d(3, channels[0], kernel, stride=stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.net.conv1.weight, mode="fan_out", nonlinearity="relu")
        if small:
            self.net.maxpool = nn.Identity()
        self.dim = self.net.num_features
        self.taps = ("stem", "layer1", "layer2", "layer3", "layer4", "gap")

    def trunk(self, images: Tensor) -> dict[str, Tensor]:
        net = self.net
        taps = {"stem": net.act1(net.bn1(net.conv1(images)))}
        hidden = net.maxpool(taps["stem"])
        for name in self.taps[1:-1]:
            hidden = taps[name] = getattr(net, name)(hidden)
        return taps


@dataclass(frozen=True, kw_only=True)
class WideResNetConfig(EncoderConfig):
    depth: int = 28  # layers, 6 n + 4 with n blocks a group; 28 in FixMatch and most semi-supervised papers
    width: float = 2.0  # widening factor k: 2 as there, 10 in the paper's best; 28 and 2 make 1,466,320 parameters
    slope: float = 0.0  # of the ReLU below 0; 0.1 in FixMatch's code
    norm_momentum: float = 0.1  # a batch's share in the running statistics; 0.001 in FixMatch's code, for 2^20 steps

    def __post_init__(self) -> None:
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth = {self.depth}: must be 6 n + 4, such as 10, 16 or 28")
        if not 0.25 <= self.width <= 16 or (self.width * 16) % 4:
            raise ValueError(f"width = {self.width}: must be a multiple of 0.25 in [0.25, 16]")
        if not 0 <= self.slope < 1:
            raise ValueError(f"slope = {self.slope}: must be in [0, 1), 0 is a plain ReLU")
        if not 0 < self.norm_momentum <= 1:
            raise ValueError(f"norm_momentum = {self.norm_momentum}: must be in (0, 1], the share of a batch")


class WideResNet(Encoder):
    """Wide residual network, Zagoruyko and Komodakis 2016, arXiv:1605.07146, table 1, for 32-pixel images.

    Three groups of pre-activation blocks, channels 16 k, 32 k, 64 k, strides 1, 2, 2. A tap is the sum that leaves its
    group, before any norm; the last batch norm and ReLU, which the network has only once, belong to the last tap.
    """

    Config = WideResNetConfig

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = [16, *(round(c * config.width) for c in (16, 32, 64))]
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.groups = nn.ModuleDict()
        for number, stride in enumerate((1, 2, 2)):
            before, after = channels[number : number + 2]
            blocks = [_PreActivation(before, after, stride, config)]
            blocks += [_PreActivation(after, after, 1, config) for _ in range((config.depth - 4) // 6 - 1)]
            self.groups[f"group{number + 1}"] = nn.Sequential(*blocks)
        self.last = _norm_relu(channels[-1], config)
        self.dim = channels[-1]
        self.taps = ("stem", *self.groups, "gap")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as both released codes

    def trunk(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.stem(images)
        taps = {"stem": hidden}
        for name, group in self.groups.items():
            hidden = taps[name] = group(hidden)
        taps["group3"] = self.last(hidden)
        return taps


def _norm_relu(channels: int, config: WideResNetConfig) -> nn.Sequential:
    norm = nn.BatchNorm2d(channels, momentum=config.norm_momentum)
    return nn.Sequential(norm, nn.LeakyReLU(config.slope, inplace=True) if config.slope else nn.ReLU(inplace=True))


class _PreActivation(nn.Module):
    """x + F(x), F being norm, ReLU, 3x3, norm, ReLU, 3x3: He et al. 2016, arXiv:1603.05027, fig. 4e.

    Where the shape changes the skip is a 1x1 convolution of the activated input, as in the authors' code; FixMatch's
    code takes the raw input there in the second and third group.
    """

    def __init__(self, before: int, after: int, stride: int, config: WideResNetConfig) -> None:
        super().__init__()
        self.act1 = _norm_relu(before, config)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.act2 = _norm_relu(after, config)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        same = before == after and stride == 1
        self.downsample = None if same else nn.Conv2d(before, after, 1, stride=stride, bias=False)
        self.drop_path: nn.Module = nn.Identity()  # see `set_drop_path`

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(x)
        skip = x if self.downsample is None else self.downsample(active)
        return skip + self.drop_path(self.conv2(self.act2(self.conv1(active))))


@dataclass(frozen=True, kw_only=True)
class TimmConfig(EncoderConfig):
    name: str  # any convolutional timm model with feature taps, such as efficientnet_b0
    pretrained: bool = False  # the published weights, from the hub or its local cache

    def __post_init__(self) -> None:
        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, timm.list_models(), n=3)
            raise ValueError(
                f"name = {self.name}: timm has no such model{'; near: ' + ', '.join(near) if near else ''}"
            )


class Timm(Encoder):
    """Any timm trunk by name."""

    Config = TimmConfig

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        self.net = timm.create_model(config.name, pretrained=config.pretrained, num_classes=0, global_pool="")
        if not hasattr(self.net, "forward_intermediates"):
            raise ValueError(f"name = {config.name}: this timm model does not expose its intermediate maps")
        self.dim = self.net.num_features
        self.taps = (*(info["module"] for info in self.net.feature_info), "last", "gap")

    def trunk(self, images: Tensor) -> dict[str, Tensor]:
        last, maps = self.net.forward_intermediates(images)
        return dict(zip(self.taps, (*maps, last), strict=False))


def is_depthwise(encoder: nn.Module) -> bool:
    """Whether any convolution has as many groups as channels: those train slower in bf16 than in float32 on a CPU."""
    convs = (module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    return any(conv.groups > 1 and conv.groups == conv.in_channels for conv in convs)
