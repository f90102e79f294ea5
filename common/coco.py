"""COCO captions from any folder in COCO's format: `<root>/<split>/*.jpg` and `<root>/annotations/captions_<split>.json`."""

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path, PurePath

import torch

from common.files import read_text
from common.images import load_image

NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and halves of characters


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


class CocoCaptions(torch.utils.data.Dataset):
    """The pictures of one split that exist and have a caption, sorted by id: whole numbers first, then the others' text.

    Item i is a (3, size_px, size_px) uint8 tensor, or None where the file cannot be decoded. `files[i]` is its name within
    the split's folder, `captions[i]` are its captions; `skipped` counts what was left out, by reason, and `examples` names
    the first five. Where one id stands for several files, none is used, as nobody knows whose its captions are.
    Raises SystemExit with one line where the folder or its annotations cannot be used.
    """

    def __init__(self, root: str | Path, split: str, size_px: int, limit: int = 0):
        self.root, self.split, self.size_px = Path(root), split, size_px
        self.annotations = self.root / "annotations" / f"captions_{split}.json"
        folder = self.root / split
        if not self.annotations.is_file() or not folder.is_dir():
            missing = folder if self.annotations.is_file() else self.annotations
            raise SystemExit(
                f"error: no COCO captions: {missing} is missing. Either download the set (about 20 GB):\n"
                f"  python data/download_coco.py --out {self.root}\nor run the embedded world with --mini"
            )
        self.files, self.captions, self.image_ids, self._stamps = [], [], [], []
        self._fingerprint = None  # half a second at COCO's size
        self.skipped, self.examples, self._skipped_names = {}, [], set()
        try:
            content = json.loads(read_text(self.annotations))
            names, texts = {}, {}  # of each id; the names as a dict's keys, which keep their order
            for image in content["images"]:
                names.setdefault(id_of(image.get("id")), {})[image["file_name"]] = True
            for annotation in content["annotations"]:
                texts.setdefault(id_of(annotation.get("image_id")), []).append(annotation.get("caption"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SystemExit(
                f"error: {self.annotations} is not a COCO captions file ({type(error).__name__}: {str(error)[:100]}); "
                "download it again with data/download_coco.py"
            ) from None
        for image_id in sorted(names, key=lambda i: (0, i, "") if isinstance(i, int) else (1, 0, str(i))):
            captions = captions_of(texts.get(image_id))
            for name in names[image_id]:
                stamp = self._stamp(name)
                if image_id is None:
                    self.skip("no id", name)
                elif len(names[image_id]) > 1:
                    self.skip("repeated id", name)
                elif not stamp:
                    self.skip("missing file", name)
                elif not captions:
                    self.skip("no caption", name)
                else:
                    self.files.append(name)
                    self.captions.append(captions)
                    self.image_ids.append(image_id)
                    self._stamps.append(stamp)
            if limit and len(self.files) == limit:
                break
        if not self.files:
            found = self.left_out() or "none at all"
            raise SystemExit(f"error: {self.annotations} names no picture in {folder} that has a caption: {found}")

    def _stamp(self, name) -> tuple[int, int] | None:
        """A file's size and its modification time in nanoseconds; None where the split's folder has no such file."""
        if not isinstance(name, str):
            return None
        inner = PurePath(name)
        if inner.anchor or ".." in inner.parts:  # would leave the folder
            return None
        try:
            found = os.stat(os.path.join(self.root, self.split, name))
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return None
        return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None

    def path(self, i: int) -> Path:
        return self.root / self.split / self.files[i]

    def skip(self, reason: str, name: str):
        """Count a picture as left out: one that is not among `files`, or one of them that turned out to be broken."""
        self._skipped_names.add(name)
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if len(self.examples) < 5:
            shown = clean(str(name))[:100]
            self.examples.append(f"{shown} ({reason})")

    def left_out(self) -> str:
        """What was left out, in words, such as "3 missing file, 1 no caption, such as a.jpg (missing file)", or ""."""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
        return f"{counts}, such as {', '.join(self.examples)}" if counts else ""

    def describe(self, usable: int, purpose: str) -> str:
        left_out = self.left_out()
        return f"{usable:,} {purpose} pictures" + (f" (left out: {left_out})" if left_out else "")

    def require_share(self, max_broken: float):
        """Raises SystemExit where more than the share `max_broken` of the pictures had to be left out."""
        bad = sum(self.skipped.values())
        total = len(self._skipped_names.union(self.files))
        if bad > max_broken * total:
            raise SystemExit(f"error: {bad:,} of {total:,} pictures of {self.split} cannot be used: {self.left_out()}; "
                             "mend the set, or allow more with --max-broken")

    def fingerprint(self) -> str:
        """A short hash of all that changes a number: split, size_px and every picture's name, size, time and captions.

        The folder's own place is not in it. Pictures are known by size and modification time, as reading COCO's 19 GB at
        every start would take minutes. So a file that was replaced by one of the same size with its old time (`cp -p`,
        `rsync -t`, unpacked archives) goes unseen; `touch` it. A copy of the set without its times counts as another set.
        """
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=12)
            digest.update(json.dumps([self.split, self.size_px]).encode())
            for picture in zip(self.files, self._stamps, self.captions):
                digest.update(json.dumps(picture).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor | None:
        path = self.path(i)
        try:
            pixels = load_image(path, self.size_px)
        except Exception:  # Pillow's decoders raise errors of many kinds, struct.error and KeyError among them
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, size_px, size_px)


def images(dataset: CocoCaptions, batch: int, workers: int = 0, start: int = 0):
    """Yield ((n, 3, size, size) uint8, their indices, the index after the batch) in order from `start`; undecodable pictures
    are left out."""
    rest = torch.utils.data.Subset(dataset, range(start, len(dataset)))
    loader = torch.utils.data.DataLoader(rest, batch_size=batch, num_workers=workers, collate_fn=_stack)
    for count, good, stacked in loader:
        if good:
            yield stacked, [start + k for k in good], start + count
        start += count


def _stack(items: list) -> tuple:
    """How many, which of them could be decoded, and those as one tensor: a worker hands every tensor over through an open
    file, of which a process may have few. A module-level function, so that spawned workers can import it."""
    good = [k for k, image in enumerate(items) if image is not None]
    stacked = torch.stack([items[k] for k in good]) if good else None
    return len(items), good, stacked
