"""Pictures, captions and shards that users bring: every kind of file is read right, or left out and counted."""

import io
import json
import os
import shutil
import struct
import sys
import tarfile
import zlib
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from conftest import process, script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from common.coco import CocoCaptions, captions_of, images, load_image
from common.files import is_disk_full, reserve

data = script("v3/data.py")
import coco_dataset

SIZE = 32


def scene(width=48, height=40) -> np.ndarray:
    """(height, width, 3) uint8: smooth, different at every corner and in every channel."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / (width - 1), 255 * y / (height - 1)
    blue = 127 + 100 * np.sin(x / 7) * np.cos(y / 9)
    return np.stack([red, green, blue], 2).round().astype(np.uint8)


def fitted(pixels: np.ndarray) -> np.ndarray:
    """What an 8-bit picture must become: Pillow's own resizing and cropping of all of its pixels."""
    image = Image.fromarray(pixels).convert("RGB")
    return np.asarray(ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)


def saved(image: Image.Image, kind: str, **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def error_of(file, want: np.ndarray) -> int:
    """The largest difference of a loaded picture from the wanted one, in levels."""
    found = load_image(file, SIZE)
    assert found.shape == (SIZE, SIZE, 3) and found.dtype == np.uint8
    return np.abs(found.astype(int) - want).max()


def psnr(a, b) -> float:
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


def coco_set(root, entries: list, annotations: list, split="train", encoding="utf-8"):
    """A folder in COCO's format with the given entries; the pictures are up to the caller."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    content = json.dumps({"images": entries, "annotations": annotations}, ensure_ascii=False)
    (root / "annotations" / f"captions_{split}.json").write_text(content, encoding)
    return root


def put(root, name: str, colour=(200, 40, 40), split="train"):
    path = root / split / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), colour).save(path, "PNG")
    return path


def usual_set(root, names: list[str], split="train"):
    """One picture and one caption a name, ids from 1."""
    entries = [{"id": i, "file_name": name} for i, name in enumerate(names, 1)]
    annotations = [{"id": i, "image_id": i, "caption": f"picture {i}"} for i in range(1, len(names) + 1)]
    coco_set(root, entries, annotations, split)
    for i, name in enumerate(names, 1):
        put(root, name, (20 * i % 256, 90, 200), split)
    return root


# ---- bit depths and modes ----

GREY = scene()[..., 2]


@pytest.mark.parametrize("values, kind", [
    (GREY.astype(np.uint16) * 257, "PNG"), (GREY.astype(np.uint16) * 257, "TIFF"), (GREY.astype(">u2") * 257, "TIFF"),
    (GREY.astype(np.uint16) * 257, "JPEG2000"), (GREY.astype(np.uint16) * 257, "PPM"),
    (GREY.astype(np.int32) * 257, "TIFF"), (GREY.astype(np.int32), "TIFF"),
    (GREY.astype(np.float32) / 255, "TIFF"), (GREY.astype(np.float32), "TIFF"), (GREY.astype(np.float32) * 257, "TIFF")])
def test_greys_of_more_than_8_bits_keep_their_brightness(values, kind):
    assert error_of(saved(Image.fromarray(values), kind), fitted(GREY)) <= 1


def test_a_dark_16_bit_picture_stays_dark():
    for kind in ("PNG", "PPM"):
        assert load_image(saved(Image.fromarray(GREY.astype(np.uint16)), kind), SIZE).max() <= 1


def test_floats_that_overshoot_are_clipped_and_other_ranges_stretched():
    over = GREY / np.float32(255) * 1.08 - 0.04
    want = np.clip(over.astype(float) * 255, 0, 255).round().astype(np.uint8)
    assert error_of(saved(Image.fromarray(over), "TIFF"), fitted(want)) <= 1
    low, high = float(GREY.min()), float(GREY.max())
    heights = GREY.astype(np.float32) * 12 - 900
    assert heights.min() < 0
    want = ((GREY - low) / (high - low) * 255).round().astype(np.uint8)
    for kind in (np.float32, np.int32):
        assert error_of(saved(Image.fromarray(heights.astype(kind)), "TIFF"), fitted(want)) <= 1
    normalized = (GREY - np.float32(127)) / 100
    assert error_of(saved(Image.fromarray(normalized), "TIFF"), fitted(want)) <= 1
    want = (GREY / high * 255).round().astype(np.uint8)
    assert error_of(saved(Image.fromarray(GREY.astype(np.int32) * 16), "TIFF"), fitted(want)) <= 1
    holes = GREY / np.float32(255)
    holes[:4] = np.nan
    want = GREY.copy()
    want[:4] = 0
    assert error_of(saved(Image.fromarray(holes), "TIFF"), fitted(want)) <= 1


def test_a_12_bit_tiff_is_white_at_4095():
    values = GREY.astype(np.uint32) * 4095 // 255
    pairs = values.reshape(-1, 2)  # two pixels in three bytes
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1).astype(np.uint8)
    height, width = GREY.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height),
            (279, packed.size)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    body = struct.pack("<2sHI", b"II", 42, 8 + packed.size) + packed.tobytes() + directory + struct.pack("<I", 0)
    assert error_of(io.BytesIO(body), fitted(GREY)) <= 1


@pytest.mark.parametrize("mode, kind", [
    ("1", "PNG"), ("1", "TIFF"), ("L", "PNG"), ("L", "JPEG2000"), ("P", "PNG"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "TIFF"),
    ("RGB", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("RGB", "PPM"), ("RGB", "TGA")])
def test_every_mode_of_8_bits_and_less_is_as_pillow_shows_it(mode, kind):
    image = Image.fromarray(scene()).convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow 12 cannot read the YCbCr TIFF that it writes")
    assert error_of(saved(image, kind, **options), fitted(np.asarray(image.convert("RGB")))) <= 1


@pytest.mark.parametrize("mode", ["HSV", "LAB"])
def test_other_colour_spaces_come_back_as_the_colours_that_went_in(mode, monkeypatch):
    image = Image.fromarray(scene())
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        file = saved(ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB"), "TIFF")
        tolerance = 30  # 8-bit Lab cannot hold all of them
    else:
        file, tolerance = "any", 8
        monkeypatch.setattr(Image, "open", lambda _: image.convert("HSV"))  # no file format has it
    found = load_image(file, SIZE).astype(int)
    difference = np.abs(found - fitted(scene()))
    assert difference.max() <= tolerance and difference.mean() < 3


def test_adobes_inverted_cmyk_jpeg_is_not_a_negative():
    image = Image.fromarray(scene()).convert("CMYK")
    assert psnr(load_image(saved(image, "JPEG", quality=95), SIZE), fitted(scene())) > 30


# ---- transparency ----

def half_hidden(alpha: int) -> np.ndarray:
    """(40, 48, 4): noise outside, a red square that shows inside; `alpha` of the outside."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 4), dtype=np.uint8)
    pixels[..., 3] = alpha
    pixels[12:28, 12:36] = (255, 0, 0, 255)
    return pixels


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("alpha", [0, 90])
def test_what_is_transparent_lies_on_white(kind, alpha):
    pixels = half_hidden(alpha)
    share = pixels[..., 3:].astype(float) / 255
    want = (pixels[..., :3] * share + 255 * (1 - share)).round().astype(np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert error_of(saved(Image.fromarray(pixels), kind, **options), fitted(want)) <= 2


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "LA"])
def test_premultiplied_and_palette_alpha_lie_on_white(mode, monkeypatch):
    grey = np.asarray(Image.fromarray(half_hidden(0)[..., :3]).convert("L"))
    alpha = half_hidden(0)[..., 3]
    image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    if mode == "PA":
        image = Image.fromarray(grey).convert("P")
        image.putalpha(Image.fromarray(alpha))
        assert image.mode == "PA"
    elif mode == "RGBa":
        image = image.convert("RGBA").convert("RGBa")
    else:
        image = image.convert(mode)
    monkeypatch.setattr(Image, "open", lambda _: image)  # few formats have these
    assert error_of("any", fitted(np.where(alpha > 0, grey, 255).astype(np.uint8))) <= 1


