"""Bytes to pixels: one declared rule for every kind of still image, used everywhere an image is read.

The rule, by content and never by file name:

- grey, bilevel and palette images become three channels; CMYK is converted (Adobe's inverted values put right);
- alpha, a transparent palette entry or colour key included, is composited on white;
- 16-bit grey is scaled by 1/257 and rounded, so 65535 becomes 255; 16-bit colour keeps the high byte, within 1 of it;
- the EXIF orientation is applied, colour profiles are not;
- of an animation or a multi-page file the first frame is used;
- a file that is cut off, damaged, larger than the pixel limit or no image is refused: `BadImage` says why.

Pillow alone does the decoding. torchvision's JPEG decoder gives the same pixels (73,394 of 73,394 files compared), but
it is deprecated, and once the header is read first, as the pixel limit needs, it does 16,700 images of 32 pixels a
second where Pillow does 15,000.
"""

from __future__ import annotations

import io
import struct
import warnings
from hashlib import blake2b

import numpy as np
from PIL import Image, ImageOps

DECODE_VERSION = 1  # raised by hand when the same bytes would now give other pixels
MAX_PIXELS = 89_478_485  # Pillow's own warning limit: 256 MiB of RGB

# A closed list, because some of Pillow's other readers start programs (EPS) or have no magic number.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_EXIF_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")

# Pillow warns about odd metadata; what matters here either decodes or raises. Set once, since `catch_warnings` is not
# safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """An image that cannot be used; its text is the reason, without the file's name."""


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of an encoded image, by the rule of this module.

    Args:
        data: the whole file.
        max_pixels: width times height above which nothing is decoded; at most twice Pillow's limit has an effect.
    Returns:
        uint8 (H, W, 3), after orientation.
    Raises:
        BadImage: with the reason.
    """
    return np.asarray(open_rgb(data, max_pixels=max_pixels))


def open_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS, shrink_to: int | None = None) -> Image.Image:
    """As `decode_rgb`, as a Pillow image of mode RGB.

    With `shrink_to`, a JPEG with sides of at least four times as many pixels is decoded at 1/2, 1/4 or 1/8 scale, to at
    least twice `shrink_to`: 2 to 4 times faster on photographs, and within a few grey levels after the resize.
    """
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(_over_limit(width, height, max_pixels))
        if shrink_to is not None:
            image.draft(None, (2 * shrink_to, 2 * shrink_to))
        image.load()
        return _to_rgb(_upright(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"over the limit of {max_pixels / 1e6:.0f} megapixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(_not_an_image(data)) from error
    except Exception as error:  # on damaged bytes decoders raise what they like: struct.error, ValueError ...
        text = str(error) or type(error).__name__
        kind = "cut off" if "truncated" in text.lower() or isinstance(error, EOFError) else "damaged"
        raise BadImage(f"{kind}: {text}") from error


def square(image: Image.Image, pixels: int) -> np.ndarray:
    """The centre square of an RGB image at `pixels` by `pixels`: antialiased bilinear, as uint8 (3, pixels, pixels).

    As resizing the short side and cropping the centre, but a 5000 by 10 strip never becomes 16000 by 32 on the way.
    """
    width, height = image.size
    if (width, height) != (pixels, pixels):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize((pixels, pixels), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def content_id(rgb: np.ndarray) -> str:
    """The id of an image: 32 hexadecimal digits of BLAKE2b over height, width and its uint8 (H, W, 3) pixels.

    A lossless copy in another format or under another name has the same id.
    """
    digest = blake2b(struct.pack("<II", *rgb.shape[:2]), digest_size=16)
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def _upright(image: Image.Image) -> Image.Image:
    if image.format != "TIFF" and not any(key in image.info for key in _EXIF_KEYS):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels: keep them as stored
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    mode, transparent = image.mode, "transparency" in image.info
    if mode == "RGB" and not transparent:
        return image
    if mode.startswith("I"):
        value = np.asarray(image).astype(np.int64)
        if value.min() < 0 or value.max() > 65535:
            raise BadImage(f"32-bit pixels, {value.min()} to {value.max()}: no declared range, save as 8 or 16 bits")
        return Image.fromarray(((value + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode == "F":
        raise BadImage("floating-point pixels: no declared range, save as 8 or 16 bits")
    if transparent or mode in ("LA", "PA", "RGBA", "RGBa"):
        above = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, above).convert("RGB")
    return image.convert("RGB")


def _over_limit(width: int, height: int, max_pixels: int) -> str:
    return f"{width}x{height} is {width * height / 1e6:.0f} megapixels, the limit is {max_pixels / 1e6:.0f}"


def _not_an_image(data: bytes) -> str:
    head = data[:40]
    if all(byte in b"\t\n\r" or byte >= 32 for byte in head):
        words = " ".join(head.decode("utf-8", "replace").split())
        return f"not an image: text that begins {words!r}"
    return f"not an image: begins with the bytes {head[:8].hex(' ')}"
