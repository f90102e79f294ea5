"""Prepare training data as WebDataset shards, or check shards.

    python v3/data.py --data data/coco2017 --split train2017 --out data/shards   # a COCO folder, or own pictures
    python v3/data.py --urls laion.parquet --out data/shards                     # URLs and captions, through img2dataset
    python v3/data.py --check data/shards                                        # verify, count what is broken

Stopped at any point, the same command goes on: a shard that stands under its name is whole; of --urls, one with a _stats.json.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import random

import webdataset as wds
from coco_dataset import IMAGE_EXTENSIONS, decode_sample, find_shards, sample_captions, samples
from tqdm import tqdm

from common.coco import CocoCaptions
from common.files import fingerprint, from_root, full_disk_is_one_line, make_folder, put_in_place, read_text, write_atomically
from common.settings import parse, require, start


@dataclass
class Settings:
    data: str = ""  # a folder to put into shards: in COCO's format, or own pictures with .txt, metadata.jsonl or .csv captions
    split: str = "train2017"  # its split
    val_share: float = 0.05  # share of own pictures, which have no splits, that is left out; train with the same one
    urls: str = ""  # a .parquet or .csv list of URLs and captions to download
    url_column: str = "URL"  # its columns
    caption_column: str = "TEXT"
    out: str = "data/shards"  # the folder of the shards
    check: str = ""  # a folder or pattern of shards to verify
    shard_size: int = 1_000  # samples a shard
    size_px: int = 512  # shorter side of downloaded pictures
    processes: int = 4  # of a download
    threads: int = 32  # of each of them


def write_shards(s: Settings):
    """One sample a picture: its file as it is, and its captions and id in a .json."""
    dataset, out = CocoCaptions(from_root(s.data), s.split, size_px=64, part=(s.val_share, 1)), Path(s.out)
    print(f"data: {dataset.root}, captions in {dataset.format}")
    make_folder(out, "--out")
    content = json.dumps({"set": dataset.fingerprint(), "samples": len(dataset), "shard_size": s.shard_size})
    note = out / "shards.json"
    known = read_text(note) if note.is_file() else None
    require(known in (None, content), f"{out} holds shards of another set, of this one before it changed, or of another "
                                      "size; choose another --out")
    require(known or not any(out.glob("*.tar")),
            f"{out} holds shards that are not known to be of this set; choose another --out")
    starts = range(0, len(dataset), s.shard_size)
    written = 0
    for left in out.glob("*.partial-*"):  # by a run that was killed
        left.unlink(missing_ok=True)
    try:
        with full_disk_is_one_line(out, "whole shards are kept"):
            write_atomically(note, content.encode())
            for number, start in enumerate(tqdm(starts, desc="shards", unit="shard")):
                path = out / f"{number:05d}.tar"
                part = range(start, min(start + s.shard_size, len(dataset)))
                if not path.is_file():
                    write_shard(dataset, part, path)
                written += len(part)
    except OSError as error:
        raise SystemExit(f"error: {out} cannot be written ({error.strerror}); choose another --out, or mend it and run the "
                         "same command again: whole shards are kept") from None
    left_out = dataset.left_out()
    unread = dataset.skipped.get("cannot be read", 0)
    print(f"{written - unread:,} samples in {len(starts)} shards in {out}" + (f" (left out: {left_out})" if left_out else ""))


def write_shard(dataset: CocoCaptions, part: range, path: Path):
    """The pictures `part` of the set as one tar file, which stands under its name only when it is whole."""
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        with open(partial, "wb") as shard, wds.TarWriter(shard, encoder=False) as tar:
            for i in part:
                try:
                    image = dataset.path(i).read_bytes()
                except OSError:  # no permission, say, or gone since the set was opened
                    dataset.skip("cannot be read", dataset.files[i])
                    continue
                sample = {"image_id": dataset.image_ids[i], "captions": dataset.captions[i]}
                tar.write({"__key__": key_of(dataset.image_ids[i], i), image_extension(dataset.files[i]): image,
                           "json": json.dumps(sample).encode()})
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def key_of(image_id: int | float | str, i: int) -> str:
    """A sample's name in its shard: its id where that is a whole number as COCO's are, otherwise its place in the set.

    An id in text could hold dots and slashes, which mean something there, or be too long for a tar file.
    """
    usual = isinstance(image_id, int) and 0 <= image_id < 10**12
    return f"{image_id:012d}" if usual else f"n{i:011d}"


def image_extension(name: str) -> str:
    """A picture's extension in its shard. Readers find pictures by it, but decode them by their content."""
    extension = Path(name).suffix[1:].lower()
    return extension if extension in IMAGE_EXTENSIONS else "jpg"


def download_urls(s: Settings):
    kind = Path(s.urls).suffix[1:]
    require(Path(s.urls).is_file(), f"{s.urls} is missing")
    require(kind in ("parquet", "csv"), "--urls must be a .parquet or .csv")
    try:
        from img2dataset import download
    except ImportError:
        raise SystemExit("error: a list of URLs needs img2dataset: pip install img2dataset") from None
    out = make_folder(Path(s.out), "--out")
    # img2dataset goes on by shard numbers alone, whatever the list, and takes every .json for its own
    note, listed = out / "urls.txt", os.stat(s.urls)
    content = fingerprint(listed.st_size, listed.st_mtime_ns, s.url_column, s.caption_column, s.shard_size, s.size_px)
    known = read_text(note) if note.is_file() else None
    require(known == content if known else not any(out.glob("*.tar")),
            f"{out} holds shards of another list or set, of this one before it changed, or of another size; choose another "
            "--out")
    write_atomically(note, content.encode())
    download(url_list=s.urls, input_format=kind, url_col=s.url_column, caption_col=s.caption_column, output_folder=s.out,
             output_format="webdataset", image_size=s.size_px, resize_mode="keep_ratio", resize_only_if_bigger=True,
             number_sample_per_shard=s.shard_size, processes_count=s.processes, thread_count=s.threads,
             incremental_mode="incremental", enable_wandb=False)


def check_shards(pattern: str) -> int:
    """Read every sample of every shard; print what is broken and return how many that are."""
    counts, broken = Counter(), []
    for shard in tqdm(find_shards(pattern), desc="checking", unit="shard"):
        def failed(error, shard=shard):
            broken.append(f"{shard}: {error}")
            counts["broken shards"] += 1
            return False  # end of this shard

        for sample in samples([shard], on_error=failed):
            counts["samples"] += 1
            if decode_sample(sample, 64, random.Random(0)) is None:
                try:
                    why = "broken pictures" if sample_captions(sample) else "without a caption"
                except (ValueError, RecursionError):
                    why = "broken .json"
                counts[why] += 1
                broken.append(f"{shard}: {sample['__key__']}")
    print(", ".join(f"{n:,} {what}" for what, n in counts.items()) or "no samples")
    for line in broken[:5]:
        print(f"  {line}")
    return len(broken)


def main(s: Settings):
    given = [option for option in (s.data, s.urls, s.check) if option]
    require(len(given) == 1, "give one of --data, --urls and --check")
    if s.check:
        raise SystemExit(1 if check_shards(s.check) else 0)
    write_shards(s) if s.data else download_urls(s)


if __name__ == "__main__":
    start(main, parse(Settings, __doc__))
