"""Encoders: sizes from the papers, taps, stochastic depth."""

import pytest
import torch
from torch import nn

from methods.encoders import (
    ResNet,
    ResNetConfig,
    SmallCNN,
    SmallCNNConfig,
    Timm,
    TimmConfig,
    is_depthwise,
    set_drop_path,
    survival,
)


def trainable(module):
    return sum(p.numel() for p in module.parameters())


def test_the_reference_backbone_has_the_specified_size_and_taps():
    encoder = SmallCNN(SmallCNNConfig())
    assert trainable(encoder) == 388_896
    shapes = {name: tuple(value.shape) for name, value in encoder.maps(torch.rand(2, 3, 32, 32)).items()}
    assert shapes == {
        "c1": (2, 32, 32, 32),
        "c2": (2, 64, 16, 16),
        "c3": (2, 128, 8, 8),
        "c4": (2, 256, 4, 4),
        "gap": (2, 256),
    }


@pytest.mark.parametrize("encoder", [
    SmallCNN(SmallCNNConfig(width=0.5, norm="group")), ResNet(ResNetConfig(depth=10, width=0.25, stem="cifar")),
    ResNet(ResNetConfig(depth=50, width=0.5)), Timm(TimmConfig(name="mobilenetv3_small_050")),
])  # fmt: skip
def test_every_encoder_pools_its_last_tap_to_dim_on_non_square_images(encoder):
    encoder.eval()
    maps = encoder.maps(torch.rand(2, 3, 40, 32))
    assert tuple(maps) == encoder.taps
    assert encoder(torch.rand(2, 3, 40, 32)).shape == (2, encoder.dim) == maps["gap"].shape


def test_resnet18_with_the_imagenet_stem_is_the_published_network():
    assert (
        trainable(ResNet(ResNetConfig(depth=18))) == 11_176_512
    )  # torchvision's 11,689,512 without its 513,000 of head


def test_the_cifar_stem_keeps_full_resolution():
    encoder = ResNet(ResNetConfig(depth=18, width=0.125, stem="cifar"))
    assert encoder.maps(torch.rand(1, 3, 32, 32))["layer1"].shape[-2:] == (32, 32)


def test_survival_decays_linearly_from_the_first_block():
    assert survival(4, 0.8) == pytest.approx((0.95, 0.90, 0.85, 0.80))


def test_stochastic_depth_is_the_identity_in_eval_mode_and_right_on_average():
    torch.manual_seed(0)
    encoder = ResNet(ResNetConfig(depth=18, width=0.125, stem="cifar"))
    block = encoder.net.layer4[1]
    nn.init.ones_(block.bn2.weight)  # timm starts it at 0, and F(x) with it
    x = torch.rand(1, 64, 2, 2)
    encoder.eval()
    plain = block(x)
    set_drop_path(encoder, 0.4)
    encoder.eval()
    torch.testing.assert_close(block(x), plain)
    block.drop_path.train()
    many = block(x.expand(20_000, -1, -1, -1))
    kept = (many != torch.relu(x)).flatten(1).any(dim=1).float().mean().item()
    assert kept == pytest.approx(0.6, abs=4 * (0.6 * 0.4 / 20_000) ** 0.5)


def test_stochastic_depth_draws_for_each_sample():
    encoder = ResNet(ResNetConfig(depth=18, width=0.125, stem="cifar"))
    set_drop_path(encoder, 0.5)
    torch.manual_seed(0)
    drop = encoder.net.layer4[1].drop_path.train()
    kept = drop(torch.ones(64, 1, 1, 1)).flatten()
    assert set(kept.tolist()) == {0.0, 2.0}  # per sample, and divided by the survival probability


def test_an_encoder_without_residual_blocks_refuses_stochastic_depth():
    with pytest.raises(ValueError, match="drop_path = 0.2: SmallCNN has no residual blocks"):
        set_drop_path(SmallCNN(SmallCNNConfig()), 0.2)


def test_depthwise_convolutions_are_recognised():
    assert is_depthwise(Timm(TimmConfig(name="mobilenetv3_small_050"))) and not is_depthwise(SmallCNN(SmallCNNConfig()))


def test_an_unknown_timm_name_is_refused_with_names_that_are_near():
    with pytest.raises(ValueError, match="efficientnet_b99: timm has no such model; near: .*efficientnet"):
        TimmConfig(name="efficientnet_b99")
