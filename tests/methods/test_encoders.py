"""Encoders: sizes from the papers, taps, stochastic depth."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.encoders import (
    ResNet,
    ResNetConfig,
    SmallCNN,
    SmallCNNConfig,
    Timm,
    TimmConfig,
    WideResNet,
    WideResNetConfig,
    freeze,
    is_depthwise,
    set_drop_path,
    survival,
    tap_shapes,
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
    WideResNet(WideResNetConfig(depth=16, width=1, slope=0.1)),
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


@pytest.mark.parametrize("depth, width, trunk, with_ten_classes", [
    (28, 2, 1_466_320, 1_467_610), (16, 2, 690_384, 691_674), (10, 1, 77_200, 77_850),
    (28, 10, 36_472_784, 36_479_194),  # the paper's table 4 says 36.5 M
])  # fmt: skip
def test_a_wide_resnet_has_as_many_weights_as_the_published_one(depth, width, trunk, with_ten_classes):
    with torch.device("meta"):
        encoder = WideResNet(WideResNetConfig(depth=depth, width=width))
    assert trainable(encoder) == trunk == with_ten_classes - trainable(nn.Linear(encoder.dim, 10))


def test_the_size_of_a_wide_resnet_is_the_sum_over_its_blocks():
    n, channels = 4, (16, 32, 64, 128)
    expected = 3 * 9 * 16 + 2 * 128  # first convolution, last norm
    for before, after in zip(channels, channels[1:], strict=False):
        first = 2 * before + 9 * before * after + 2 * after + 9 * after * after + before * after
        expected += first + (n - 1) * (2 * after + 9 * after * after + 2 * after + 9 * after * after)
    assert trainable(WideResNet(WideResNetConfig(depth=28, width=2))) == expected


def test_a_wide_resnet_halves_the_side_twice_and_widens_three_groups():
    assert tap_shapes(WideResNet(WideResNetConfig(depth=10, width=2))) == {
        "stem": (16, 32, 32), "group1": (32, 32, 32), "group2": (64, 16, 16), "group3": (128, 8, 8), "gap": (128,),
    }  # fmt: skip


@pytest.mark.parametrize("width, slope", [(1, 0.0), (1, 0.1), (2, 0.1)])
def test_a_wide_resnet_is_the_papers_network_written_with_plain_functions(width, slope):
    torch.manual_seed(0)
    encoder = WideResNet(WideResNetConfig(depth=16, width=width, slope=slope)).train()
    for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    weights = dict(encoder.named_parameters())

    def active(x, name):
        mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, correction=0)
        scale, shift = (weights[f"{name}.0.{part}"][:, None, None] for part in ("weight", "bias"))
        x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
        return torch.where(x > 0, x, slope * x)

    images = torch.rand(3, 3, 16, 16)
    x = F.conv2d((images - encoder.mean) / encoder.std, weights["stem.weight"], padding=1)
    for group in (1, 2, 3):
        for block in (0, 1):
            name, stride = f"groups.group{group}.{block}", 2 if group > 1 and block == 0 else 1
            first = active(x, f"{name}.act1")
            hidden = F.conv2d(first, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            hidden = F.conv2d(active(hidden, f"{name}.act2"), weights[f"{name}.conv2.weight"], padding=1)
            through = weights.get(f"{name}.downsample.weight")
            x = hidden + (x if through is None else F.conv2d(first, through, stride=stride))
        if group == 2:
            torch.testing.assert_close(encoder.maps(images)["group2"], x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder(images), active(x, "last").mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)


def test_the_last_norm_and_relu_belong_to_the_last_tap_of_a_wide_resnet():
    torch.manual_seed(0)
    maps = WideResNet(WideResNetConfig(depth=10, width=1)).train().maps(torch.rand(8, 3, 16, 16))
    assert maps["group3"].min() == 0 and all(maps[name].min() < 0 for name in ("stem", "group1", "group2"))
    torch.testing.assert_close(maps["group3"].mean(dim=(2, 3)), maps["gap"])


def test_every_weight_of_a_wide_resnet_gets_a_gradient():
    encoder = WideResNet(WideResNetConfig(depth=16, width=1, slope=0.1))
    encoder(torch.rand(4, 3, 16, 16)).square().sum().backward()
    assert [name for name, weight in encoder.named_parameters() if not weight.grad.any()] == []


@pytest.mark.parametrize("momentum", [0.1, 0.001])
def test_every_batch_norm_of_a_wide_resnet_moves_by_the_momentum_asked_for(momentum):
    encoder = WideResNet(WideResNetConfig(depth=10, width=1, norm_momentum=momentum)).train()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    inputs = []
    for norm in norms:
        norm.register_forward_hook(lambda norm, given, out: inputs.append(given[0]))
    encoder(torch.rand(4, 3, 16, 16))
    assert len(norms) == 3 * 2 + 1
    for norm, x in zip(norms, inputs, strict=True):
        torch.testing.assert_close(norm.running_mean, momentum * x.mean(dim=(0, 2, 3)))


def test_a_wide_resnet_with_bad_options_is_refused_with_the_range():
    for bad, message in (
        ({"depth": 18}, "depth = 18: must be 6 n \\+ 4, such as 10, 16 or 28"),
        ({"depth": 4}, "depth = 4: must be 6 n"), ({"width": 0.3}, "width = 0.3: must be a multiple of 0.25"),
        ({"slope": 1.0}, "slope = 1.0: must be in \\[0, 1\\)"),
        ({"norm_momentum": 0.0}, "norm_momentum = 0.0: must be in \\(0, 1\\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            WideResNetConfig(**bad)


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


def test_stochastic_depth_of_a_wide_resnet_decays_linearly_and_spares_blocks_that_change_the_shape():
    encoder = WideResNet(WideResNetConfig(depth=16, width=2))
    set_drop_path(encoder, 0.6)
    rates = [getattr(block.drop_path, "drop_prob", None) for group in encoder.groups.values() for block in group]
    assert rates == pytest.approx([None, 0.2, None, 0.4, None, 0.6])  # every first block widens
    set_drop_path(encoder, 0.0)
    assert all(isinstance(block.drop_path, nn.Identity) for group in encoder.groups.values() for block in group)


def test_a_skipped_block_of_a_wide_resnet_passes_its_input_on():
    torch.manual_seed(0)
    encoder = WideResNet(WideResNetConfig(depth=16, width=1))
    block = encoder.groups["group3"][1]
    x = torch.randn(1, 64, 4, 4)
    encoder.eval()
    plain = block(x)
    set_drop_path(encoder, 0.4)
    encoder.eval()
    torch.testing.assert_close(block(x), plain)
    block.drop_path.train()
    many = block(x.expand(4_000, -1, -1, -1))
    skipped = (many == x).flatten(1).all(dim=1)
    assert skipped.float().mean().item() == pytest.approx(0.4, abs=4 * (0.4 * 0.6 / 4_000) ** 0.5)
    torch.testing.assert_close(many[~skipped][0], (x + (plain - x) / 0.6)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("encoder", "tap", "trained"), [
    (SmallCNN(SmallCNNConfig(width=0.25)), "c3", "blocks.c4"),
    (ResNet(ResNetConfig(depth=10, width=0.125)), "layer3", "net.layer4"),
    (WideResNet(WideResNetConfig(depth=10, width=1)), "group2", "group3"),
    (Timm(TimmConfig(name="efficientnet_b0")), "blocks.6", ("net.conv_head", "net.bn2")),
])  # fmt: skip
def test_a_frozen_encoder_trains_only_what_comes_after_the_tap(encoder, tap, trained):
    before = {name: value.clone() for name, value in encoder.train().state_dict().items()}
    freeze(encoder, tap)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    encoder(torch.rand(4, 3, 32, 32)).square().sum().backward()
    moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    learning = {name for name, weight in encoder.named_parameters() if weight.grad is not None}
    after = {name for name in before if name.removeprefix("groups.").startswith(trained)} | {
        name for name in before if name.startswith("last.")
    }
    assert moved == {name for name in after if "running" in name or "num_batches" in name}
    assert learning == {name for name, _ in encoder.named_parameters() if name in after}


def test_a_tap_that_is_not_there_cannot_be_frozen():
    with pytest.raises(ValueError, match=r"frozen = c7: must be a tap of the encoder, one of c1, c2, c3, c4, gap"):
        freeze(SmallCNN(SmallCNNConfig()), "c7")


def test_an_encoder_without_residual_blocks_refuses_stochastic_depth():
    with pytest.raises(ValueError, match="drop_path = 0.2: SmallCNN has no residual blocks"):
        set_drop_path(SmallCNN(SmallCNNConfig()), 0.2)


def test_depthwise_convolutions_are_recognised():
    assert is_depthwise(Timm(TimmConfig(name="mobilenetv3_small_050"))) and not is_depthwise(SmallCNN(SmallCNNConfig()))


def test_an_unknown_timm_name_is_refused_with_names_that_are_near():
    with pytest.raises(ValueError, match="efficientnet_b99: timm has no such model; near: .*efficientnet"):
        TimmConfig(name="efficientnet_b99")
