"""Prepare training data as WebDataset shards, or check shards.

    python v3/data.py --coco data/coco2017 --split train2017 --out data/shards   # a COCO folder
    python v3/data.py --urls laion.parquet --out data/shards                     # URLs and captions, through img2dataset
    python v3/data.py --check data/shards                                        # verify, count what is broken

Stopped at any point, the same command goes on: a shard that stands under its name is whole.
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
from coco_dataset import captions_of, decode_sample, find_shards, samples
from tqdm import tqdm

from common.cache import write_atomically
from common.coco import CocoCaptions
from common.settings import check, parse


@dataclass
class Settings:
    coco: str = ""  # a COCO folder to put into shards
    split: str = "train2017"  # its split
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
    """One sample a picture: its file as it is, and its captions in a .json."""
    dataset, out = CocoCaptions(s.coco, s.split, size_px=64), Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    content = {"set": str(dataset.annotations.resolve()), "samples": len(dataset), "shard_size": s.shard_size}
    note = out / "shards.json"
    if note.is_file() and json.loads(note.read_text("utf-8")) != content:
        raise SystemExit(f"error: {out} holds shards of another set or size; choose another --out")
    check({f"{out} holds shards that are not known to be of this set; choose another --out":
           note.is_file() or not any(out.glob("*.tar"))})
    write_atomically(note, json.dumps(content).encode())
    starts = range(0, len(dataset), s.shard_size)
    for number, start in enumerate(tqdm(starts, desc="shards", unit="shard")):
        path = out / f"{number:05d}.tar"
        if path.is_file():
            continue
        partial = path.with_suffix(f".partial-{os.getpid()}")
        try:
            with open(partial, "wb") as shard, wds.TarWriter(shard) as tar:
                for i in range(start, min(start + s.shard_size, len(dataset))):
                    file = dataset.root / dataset.split / dataset.files[i]
                    extension = file.suffix[1:].lower()
                    tar.write({"__key__": f"{dataset.image_ids[i]:012d}", extension: file.read_bytes(),
                               "json": json.dumps({"captions": dataset.captions[i]}).encode()})
            os.replace(partial, path)
        except OSError as error:
            raise SystemExit(f"error: {path} could not be written ({error.strerror}); make space and run the same command "
                             "again, whole shards are kept") from None
        finally:
            partial.unlink(missing_ok=True)
    left_out = ", ".join(f"{n} {why}" for why, n in dataset.skipped.items() if n)
    print(f"{len(dataset):,} samples in {len(starts)} shards in {out}" + (f" (left out: {left_out})" if left_out else ""))


def download_urls(s: Settings):
    kind = Path(s.urls).suffix[1:]
    check({f"{s.urls} is missing": Path(s.urls).is_file(), "--urls must be a .parquet or .csv": kind in ("parquet", "csv")})
    try:
        from img2dataset import download
    except ImportError:
        raise SystemExit("error: a list of URLs needs img2dataset: pip install img2dataset") from None
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
                    why = "broken pictures" if captions_of(sample) else "without a caption"
                except ValueError:
                    why = "broken .json"
                counts[why] += 1
                broken.append(f"{shard}: {sample['__key__']}")
    print(", ".join(f"{n:,} {what}" for what, n in counts.items()) or "no samples")
    for line in broken[:5]:
        print(f"  {line}")
    return len(broken)


def main(s: Settings):
    check({"give one of --coco, --urls and --check": sum(map(bool, (s.coco, s.urls, s.check))) == 1,
           "--shard-size must be at least 1": s.shard_size >= 1})
    if s.check:
        raise SystemExit(1 if check_shards(s.check) else 0)
    write_shards(s) if s.coco else download_urls(s)


if __name__ == "__main__":
    main(parse(Settings, __doc__))
