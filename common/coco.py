"""COCO captions from any folder in COCO's format: `<root>/<split>/*.jpg` and `<root>/annotations/captions_<split>.json`."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps


def load_image(path: Path, size_px: int) -> np.ndarray:
    """(size_px, size_px, 3) uint8: EXIF rotation applied, RGB, shorter side resized to `size_px`, centre cropped.

    Raises OSError (or another of Pillow's errors) where the file cannot be decoded whole.
    """
    with Image.open(path) as image:
        image.draft(None, (size_px, size_px))  # JPEGs: the decoder's own down-scaling, to no less than what is wanted
        image = ImageOps.exif_transpose(image).convert("RGB")
    if image.size != (size_px, size_px):
        image = ImageOps.fit(image, (size_px, size_px), Image.Resampling.BICUBIC)
    return np.array(image)


class CocoCaptions(torch.utils.data.Dataset):
    """The pictures of one split that exist and have a caption.

    Item i is a (3, size_px, size_px) uint8 tensor, or None where the file cannot be decoded. `captions[i]` are its
    captions; `skipped` counts what was left out, by reason, and `examples` names the first few.
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
        present = {entry.name for entry in folder.iterdir()}
        self.files, self.captions, self.image_ids = [], [], []
        self.skipped, self.examples = {"missing file": 0, "no caption": 0}, []
        try:
            from pycocotools.coco import COCO

            coco = COCO()  # which would open the file in the system's encoding
            coco.dataset = json.loads(self.annotations.read_text("utf-8"))
            assert isinstance(coco.dataset, dict), "no object"
            with contextlib.redirect_stdout(io.StringIO()):  # it says what it does
                coco.createIndex()
            for image in sorted(coco.dataset["images"], key=lambda image: image["id"]):
                texts = [" ".join(str(a.get("caption", "")).split()) for a in coco.imgToAnns.get(image["id"], [])]
                texts = [t for t in texts if t]
                if image["file_name"] not in present:
                    self.skip("missing file", image["file_name"])
                elif not texts:
                    self.skip("no caption", image["file_name"])
                else:
                    self.files.append(image["file_name"])
                    self.captions.append(texts)
                    self.image_ids.append(image["id"])
                    if limit and len(self.files) == limit:
                        break
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            raise SystemExit(
                f"error: {self.annotations} is not a COCO captions file ({type(error).__name__}: {str(error)[:100]}); "
                "download it again with data/download_coco.py"
            ) from None
        if not self.files:
            raise SystemExit(f"error: {self.annotations} names no picture in {folder} that has a caption")

    def skip(self, why: str, name: str):
        self.skipped[why] = self.skipped.get(why, 0) + 1
        if len(self.examples) < 5:
            self.examples.append(f"{name} ({why})")

    def check_share(self, most: float):
        """Raises SystemExit where more than the share `most` of the pictures had to be left out."""
        bad = sum(self.skipped.values())
        if bad > most * (len(self.files) + bad):
            raise SystemExit(f"error: {bad:,} of {len(self.files) + bad:,} pictures cannot be used, such as "
                             f"{', '.join(self.examples)}; mend the set, or allow more with --max-broken")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor | None:
        try:
            return torch.from_numpy(load_image(self.root / self.split / self.files[i], self.size_px)).permute(2, 0, 1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on broken files
            return None


def pictures(dataset: CocoCaptions, batch: int, workers: int = 0, start: int = 0):
    """Yield ((n, 3, size, size) uint8, their indices) in order from `start`; undecodable pictures are left out."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(dataset, range(start, len(dataset))), batch_size=batch, num_workers=workers,
        collate_fn=_stack)
    for count, good, stacked in loader:
        if good:
            yield stacked, [start + k for k in good]
        start += count


def _stack(items: list) -> tuple:
    """How many, which of them could be decoded, and those as one tensor: a worker hands every tensor over through an open
    file, of which a process may have few. A module-level function, so that spawned workers can import it."""
    good = [k for k, x in enumerate(items) if x is not None]
    return len(items), good, torch.stack([items[k] for k in good]) if good else None