def test_transparent_palette_entries_and_colours_lie_on_white():
    index = np.arange(48 * 40, dtype=np.uint8).reshape(40, 48) % 3
    palette = [200, 0, 0, 0, 200, 0, 0, 0, 200]
    image = Image.fromarray(index, "P")
    image.putpalette(palette)
    colours = np.array(palette, np.uint8).reshape(3, 3)[index]
    colours[index == 1] = 255
    for kind, transparency in (("PNG", 1), ("GIF", 1), ("PNG", bytes([255, 0, 255]))):
        assert error_of(saved(image, kind, transparency=transparency), fitted(colours)) <= 1
    flat = np.where(index[..., None] == 1, (0, 200, 0), (9, 9, 99)).astype(np.uint8)
    want = np.where(index[..., None] == 1, 255, flat).astype(np.uint8)
    assert error_of(saved(Image.fromarray(flat), "PNG", transparency=(0, 200, 0)), fitted(want)) <= 1
    deep = GREY.astype(np.uint16) * 257
    want = np.where(deep == deep[3, 5], 255, GREY)
    assert error_of(saved(Image.fromarray(deep), "PNG", transparency=int(deep[3, 5])), fitted(want)) <= 1


# ---- first frames, orientation, profiles ----

@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_many_pictures_in_a_file_the_first_counts(kind):
    first, second = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    file = saved(first, kind, save_all=True, append_images=[second], **options)
    assert error_of(file, fitted(np.asarray(first))) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind, size", [("PNG", (48, 40)), ("JPEG", (48, 40)), ("JPEG", (333, 250)), ("TIFF", (48, 40))])
