"""The formats of a folder of captioned pictures:

    annotations/captions_<split>.json    COCO's; the pictures lie in <split>/
    a.jpg and a.txt                      a .txt of the same name beside a picture, one caption a line; in sub-folders too
    metadata.jsonl or metadata.csv       a file_name each, and text, caption or captions (Hugging Face's ImageFolder)

A reader yields (id, names of the files that have this id, their captions as they are written), in the order of the ids.
"""

import csv
import hashlib
import io
import json
import math
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from common.files import read_text
from common.settings import require

COCO, TXT, JSONL, CSV = "COCO's annotations", ".txt files beside the pictures", "metadata.jsonl", "metadata.csv"
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and halves of characters


def find_format(root: Path) -> str:
    """Where the captions of a folder stand: COCO, TXT, JSONL or CSV. Raises SystemExit unless it is one of them."""
    found = [COCO] if any((root / "annotations").glob("captions_*.json")) else []
    found += [name for name in (JSONL, CSV) if (root / name).is_file()]
    found += [TXT] if any(text for _, text in pictures_in(root)) else []
    require(found, f"{root} holds no captioned pictures: no annotations/captions_<split>.json (COCO), no .txt of the same name "
                   "beside a picture, no metadata.jsonl or metadata.csv. COCO 2017 comes with python data/download_coco.py "
                   f"--out {root}; --mini needs no pictures")
    require(len(found) == 1, f"{root} holds captions in {' and in '.join(found)}; keep one of them and move the rest elsewhere")
    return found[0]


def read_pictures(root: Path, kind: str, split: str, part: tuple[float, float]) -> Iterator[tuple]:
    """The reader of the format `kind`: in COCO's of a split, in the others, which have none, of a `part` of the pictures."""
    if kind == COCO:
        return read_coco(root, split)
    return read_txt(root, part) if kind == TXT else read_metadata(root / kind, part)


def is_in(part: tuple[float, float], name: str) -> bool:
    """Whether a file lies in a part of all of them, such as (0, 0.05). Its name alone decides, so it stays there whatever is
    added; not its extension, as a.jpg and a.png share their captions."""
    stem = os.path.splitext(name)[0].encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(stem, digest_size=4).digest()
    return part[0] <= int.from_bytes(digest, "big") / 2**32 < part[1]


# --- what is written in the files -----------------------------------------------------------------------------------


def clean(text: str) -> str:
    """White space, and what is no text, as single spaces."""
    words = NO_TEXT.sub(" ", text).split()
    return " ".join(words)


def captions_of(values) -> list[str]:
    """The captions in what a JSON file holds: the strings that are not empty once they are `clean`.

    `values` may be one string, a list, or anything else; what is not a string is no caption.
    """
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list):
        return []
    captions = [clean(value) for value in values if isinstance(value, str)]
    return [caption for caption in captions if caption]


def id_of(value) -> int | float | str | None:
    """An id as it is compared: 1.0 is 1. None for what is no id."""
    if isinstance(value, float):
        whole = int(value) if value.is_integer() else value
        return whole if math.isfinite(value) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


# --- the readers ----------------------------------------------------------------------------------------------------


def read_coco(root: Path, split: str):
    """Ids that are whole numbers come first, then the others' text."""
    annotations, folder = root / "annotations" / f"captions_{split}.json", root / split
    missing = folder if annotations.is_file() else annotations
    require(annotations.is_file() and folder.is_dir(), f"{missing} is missing; name a split that is there, or download COCO "
                                                       f"2017 with python data/download_coco.py --out {root}")
    try:
        content = json.loads(read_text(annotations))
        names, texts = {}, {}  # of each id; the names as a dict's keys, which keep their order
        for image in content["images"]:
            names.setdefault(id_of(image.get("id")), {})[image["file_name"]] = True
        for annotation in content["annotations"]:
            texts.setdefault(id_of(annotation.get("image_id")), []).append(annotation.get("caption"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SystemExit(
            f"error: {annotations} is not a COCO captions file ({type(error).__name__}: {str(error)[:100]}); "
            "download it again with data/download_coco.py"
        ) from None
    for image_id in sorted(names, key=lambda i: (0, i, "") if isinstance(i, int) else (1, 0, str(i))):
        yield image_id, list(names[image_id]), texts.get(image_id)


def pictures_in(root: Path) -> Iterator[tuple[str, str]]:
    """(name within `root`, path of the .txt of the same name or "") of every picture; what is hidden is none."""
    seen = set()  # a link may lead into a folder around it
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        place = Path(folder).relative_to(root).as_posix() + "/"
        texts = {os.path.splitext(name)[0]: name for name in files if name.lower().endswith(".txt")}
        for name in files:
            stem, extension = os.path.splitext(name)
            if extension.lower() in PICTURES and not name.startswith("."):
                text = texts.get(stem)
                yield place.removeprefix("./") + name, os.path.join(folder, text) if text else ""


def read_txt(root: Path, part: tuple[float, float]):
    for name, text in sorted(pictures_in(root)):
        if is_in(part, name):
            yield name, [name], read_text(text).splitlines() if text else []


def read_metadata(path: Path, part: tuple[float, float]):
    """A picture that several lines name has the captions of all of them."""
    captions = {}
    for row in jsonl_rows(path) if path.suffix == ".jsonl" else csv_rows(path):
        found = captions_of(row.get("text")) or captions_of(row.get("caption")) or captions_of(row.get("captions"))
        name = posixpath.normpath(row["file_name"]) if row["file_name"] else ""  # "./a.jpg" is a.jpg
        captions.setdefault(name, []).extend(found)
    for name in sorted(captions):
        if is_in(part, name):
            yield name, [name], captions[name]


def jsonl_rows(path: Path) -> Iterator[dict]:
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would also cut at what JSON allows in a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        named = isinstance(row, dict) and isinstance(row.get("file_name"), str)
        require(named, f"{path}, line {number}: no JSON object with a file_name; mend the line or remove it")
        yield row


def csv_rows(path: Path) -> Iterator[dict]:
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        require("file_name" in (rows.fieldnames or []), f"{path}, line 1: no column file_name; name the columns there, with "
                                                        "commas between them: file_name,text")
        for row in rows:
            require(None not in row, f"{path}, line {rows.reader.line_num}: more fields than columns; put a caption that holds "
                                     'commas between quotes: a.jpg,"a cat, asleep"')
            yield row
    except csv.Error as error:
        raise SystemExit(f"error: {path}, line {rows.reader.line_num}: no CSV ({error}); mend the line or remove it") from None
