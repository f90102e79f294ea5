"""A picture file of any kind as RGB pixels of a wanted size."""

import functools
import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms

TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF's orientations
PROFILE_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # the colour space in an ICC profile's header
SRGB = ImageCms.createProfile("sRGB")


def load_image(file: Path | BinaryIO, size_px: int) -> np.ndarray:
    """(size_px, size_px, 3) uint8: upright, sRGB on white, shorter side resized to `size_px` (bicubic), centre cropped.

    Of an animation or a file of many pages it is the first picture. Raises whatever Pillow raises on a broken file.
    """
    with Image.open(file) as image:
        # JPEGs: the decoder's own down-scaling, to no less than 1.5 times of what is wanted. To 64 px, on 210 JPEGs of 18
        # photographs at COCO's sizes: 41 dB from the whole decoding at worst, median 47, 1.25 ms a picture where the whole
        # decoding takes 3.2; to no less than once: 36, 44 and 1.2 ms; to no less than twice: 48, 53 and 1.7 ms.
        drafted = image.draft(None, (3 * size_px // 2, 3 * size_px // 2))
        image.load()
        # the last column and row of a reduced picture may stand for less than a whole one
        width, height = drafted[1][2:] if drafted else image.size
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)  # a TIFF turns itself
        except Exception:  # a damaged EXIF block; the pixels are whole
            orientation = None
        profile = image.info.get("icc_profile")
        image = to_srgb(without_alpha(image), profile)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    image = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box)
    if orientation in TURNS:  # a centred square may be turned after it was cut out
        image = image.transpose(TURNS[orientation])
    return np.array(image)


def without_alpha(image: Image.Image) -> Image.Image:
    """The picture in 8-bit L, RGB or CMYK, with white behind what is transparent."""
    if image.mode.startswith(("I", "F")):
        return to_8_bit(image)
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), SRGB, outputMode="RGB")
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "La")
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # from colours that are multiplied by their alpha
        image = image.convert(straight) if straight else image
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("L" if grey else "RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def to_8_bit(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits as L: black is 0, white is `white_of`; where that is unknown, the values are stretched
    so that the largest is white and the least, if it is negative, black. What is no number is black."""
    values = np.asarray(image).astype(np.float64)  # (h, w)
    finite = values[np.isfinite(values)]
    low, high = finite.min(), finite.max()
    white = white_of(image, low, high)
    black, white = (0, white) if white else (min(low, 0), high)
    scaled = (values - black) * 255 / max(white - black, 1e-30)
    pixels = np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)
    transparent = image.info.get("transparency")  # the one value that a PNG shows as transparent
    if transparent is not None:
        pixels[values == transparent] = 255
    return Image.fromarray(pixels)


def white_of(image: Image.Image, low: float, high: float) -> int | None:
    """The value that is white. Modes I and F do not say, so it is guessed from the largest value: 1 (F only), 255 or 65535,
    each with 10 % to spare for what resampling overshoots; None where none of them fits."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample)  # a TIFF's
        return 4095 if bits == (12,) else 65535
    if image.mode == "I" and image.format == "PPM":  # Pillow scales a PGM to 16 bits
        return 65535
    if low < -0.1 * abs(high):
        return None
    if image.mode == "F" and high <= 1.1:
        return 1
    if high <= 1.1 * 255:
        return 255
    return 65535 if 65535 / 8 <= high <= 1.1 * 65535 else None


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An L, RGB or CMYK picture as RGB, through its ICC profile where it has a usable one that is not sRGB."""
    # Most JPEGs have none or sRGB: under 1 us. Another one: 4.4 ms a picture in place of 2.1 at 64 px (640 x 427).
    mode = PROFILE_MODES.get(profile[16:20]) if profile else None
    if mode == "RGB" and image.mode == "L":  # a grey picture that kept a colour picture's profile
        image = image.convert("RGB")
    if mode == image.mode:
        transform = srgb_transform(profile, mode)
        image = ImageCms.applyTransform(image, transform) if transform else image
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=16)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where the profile is broken, or sRGB itself to within two levels."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    bands = len(mode) if mode != "L" else 1
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    colours = np.stack(np.meshgrid(*[levels] * bands), -1)  # every mixture of 16 levels of each band
    probe = Image.frombytes(mode, (colours.size // bands, 1), colours.tobytes())
    plain = np.asarray(probe.convert("RGB")).astype(int)
    moved = np.asarray(ImageCms.applyTransform(probe, transform))
    return transform if np.abs(moved - plain).max() > 2 else None