def test_pictures_are_upright(orientation, kind, size):
    width, height = size
    upright = scene(width, height)
    # how a camera that is held so stores what it sees: the inverse of what EXIF says to do
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
              6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    file = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert psnr(load_image(file, SIZE), fitted(upright)) > 40


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"II*\0", b"", b"MM\0*\0\0\0\x08\0\xff", b"nonsense",
                                  b"II*\0\x08\0\0\0\x01\0\x12\1\3\0\1\0\0\0"])
def test_a_damaged_exif_block_does_not_cost_the_picture(exif):
    png = saved(Image.fromarray(scene()), "PNG").getvalue()
    png = png[:33] + chunk(b"eXIf", exif) + png[33:]  # behind the header
    assert error_of(io.BytesIO(png), fitted(scene())) <= 1
    jpeg = saved(Image.fromarray(scene()), "JPEG", quality=95).getvalue()
    block = b"Exif\0\0" + exif
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]
    assert psnr(load_image(io.BytesIO(jpeg), SIZE), fitted(scene())) > 35


def profile_of(red, green, blue, gamma: float) -> bytes:
    """A minimal ICC profile of an RGB space: its primaries' XYZ under D50 and one exponent."""
    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    tags = [(name, b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz)))
            for name, xyz in ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue), (b"wtpt", (0.9642, 1, 0.8249)))]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags:
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", place + len(body), b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642) + fixed(1) + fixed(0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
ADOBE_RGB = profile_of(*ADOBE, 563 / 256)


def test_an_adobe_rgb_picture_becomes_srgb():
    """Against the standards' own formulas: linear light, a matrix, sRGB's curve."""
    pixels = scene()
    to_xyz = np.array(ADOBE).T
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])  # D50
    linear = (pixels / 255) ** (563 / 256) @ (np.linalg.inv(srgb) @ to_xyz).T
    linear = linear.clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    want = fitted((curve * 255).round().astype(np.uint8))
    assert error_of(saved(Image.fromarray(pixels), "PNG", icc_profile=ADOBE_RGB), want) <= 3
    assert np.abs(want - fitted(pixels)).max() > 15


def test_srgb_broken_and_unfitting_profiles_change_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    header = ADOBE_RGB[:16]
    for profile in (srgb, b"x", b"", ADOBE_RGB[:200], header + b"GRAY" + ADOBE_RGB[20:], header + b"CMYK" + ADOBE_RGB[20:]):
        assert error_of(saved(Image.fromarray(scene()), "PNG", icc_profile=profile), fitted(scene())) == 0
    grey = saved(Image.fromarray(GREY), "PNG", icc_profile=srgb)
    assert error_of(grey, fitted(GREY)) <= 1


# ---- reduced decoding ----

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([8, 32, 64]))
def test_reduced_decoding_has_the_geometry_of_the_whole_one(width, height, size):
    """A ramp from side to side: a shift or stretch shows, in pixels, as its share of the step from one pixel to the next."""
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    file = saved(Image.fromarray(ramp.round().astype(np.uint8)), "JPEG", quality=98)
    whole = ImageOps.fit(Image.open(file), (size, size), Image.Resampling.BICUBIC)
    file.seek(0)
    difference = np.abs(load_image(file, size).astype(int) - np.asarray(whole))
    step = 255 / size
    assert difference.mean() < max(0.8, 0.05 * step) and difference.max() <= max(4, 0.2 * step)


