"""A set of captioned pictures from a folder of any format that `common.formats` knows."""

import hashlib
import json
import os
import stat
from pathlib import Path, PurePath

import torch

from common.formats import COCO, captions_of, clean, find_format, read_pictures
from common.images import load_image
from common.settings import require


class CocoCaptions(torch.utils.data.Dataset):
    """The pictures of one split that exist and have a caption, sorted by id: whole numbers first, then the others' text.

    Item i is a (3, size_px, size_px) uint8 tensor, or None where the file cannot be decoded. `files[i]` is its name within
    the split's folder, `captions[i]` are its captions; `skipped` counts what was left out, by reason, and `examples` names
    the first five. Where one id stands for several files, none is used, as nobody knows whose its captions are.
    Where the format has no splits, a picture's id is its name, and a `part` of all pictures is taken in place of `split`.
    For a training that takes `reach` pictures, twice as many are enough, and 1,000 at least, spread over the whole set: so a
    trial of few steps waits for no more to be cached. Raises SystemExit with one line where the folder or its captions cannot
    be used.
    """

    def __init__(self, root: str | Path, split: str, size_px: int, limit: int = 0, part: tuple[float, float] = (0, 1),
                 reach: int = 0):
        self.root, self.size_px = Path(root), size_px
        self.format = find_format(self.root)
        self.split = split if self.format == COCO else ""
        self.files, self.captions, self.image_ids, self._stamps = [], [], [], []
        self._fingerprint = None  # half a second at COCO's size
        self.skipped, self.examples, self._skipped_names = {}, [], set()
        pictures, self.every = read_pictures(self.root, self.format, split, part), 1
        if reach:
            pictures = list(pictures)
            self.every = max(1, len(pictures) // max(2 * reach, 1000))
            pictures = pictures[:: self.every]
        for image_id, names, written in pictures:
            captions = captions_of(written)
            for name in names:
                stamp = self._stamp(name)
                if image_id is None:
                    self.skip("no id", name)
                elif len(names) > 1:
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
        whole = self.format == COCO or part == (0, 1)
        needed, side = (1, "") if whole else (2, f" in the {part[1] - part[0]:.0%} of this side (change it with --val-share)")
        require(len(self.files) >= needed, f"{self.root / self.split} has {len(self.files)} usable pictures{side} (captions in "
                                           f"{self.format}) and needs {needed}; left out: {self.left_out() or 'none'}")

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
        thinned = f", one in {self.every:,} of the set: these steps need no more" if self.every > 1 else ""
        return f"{usable:,} {purpose} pictures{thinned}" + (f" (left out: {left_out})" if left_out else "")

    def require_share(self, max_broken: float):
        """Raises SystemExit where more than the share `max_broken` of the pictures had to be left out."""
        bad = sum(self.skipped.values())
        total = len(self._skipped_names.union(self.files))
        if bad > max_broken * total:
            raise SystemExit(f"error: {bad:,} of {total:,} pictures of {self.split or self.root} cannot be used: "
                             f"{self.left_out()}; mend the set, or allow more with --max-broken")

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
    are left out. `batch` is at most that of 6 MB, as workers hand over several in a container's 64 MB of shared memory."""
    batch = max(1, min(batch, 2**21 // dataset.size_px**2))
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
