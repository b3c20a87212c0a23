import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from data_images import data_folder, encoded, needs_data, pixels
from PIL import Image

from orchestrator.data.decode import BadImage, content_id, decode_rgb, open_rgb, square


def png_of_zeros(width: int, height: int) -> bytes:
    """A valid bilevel PNG, made row by row: Pillow would need a byte a pixel to write it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_colour_png_decodes_to_its_own_pixels():
    assert np.array_equal(decode_rgb(encoded(pixels(0))), pixels(0))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_format_is_recognised_by_content_and_lossless_copies_share_an_id(kind):
    assert content_id(decode_rgb(encoded(pixels(1), kind))) == content_id(pixels(1))


def test_ids_tell_shapes_apart_that_hold_the_same_bytes():
    flat = np.zeros((2, 6, 3), np.uint8)
    assert content_id(flat) != content_id(flat.reshape(3, 4, 3))


def test_grey_becomes_three_equal_channels():
    grey = pixels(2)[:, :, 0]
    assert np.array_equal(decode_rgb(encoded(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, axis=2))


def test_bilevel_becomes_black_and_white():
    image = Image.fromarray(pixels(3)[:, :, 0] > 127)
    assert image.mode == "1"
    assert set(np.unique(decode_rgb(encoded(image)))) == {0, 255}


def test_sixteen_bit_grey_is_scaled_by_257_and_rounded():
    values = np.array([[0, 128, 129, 257 * 100, 65535]], np.uint16)  # 128 / 257 rounds to 0, 129 / 257 to 1
    assert decode_rgb(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 100, 255]


def test_thirty_two_bit_grey_beyond_sixteen_bits_is_refused_with_its_range():
    image = Image.fromarray(np.array([[0, 70000]], np.int32))
    with pytest.raises(BadImage, match="0 to 70000: no declared range"):
        decode_rgb(encoded(image, "TIFF"))


def test_floating_point_pixels_are_refused():
    with pytest.raises(BadImage, match="floating-point"):
        decode_rgb(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 200, 200, 255), (200, 200, 200, 0), (100, 100, 100, 128)])
    row = decode_rgb(encoded(image.convert(mode)))[0, :, 0].tolist()
    assert row[:2] == [200, 255]
    assert row[2] == pytest.approx((100 * 128 + 255 * 127) / 255, abs=1)


def test_transparent_palette_entry_is_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_rgb(encoded(image, transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_transparent_colour_key_is_white():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decode_rgb(encoded(image, transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [4, 5, 6]]


def test_cmyk_is_not_a_negative():
    red = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    mean = decode_rgb(encoded(red, "JPEG", quality=95)).mean(axis=(0, 1))
    assert np.abs(mean - [250, 10, 10]).max() < 4


# What a viewer shows for each EXIF orientation, as an operation on the stored array.
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(pixels(4), kind, exif=exif.tobytes(), **options)
    assert np.array_equal(decode_rgb(data), ORIENTATIONS[orientation](pixels(4)))


def test_damaged_exif_leaves_the_pixels_as_stored():
    data = encoded(pixels(5), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert np.array_equal(decode_rgb(data), decode_rgb(encoded(pixels(5), "JPEG")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_is_used(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    mean = decode_rgb(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)).mean(axis=(0, 1))
    assert mean.tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_file_cut_at_60_percent_is_refused(kind):
    data = encoded(pixels(6, 64, 48), kind)
    assert decode_rgb(data).shape == (48, 64, 3)
    with pytest.raises(BadImage, match="cut off|damaged"):
        decode_rgb(data[: len(data) * 6 // 10])


def test_damaged_png_data_is_refused():
    data = bytearray(encoded(pixels(7, 64, 48)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadImage, match="damaged"):
        decode_rgb(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404 not found</html>", "text that begins '<html>404 not found</html>'"),
        (bytes(20), "begins with the bytes 00 00 00 00"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # EPS would start another program
    ],
)
def test_what_is_no_image_is_named_as_such(data, reason):
    with pytest.raises(BadImage) as caught:
        decode_rgb(data)
    assert reason in str(caught.value)


def test_pixel_limit_names_both_numbers():
    with pytest.raises(BadImage, match="2000x3000 is 6 megapixels, the limit is 5"):
        decode_rgb(png_of_zeros(2000, 3000), max_pixels=5_000_000)
    assert decode_rgb(png_of_zeros(2000, 3000), max_pixels=6_000_000).shape == (3000, 2000, 3)


def test_decompression_bomb_takes_no_memory(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_of_zeros(20_000, 20_000))
    program = (
        "import resource, sys; from orchestrator.data.decode import BadImage, decode_rgb\n"
        "data = open(sys.argv[1], 'rb').read(); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_rgb(data)\n"
        "except BadImage as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "bomb.png")]
    reason, kilobytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "limit" in reason
    assert int(kilobytes) < 20_000  # the pixels would be 400,000 at a byte each


def test_square_takes_the_centre_and_leaves_matching_sizes_alone():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = (10, 20, 30)
    assert square(Image.fromarray(image), 8).reshape(3, -1).T.mean(axis=0) == pytest.approx([10, 20, 30], abs=1)
    assert np.array_equal(square(Image.fromarray(pixels(8, 9, 9)), 9), pixels(8, 9, 9).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 1), (5000, 10), (10, 5000)])
def test_square_copes_with_one_pixel_and_with_strips(size):
    assert square(Image.new("RGB", size, (200, 30, 60)), 32).reshape(3, -1).T.tolist() == [[200, 30, 60]] * 32**2


def test_square_halves_an_image_by_an_antialiased_filter():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing every second column would be picked: all white or all black
    assert 110 < square(Image.fromarray(stripes), 16).mean() < 145


def test_reduced_jpeg_decoding_is_close_to_the_full_one():
    small = Image.fromarray(pixels(9, 20, 15)).resize((1200, 900), Image.Resampling.BICUBIC)
    data = encoded(small, "JPEG", quality=90)
    reduced = open_rgb(data, shrink_to=64)
    assert reduced.size == (300, 225)
    difference = np.abs(square(reduced, 64).astype(int) - square(open_rgb(data), 64))
    assert difference.mean() < 1.5
    assert difference.max() <= 12


@needs_data
def test_every_awkward_file_decodes_right_or_says_why_not():
    folder = data_folder() / "awkward"
    expected = json.loads((folder / "expected.json").read_text())
    stills = {name: about for name, about in expected.items() if not name.startswith("video/")}
    assert len(stills) == 33
    for name, about in stills.items():
        data = (folder / name).read_bytes()
        if not about["decodes"]:
            with pytest.raises(BadImage) as caught:
                decode_rgb(data)
            words = ("cut off", "damaged", "empty", "not an image", "limit")
            assert any(word in str(caught.value) for word in words), name
            continue
        image = decode_rgb(data)
        assert image.dtype == np.uint8, name
        assert image.shape == (about["size"][1], about["size"][0], 3), name
        if "mean_rgb" in about:
            assert np.abs(image.mean(axis=(0, 1)) - about["mean_rgb"]).max() < 4, name