@pytest.mark.parametrize("width, height", [(640, 480), (640, 427), (640, 426), (480, 640), (500, 375), (500, 333)])
def test_fine_lines_survive_reduced_decoding(width, height):
    y, x = np.mgrid[:height, :width]
    lines = (127 + 100 * np.sin(2 * np.pi * y / 12) * np.sin(2 * np.pi * x / 14)).astype(np.uint8)
    file = saved(Image.fromarray(np.stack([lines] * 3, 2)), "JPEG", quality=95)
    whole = ImageOps.fit(Image.open(file), (64, 64), Image.Resampling.BICUBIC)
    assert psnr(load_image(file, 64), whole) > 38


# ---- captions ----

def test_what_is_no_string_is_no_caption():
    assert captions_of("  a\tcat\n on  grass ") == ["a cat on grass"]
    assert captions_of(["a", None, 3, 1.5, True, {"a": 1}, ["b"], "", " \n", "\0\0", "b\0c", "None"]) == ["a", "b c", "None"]
    assert captions_of(["\u3000", "\x85 x\x1f", "half \ud83d"]) == ["x", "half"]
    joined = "می\u200cخواهم 👩\u200d🚀"  # invisible characters that belong to the text
    assert captions_of(joined) == [joined]
    for nothing in (None, 0, 1.5, True, {}, {"caption": "a"}, [], float("nan")):
        assert captions_of(nothing) == []


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=6)


@settings(max_examples=50, deadline=None)
@given(JSON)
def test_captions_are_clean_whatever_comes(values):
    found = captions_of(values)
    assert all(c and c == " ".join(c.split()) and c.encode() and "\0" not in c for c in found)
    assert captions_of(found) == found


def test_null_captions_are_counted_as_none(tmp_path):
    root = usual_set(tmp_path, [f"{i}.png" for i in range(5)])
    entries = [{"id": i, "file_name": f"{i - 1}.png"} for i in range(1, 6)]
    texts = {1: [None, " "], 2: [None, "a cat"], 3: [["x"], {"a": 1}, 7], 4: ["\0"], 5: ["a dog"]}
    coco_set(root, entries, [{"image_id": i, "caption": c} for i, cs in texts.items() for c in cs])
    dataset = CocoCaptions(root, "train", SIZE)
    assert dataset.files == ["1.png", "4.png"] and dataset.captions == [["a cat"], ["a dog"]]
    assert dataset.skipped == {"no caption": 3}
    assert dataset.left_out() == "3 no caption, such as 0.png (no caption), 2.png (no caption), 3.png (no caption)"


# ---- ids and names ----

def test_pictures_that_share_an_id_are_left_out_and_counted(tmp_path):
    names = [f"{kind}_{i}.png" for kind in ("cat", "dog") for i in (1, 2)]
    entries = [{"id": int(name[4]), "file_name": name} for name in names] + [{"id": 9, "file_name": "bird.png"}] * 2
    root = coco_set(tmp_path, entries, [{"image_id": i, "caption": f"number {i}"} for i in (1, 1, 2, 2, 9)])
    for name in [*names, "bird.png"]:
        put(root, name)
    dataset = CocoCaptions(root, "train", SIZE)
    assert dataset.files == ["bird.png"] and dataset.captions == [["number 9"]]
    assert dataset.skipped == {"repeated id": 4}
    with pytest.raises(SystemExit, match="error: 4 of 5 pictures of train .*cat_1.png .repeated id"):
        dataset.require_share(0.5)
    dataset.require_share(0.8)


