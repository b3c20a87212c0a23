"""Every method at the limits of what it may be given: losses and gradients stay finite, or are exactly nothing."""

import contextlib
import dataclasses
import typing

import pytest
import torch

from methods.colorization import Colorization
from methods.distillation import ForeignModel, VirtualTeacher
from methods.embedding_distillation import EmbeddingDistillation
from methods.fixmatch import FixMatch, FixMatchCTA
from methods.inpainting import Inpainting, InpaintingConfig
from methods.jigsaw import JigsawConfig
from methods.multitask import MultiTask
from methods.noisy_student import NoisyStudent
from methods.patch_contrast import InstanceDiscrimination
from methods.pirl import PIRL
from methods.relative_patch import RelativePatch
from methods.rotation import Rotation, RotationConfig
from methods.simclr import SimCLR
from methods.supervised import Supervised
from methods.views.draws import Draws
from tests.methods.contract import BATCH, METHODS, PIXELS, batch_of, build, pictures, steps

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
each_method = pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)


def autocast(precision):
    dtype = PRECISIONS[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def check_training(method, batches, precision):
    """One training step a batch, each with finite losses, gradients and state; the losses of all."""
    losses = []
    for batch in batches:
        method.zero_grad()
        with autocast(precision):
            found = method(batch, 0.5)
        found["loss"].backward()
        for name, value in found.items():
            assert value.isfinite(), (name, value)
        assert found["loss"].dtype == torch.float32
        gradients = [(n, p.grad) for n, p in method.named_parameters() if p.grad is not None]
        assert gradients
        for name, gradient in gradients:
            assert gradient.isfinite().all(), name
        method.on_step_end(0.5)
        for name, value in method.state_dict().items():
            assert value.isfinite().all(), name
        losses.append(found["loss"].item())
    return losses


def alike(images):
    return {stream: value[:1].expand_as(value).contiguous() for stream, value in images.items()}


SOURCES = {  # images by stream, and the pixels that views have
    "two images": (lambda: pictures(rows=2), PIXELS),
    "equal images": (lambda: alike(pictures()), PIXELS),
    "black": (lambda: {stream: torch.zeros_like(value) for stream, value in pictures().items()}, PIXELS),
    "white": (lambda: {stream: torch.full_like(value, 255) for stream, value in pictures().items()}, PIXELS),
    "grey": (lambda: {s: v[:, :1].expand_as(v).contiguous() for s, v in pictures().items()}, PIXELS),
    "not square": (lambda: pictures(height=20, width=27), PIXELS),
    "17 pixels": (lambda: pictures(height=17, width=17), 17),  # primes: no grid, stride or enlargement divides them
    "19 pixels": (lambda: pictures(height=19, width=19), 19),
}


FLAT = ("equal images", "black", "white", "grey")  # where a deviation is 0; the others are about sizes
CASES = [(source, precision) for source in SOURCES for precision in (PRECISIONS if source in FLAT else ["float32"])]


@each_method
@pytest.mark.parametrize(("source", "precision"), CASES)
def test_losses_gradients_and_state_are_finite(cls, source, precision):
    images, pixels = SOURCES[source][0](), SOURCES[source][1]
    method = build(cls, images=len(images["unlabelled"]))
    method.on_start(images["unlabelled"].float() / 255)
    losses = check_training(
        method, [batch_of(method, seed, pixels=pixels, images=images) for seed in range(steps(cls))], precision
    )
    colourless = source in ("grey", "black", "white")
    if colourless and cls.__name__ == "Colorization":  # nothing to tell: such images are left out, the released code
        assert losses == [0.0] * steps(cls)
    elif colourless and cls.__name__ == "MultiTask":  # colorization has every second turn
        assert losses[1::2] == [0.0] * (steps(cls) // 2) and min(losses[::2]) > 0
    elif not (source in ("black", "white") and cls.__name__ == "Inpainting"):  # holes are filled with the only colour
        assert min(losses) > 0


EVERYTHING = {"rotation": RotationConfig(), "jigsaw": JigsawConfig(), "inpainting": InpaintingConfig()}
VARIANTS = [  # that compute something else than the defaults do
    (Colorization, {"form": "regression"}),
    (Colorization, {"form": "regression", "huber": True}),
    (EmbeddingDistillation, {"projector": "linear", "distance": "mse"}),
    (ForeignModel, {"outputs": 5, "groups": ((0, 4), (1,), (3,))}),
    (Inpainting, {"mask": "center"}),
    (Inpainting, {"mask": "blocks", "lambda_adv": 0.001}),
    (FixMatch, {"weak_no_grad": True, "min_confidence": 0.0}),
    (FixMatchCTA, {"weak_no_grad": True, "min_confidence": 0.0}),
    (InstanceDiscrimination, {"negatives": "own", "negative_count": 1, "proximal": 1.0}),
    (MultiTask, {**EVERYTHING, "schedule": "together", "grey": True}),
    (NoisyStudent, {"soft": False}),
    (PIRL, {"transform": "both", "negatives": "own", "negative_count": 1}),
    (PIRL, {"transform": "both", "composed": True, "negative_count": 1}),
    (PIRL, {"transform": "rotation", "form": "constant_z", "colour": "linear"}),
    (RelativePatch, {"colour": "project", "both_orders": False}),
    (RelativePatch, {"colour": "grey", "coarse": 1.0, "coarsest": 1}),
    (Rotation, {"turns": "one"}),
    (SimCLR, {"blur": True, "colour": "linear", "min_area": 0.001}),
    (Supervised, {"soft": True}),
    (VirtualTeacher, {"softened": True}),
]


@pytest.mark.parametrize("source", ["equal images", "black", "17 pixels"])
@pytest.mark.parametrize(("cls", "changes"), VARIANTS, ids=lambda part: getattr(part, "__name__", ""))
def test_other_forms_have_finite_losses_gradients_and_state_too(cls, changes, source):
    images, pixels = SOURCES[source][0](), SOURCES[source][1]
    method = build(cls, **changes)
    check_training(method, [batch_of(method, seed, pixels=pixels, images=images) for seed in range(2)], "float32")


@each_method
@pytest.mark.parametrize("precision", PRECISIONS)
def test_of_one_image_met_again_and_again_losses_and_gradients_are_finite(cls, precision):
    """Equal pixels and equal draws: all embeddings are equal, and batch norm has no deviation to divide by."""
    method = build(cls)
    batch = batch_of(method, images=alike(pictures()))
    batch |= {name: batch[name][:1].repeat(BATCH, 1, 1, 1) for name in (view.name for view in method.views(PIXELS))}
    batch |= {name: value[:1].repeat(BATCH) for name, value in batch.items() if name.endswith(".key")}
    check_training(method, [batch] * steps(cls), precision)


def forms(cls):
    """The configurations of a method with a temperature: of each loss that it can have."""
    if "form" not in {field.name for field in dataclasses.fields(cls.Config)}:
        return [{}]
    return [{"form": form} for form in typing.get_args(typing.get_type_hints(cls.Config)["form"])]


WITH_TEMPERATURE = [
    pytest.param(cls, form, id=" ".join([cls.__name__, *form.values()]))
    for cls in METHODS
    if "temperature" in {field.name for field in dataclasses.fields(cls.Config)}
    for form in forms(cls)
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", [0.005, 0.05, 1.0, 10.0])  # 1 / 0.005 = 200: exp of that is no float32
@pytest.mark.parametrize(("cls", "form"), WITH_TEMPERATURE)
def test_at_any_temperature_losses_gradients_and_state_are_finite(cls, form, temperature, precision):
    method = build(cls, temperature=temperature, **form)
    # the second step meets a bank that the first has written: similarities of 1 among those of chance
    check_training(method, [batch_of(method, seed) for seed in range(2)], precision)


@each_method
@pytest.mark.parametrize("pixels", [17, 19])
def test_views_of_sources_of_any_shape_have_the_asked_size(cls, pixels):
    images = pictures(height=20, width=27)
    for number, view in enumerate(build(cls).views(pixels)):
        out = view.transform(images[view.stream], Draws.of(0, 0, torch.arange(BATCH), number))
        assert out.shape == (BATCH, 3, pixels, pixels) and 0 <= out.min() and out.max() <= 1


def test_all_methods_with_a_temperature_were_found():
    names = {param.values[0].__name__ for param in WITH_TEMPERATURE}
    assert {"SimCLR", "PIRL", "InstanceDiscrimination", "NearbyPatches", "Colorization"} <= names
