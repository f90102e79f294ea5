"""Download COCO 2017 (train, val, captions; about 20 GB) with resume, size and checksum checks, and unpack it safely.

    python data/download_coco.py                # into data/coco2017

An interrupted download goes on where it stopped. Sizes and MD5 sums are checked.
"""

import argparse
import calendar
import contextlib
import hashlib
import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

BASE = "http://images.cocodataset.org"
ARCHIVES = {  # path: MD5
    "annotations/annotations_trainval2017.zip": "f4bbac642086de4f52a3fdda2de5fa2c",
    "zips/val2017.zip": "442b8da7639aecaf257c1dceb8ba8c80",
    "zips/train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2",
}


def download(url: str, path: Path) -> Path:
    """Fetch `url` to `path` through `path.part`, resuming it. Raises SystemExit with one line on failure."""
    if path.is_file():
        return path
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if have and answer.status != 206:  # the server does not resume
                have = 0
            total = have + int(answer.headers.get("Content-Length", 0))
            free = shutil.disk_usage(path.parent).free
            if total - have > free:
                raise SystemExit(f"error: {path.name} needs {(total - have) / 1e9:.1f} GB more, {path.parent} has "
                                 f"{free / 1e9:.1f} GB free; make room or choose another --out")
            with open(part, "ab" if have else "wb") as file, tqdm(
                    total=total, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is whole already
            raise SystemExit(f"error: {url}: {error}") from None
        total = have
    except (OSError, http.client.HTTPException) as error:  # the second: cut off in a chunk, or no HTTP at all
        raise SystemExit(f"error: {url}: {error!r}; run again to go on") from None
    if total and part.stat().st_size != total:
        raise SystemExit(f"error: {path.name} was cut off at {part.stat().st_size:,} of {total:,} bytes; run again to go on")
    try:
        part.replace(path)
    except OSError as error:  # on Windows a virus scanner reads it at first
        raise SystemExit(f"error: {path.name}: {error}; run again to go on") from None
    return path


def check_md5(path: Path, expected: str):
    """Raises SystemExit, and removes the file, where its MD5 differs."""
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        path.unlink()
        raise SystemExit(f"error: {path.name} is damaged (MD5 {digest.hexdigest()}, not {expected}); it was removed, run again")


def unpack(path: Path, out: Path):
    """Extract a zip; refuses entries that would land outside `out`, and links. Raises SystemExit."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                target = (out / entry.filename).resolve()
                if not target.is_relative_to(out.resolve()) or (entry.external_attr >> 28) == 0xA:
                    raise SystemExit(f"error: {path.name} holds an entry that leaves its folder: {entry.filename}")
            for entry in tqdm(archive.infolist(), desc=f"unpacking {path.name}", unit="file"):
                target = out / entry.filename
                if not entry.is_dir() and target.is_file() and target.stat().st_size == entry.file_size:
                    continue
                archive.extract(entry, out)
                stamped = calendar.timegm((*entry.date_time, 0, 0, 0))  # not now: a run goes on where the set is unpacked again
                with contextlib.suppress(OSError):  # of a share that keeps its own times
                    os.utime(target, (stamped, stamped))
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise SystemExit(f"error: {path.name} cannot be unpacked: {error}") from None


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "coco2017", help="the folder to fill")
    parser.add_argument("--base", default=BASE, help="the server")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete the zips after unpacking")
    args = parser.parse_args(argv)
    if not args.base.startswith(("http://", "https://")):
        raise SystemExit("error: --base must begin with http:// or https://")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --out {args.out} cannot be made ({error.strerror}); choose another folder") from None
    for name, md5 in ARCHIVES.items():
        done = args.out / f".{Path(name).stem}.done"
        if done.is_file():
            continue
        path = download(f"{args.base}/{name}", args.out / Path(name).name)
        check_md5(path, md5)
        unpack(path, args.out)
        done.touch()
        if not args.keep_archives:
            path.unlink()
    print(f"COCO 2017 lies in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; run again to go on")