def test_ids_may_be_text_or_numbers_and_come_in_order(tmp_path):
    ids = ["img_2", 10, 9.0, "img_10", 2, 1.5, "10", None, True, [1], {"a": 1}, float("nan")]
    entries = [{"id": i, "file_name": f"{k}.png"} for k, i in enumerate(ids)] + [{"file_name": "no id.png"}]
    annotations = [{"image_id": i, "caption": f"of {i}"} for i in ids] + [{"caption": "nobody's"}]
    root = coco_set(tmp_path, entries, annotations)
    for k in range(len(ids)):
        put(root, f"{k}.png")
    dataset = CocoCaptions(root, "train", SIZE)
    assert dataset.image_ids == [2, 9, 10, 1.5, "10", "img_10", "img_2"]
    assert dataset.captions == [["of 2"], ["of 9.0"], ["of 10"], ["of 1.5"], ["of 10"], ["of img_10"], ["of img_2"]]
    assert dataset.skipped == {"no id": 6}


def test_names_may_have_folders_but_never_leave_their_own(tmp_path):
    outside = put(tmp_path, "secret.png", split="elsewhere")
    names = ["sub/deep er/a.png", "b.png", str(outside), "../elsewhere/secret.png", "sub/../b.png", "sub", "", ".", "a\0b.png",
             "n" * 300, 5, "gone.png", "link.png", "fine.png"]
    root = coco_set(tmp_path, [{"id": i, "file_name": n} for i, n in enumerate(names)],
                    [{"image_id": i, "caption": "x"} for i in range(len(names))])
    put(root, names[0])
    put(root, "b.png")
    (root / "train" / "link.png").symlink_to("not-fetched/here")
    (root / "train" / "fine.png").symlink_to(outside)  # the user's own link
    dataset = CocoCaptions(root, "train", SIZE)
    assert dataset.files == ["sub/deep er/a.png", "b.png", "fine.png"]
    assert dataset.skipped == {"missing file": 11} and len(dataset.examples) == 5
    assert dataset.path(0) == root / "train" / "sub" / "deep er" / "a.png" and all(x is not None for x in dataset)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_annotations_come_in_any_unicode_encoding_with_a_mark(tmp_path, encoding):
    root = coco_set(tmp_path, [{"id": 1, "file_name": "é.png"}], [{"image_id": 1, "caption": "café 猫"}], encoding=encoding)
    put(root, "é.png")
    dataset = CocoCaptions(root, "train", SIZE)
    assert dataset.files == ["é.png"] and dataset.captions == [["café 猫"]]


def test_what_cannot_be_decoded_is_none_whatever_is_raised(tmp_path, monkeypatch):
    names = ["whole.png", "cut.png", "zero.png", "text.png", "bomb.png", "raises.png"]
    root = usual_set(tmp_path, names)
    folder = root / "train"
    whole = saved(Image.fromarray(scene()), "PNG").getvalue()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    Image.new("1", (1500, 1500)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    dataset = CocoCaptions(root, "train", SIZE)
    assert [x is None for x in (dataset[i] for i in range(5))] == [False, True, True, True, True]
    found = list(images(dataset, 4))
    assert [(indices, end) for _, indices, end in found] == [([0], 4), ([5], 6)]
    assert all(torch.equal(stacked, dataset[i][None]) for stacked, (i,), _ in found)
    assert [(indices, end) for _, indices, end in images(dataset, 2, start=4)] == [([5], 6)]
    for error in (struct.error, KeyError, RuntimeError, MemoryError, AssertionError):
        monkeypatch.setattr("common.coco.load_image", lambda *_, error=error: (_ for _ in ()).throw(error()))
        assert dataset[0] is None
    monkeypatch.setattr("common.coco.load_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        dataset[0]


def test_a_set_of_nothing_usable_is_one_line(tmp_path):
    root = coco_set(tmp_path, [{"id": 1, "file_name": "gone\n.png"}], [{"image_id": 1, "caption": "x"}])
    with pytest.raises(SystemExit, match="^error: .*1 missing file, such as gone .png .missing file.$"):
        CocoCaptions(root, "train", SIZE)


def test_the_fingerprint_sees_every_change_and_no_other_place(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    root = usual_set(tmp_path / "here", names)
    for name in names:
        os.utime(root / "train" / name, ns=(0, 10**18))
    first = CocoCaptions(root, "train", SIZE).fingerprint()
    assert first == CocoCaptions(root, "train", SIZE).fingerprint() and len(first) < 40
    os.rename(root, tmp_path / "there")
    root = tmp_path / "there"
    seen = {first, CocoCaptions(root, "train", SIZE).fingerprint()}
    assert len(seen) == 1
    seen.add(CocoCaptions(root, "train", 64).fingerprint())
    seen.add(CocoCaptions(root, "train", SIZE, limit=2).fingerprint())
    os.utime(root / "train" / "b.png", ns=(0, 10**18 + 1))  # replaced by one of the same size
    seen.add(CocoCaptions(root, "train", SIZE).fingerprint())
    os.utime(root / "train" / "b.png", ns=(0, 10**18))
    assert CocoCaptions(root, "train", SIZE).fingerprint() == first
    annotations = root / "annotations" / "captions_train.json"
    annotations.write_text(annotations.read_text().replace("picture 3", "picture 4"))
    seen.add(CocoCaptions(root, "train", SIZE).fingerprint())
    with open(root / "train" / "c.png", "ab") as file:
        file.write(b"x")
    os.utime(root / "train" / "c.png", ns=(0, 10**18))
    seen.add(CocoCaptions(root, "train", SIZE).fingerprint())
    assert len(seen) == 6


# ---- shards ----

def write(root, out, **options):
    data.main(data.Settings(data=str(root), split="train", out=str(out), **options))
    return [sample for sample in coco_dataset.samples(coco_dataset.find_shards(str(out)))]


def test_what_a_kill_left_of_a_shard_is_removed(small_set, tmp_path):
    tmp_path.joinpath("00000.partial-7").write_bytes(b"half")
    assert len(write(small_set, tmp_path, shard_size=24)) == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar", "shards.json"]


def test_a_download_goes_on_with_its_own_list_only(tmp_path, monkeypatch):
    """img2dataset goes by the numbers of the shards that are there, so it would call another list's download done."""
    called = []
    monkeypatch.setitem(sys.modules, "img2dataset", SimpleNamespace(download=lambda **options: called.append(options)))
    lists = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for number, path in enumerate(lists):
        path.write_text("URL,TEXT\n" + f"http://127.0.0.1/{number}.jpg,a cat\n" * (number + 1), "utf-8")

    def download(path, **options):
        data.main(data.Settings(urls=str(path), out=str(tmp_path / "out"), **options))

    download(lists[0])
    download(lists[0])
    assert [call["url_list"] for call in called] == [str(lists[0])] * 2
    for path, options in ((lists[1], {}), (lists[0], {"shard_size": 5})):
        with pytest.raises(SystemExit, match="another list or set"):
            download(path, **options)
    (tmp_path / "out" / "urls.txt").unlink()
    (tmp_path / "out" / "00000.tar").write_bytes(b"")
    with pytest.raises(SystemExit, match="another list or set"):
        download(lists[0])
    assert len(called) == 2


def test_shards_hold_whatever_the_folder_reader_reads(tmp_path, capsys):
    kinds = {".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF", ".jfif": "JPEG", ".JPG": "JPEG", ".webp": "WEBP", ".jp2": "JPEG2000",
             ".PNG": "PNG", "": "PNG", ".json": "PNG", ".txt": "PNG", ".v2.png": "PNG"}
    root = usual_set(tmp_path / "set", [f"sub/{k}{end}" for k, end in enumerate(kinds)])
    for k, (end, kind) in enumerate(kinds.items()):
        Image.fromarray(scene()).save(root / "train" / "sub" / f"{k}{end}", kind)
    dataset = CocoCaptions(root, "train", SIZE)
    found = write(root, tmp_path / "out", shard_size=5)
    assert len(found) == len(dataset) == len(kinds)
    for i, sample in enumerate(found):
        pixels, caption = coco_dataset.decode_sample(sample, SIZE, data.random.Random(0))
        assert torch.equal(pixels, dataset[i]) and caption == f"picture {i + 1}"
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        data.main(data.Settings(check=str(tmp_path / "out")))
    assert ended.value.code == 0 and capsys.readouterr().out == "12 samples\n"


def test_ids_of_any_kind_make_samples_of_their_own(tmp_path):
    ids = ["img_1", "a.b/c", "../x", "n" * 300, 7, 10**40, -3, 2.5]
    root = coco_set(tmp_path / "set", [{"id": x, "file_name": f"{k}.png"} for k, x in enumerate(ids)],
                    [{"image_id": x, "caption": f"of {k}"} for k, x in enumerate(ids)])
    for k in range(len(ids)):
        put(root, f"{k}.png")
    found = write(root, tmp_path / "out")
    keys = [sample["__key__"] for sample in found]
    assert len(set(keys)) == len(ids) and "000000000007" in keys and all("/" not in key for key in keys)
    dataset = CocoCaptions(root, "train", SIZE)
    assert [json.loads(sample["json"])["image_id"] for sample in found] == dataset.image_ids
    assert [coco_dataset.sample_captions(sample) for sample in found] == dataset.captions


def test_a_mac_asks_for_space_before_it_maps_a_file(tmp_path, monkeypatch):
    """Its Python cannot claim any, and a map onto a full disk ends the process."""
    path = tmp_path / "array.npy"
    path.write_bytes(bytes(1000))
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    reserve(path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(OSError) as found:
        reserve(path)
    assert is_disk_full(found.value, tmp_path)


def test_pictures_that_are_gone_are_skipped_and_only_a_full_disk_asks_for_space(tmp_path, capsys, monkeypatch):
    root = usual_set(tmp_path / "set", ["a.png", "b.png", "c.png"])
    (root / "train" / "a.png").unlink()
    (root / "train" / "a.png").symlink_to("not-fetched/here")
    whole = data.Path.read_bytes

    def read(path):
        if path.name == "b.png":
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(data.Path, "read_bytes", read)
    found = write(root, tmp_path / "out")
    assert len(found) == 1
    printed = capsys.readouterr().out
    assert "1 samples in 1 shards" in printed and "1 missing file, 1 cannot be read, such as a.png" in printed
    for error, said, unsaid in ((OSError(28, "No space left on device"), "free some space", "cannot be written"),
                                (PermissionError(13, "Permission denied"), "cannot be written .Permission denied", "space")):
        monkeypatch.setattr(data, "write_shard", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(SystemExit, match=said) as ended:
            write(root, tmp_path / str(error.errno))
        assert unsaid not in str(ended.value)


def test_a_changed_set_is_not_mixed_into_its_old_shards(tmp_path):
    root = usual_set(tmp_path / "set", ["a.png", "b.png"])
    write(root, tmp_path / "out")
    write(root, tmp_path / "out")
    put(root, "b.png", (0, 0, 0))
    os.utime(root / "train" / "b.png", ns=(0, 1))
    with pytest.raises(SystemExit, match="another --out"):
        write(root, tmp_path / "out")


@pytest.mark.parametrize("name", ["sh [v2]", "a*b?c", "{x}", "plain é"])
def test_shards_are_found_in_folders_of_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.tar").write_bytes(b"")
    (folder / "3.partial-1").write_bytes(b"")
    every = [str(folder / f"{number}.tar") for number in range(3)]
    assert coco_dataset.find_shards(str(folder)) == every
    assert coco_dataset.find_shards(str(folder / "*.tar")) == every
    assert coco_dataset.find_shards(str(folder / "[01].tar")) == every[:2]
    assert coco_dataset.find_shards(str(folder / "1.tar")) == every[1:2]
    with pytest.raises(SystemExit, match="no .tar shards at"):
        coco_dataset.find_shards(str(folder / "no*.tar"))


def test_captions_of_a_sample():
    def of(content=None, txt=None):
        sample = {} if content is None else {"json": json.dumps(content).encode()}
        return coco_dataset.sample_captions(sample | ({} if txt is None else {"txt": txt}))

    assert of({"caption": None}) == of({"caption": None}, b"None") == of({"caption": ""}) == of() == of(5) == []
    assert of({"captions": ["a", None]}) == of({"caption": " a "}) == of({"captions": [], "caption": "a"}) == ["a"]
    assert of(txt="\ufeffa  cat\r\n".encode()) == of({"width": 3}, b"a cat") == of(["x"], b"a cat") == ["a cat"]


def tar_of(path, members: dict):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_null_captions_of_img2dataset_are_counted(tmp_path, capsys):
    picture = saved(Image.new("RGB", (40, 40)), "JPEG").getvalue()
    members = {}
    for k, caption in enumerate((None, "a cat", "")):
        members |= {f"{k:09d}.jpg": picture, f"{k:09d}.json": json.dumps({"caption": caption}).encode()}
    tar_of(tmp_path / "null-captions.tar", members)
    assert data.check_shards(str(tmp_path)) == 2
    assert "3 samples, 2 without a caption" in capsys.readouterr().out


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """8 shards of 12 samples, of which most in the middle ones are broken: whole batches without a picture."""
    out = tmp_path_factory.mktemp("sh [v2]")
    for shard in range(8):
        members = {}
        for k in range(12):
            colour = (shard * 30, k * 20, 99)
            picture = saved(Image.new("RGB", (36, 36), colour), "PNG").getvalue()
            broken = shard in (3, 4) and k % 6 != 5 or k == 7
            members[f"{shard}-{k}.png"] = b"broken" if broken else picture
            members[f"{shard}-{k}.json"] = json.dumps({"captions": [f"{shard} {k} {n}" for n in range(3)]}).encode()
        tar_of(out / f"{shard}.tar", members)
    return out


def batches(shards, workers: int, skip: int, count: int, rank=0, processes=1):
    stream = coco_dataset.ShardStream(shards, SIZE, 3, seed=5, rank=rank, processes=processes, skip=skip)
    loader = iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers))
    return [next(loader) for _ in range(count)]


@pytest.mark.usefixtures("v3_in_path")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_stream_goes_on_at_any_batch_with_any_number_of_workers(many_shards, workers):
    shards = coco_dataset.find_shards(str(many_shards))
    whole = batches(shards, workers, 0, 45)  # more than an epoch
    assert len({tuple(captions) for _, captions in whole}) > 30
    for skip in (1, 5, 26):
        rest = batches(shards, workers, skip, 45 - skip)
        for (pixels, captions), (again, again_captions) in zip(whole[skip:], rest):
            assert torch.equal(pixels, again) and captions == again_captions


def test_an_epoch_of_all_workers_is_every_good_sample(many_shards):
    shards = coco_dataset.find_shards(str(many_shards))
    keys = []
    for rank in range(2):
        stream = coco_dataset.ShardStream(shards, SIZE, 3, seed=5, rank=rank, processes=2)
        for worker in range(2):
            for epoch, sample in stream.raw(worker, 2):
                if epoch:
                    break
                keys.append(sample["__key__"])
    assert len(keys) == len(set(keys)) == 96


def shard_pairs(shards, teacher, rank=0, processes=1, workers=2):
    return coco_dataset.ShardPairs(str(shards), teacher, process(rank, processes), size_px=SIZE, batch_size=8, seed=3,
                                   workers=workers, flip=True)


@pytest.mark.usefixtures("v3_in_path")
def test_pairs_from_shards_resume_bit_for_bit_and_share_one_batchs_noise(many_shards, teacher):
    pairs = shard_pairs(many_shards, teacher)
    unbroken = [pairs.draw(step, 0.3, part=part, parts=2) for step in range(4) for part in range(2)]
    resumed = shard_pairs(many_shards, teacher)
    again = [resumed.draw(step, 0.3, part=part, parts=2) for step in range(3, 4) for part in range(2)]
    for one, other in zip(unbroken[6:], again):
        for field in ("latents", "encoder_hidden_states", "noise", "timesteps"):
            assert torch.equal(getattr(one, field), getattr(other, field))
    assert unbroken[0].latents.shape == (4, 4, 8, 8) and unbroken[0].dropout == 0.3
    assert unbroken[0].latents.dtype == unbroken[0].encoder_hidden_states.dtype == torch.float32
    whole = shard_pairs(many_shards, teacher, workers=0).draw(2, 0.3)
    parts = [shard_pairs(many_shards, teacher, rank, 2, workers=0).draw(2, 0.3, part=part, parts=2)
             for rank in range(2) for part in range(2)]
    assert torch.equal(torch.cat([p.noise for p in parts]), whole.noise)
    assert torch.equal(torch.cat([p.timesteps for p in parts]), whole.timesteps)
    dropped = shard_pairs(many_shards, teacher, workers=0).draw(0, 1.0)
    assert all(torch.equal(states, pairs.empty[0]) for states in dropped.encoder_hidden_states)
    assert resumed.fingerprint() == pairs.fingerprint()
    for other in ({"processes": 2}, {"workers": 3}):  # which other samples then meet in a batch
        assert shard_pairs(many_shards, teacher, **other).fingerprint() != pairs.fingerprint()
    with pytest.raises(SystemExit, match="8 shards are too few for 3 processes with 3 workers"):
        shard_pairs(many_shards, teacher, 0, 3, workers=3)
