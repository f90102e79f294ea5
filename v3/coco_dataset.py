"""Training pairs of V-3: COCO captions through the cache (`common.cache.TrainingPairs`), or WebDataset shards, streamed.

A random one of a picture's captions is taken each time; validation (`common.metrics.Evaluator`) takes the first.
"""

import glob
import io
import itertools
import json
import random
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from common.cache import Batch, draw_noise
from common.coco import load_image
from common.sampling import encode_captions, encode_pictures

PICTURES = ("jpg", "jpeg", "png", "webp")


def find_shards(pattern: str) -> list[str]:
    """The tar files of a folder or a glob pattern, sorted. Raises SystemExit where there is none."""
    found = sorted(glob.glob(str(Path(pattern) / "*.tar") if Path(pattern).is_dir() else pattern))
    if not found:
        raise SystemExit(f"error: no .tar shards at {pattern}; make them with python v3/data.py")
    return found


def samples(shards: list[str], on_error=wds.warn_and_continue):
    """The samples of tar files, in order: dicts from extension to bytes, with `__key__`."""
    def opened():  # not by webdataset, which takes the drive letter of a Windows path for a protocol
        for shard in shards:
            try:
                with open(shard, "rb") as stream:
                    yield {"url": shard, "stream": stream}
            except OSError as error:
                if not on_error(error):
                    return

    files = wds.tariterators.tar_file_expander(opened(), handler=on_error)
    return wds.tariterators.group_by_keys(files, handler=on_error)


def captions_of(sample: dict) -> list[str]:
    """`captions` (or `caption`) of its .json, else its .txt; without the empty ones."""
    if "json" in sample:
        found = json.loads(sample["json"])
        if isinstance(found, dict) and (found.get("captions") or found.get("caption")):
            texts = found.get("captions") or found["caption"]
            texts = texts if isinstance(texts, list) else [texts]
            return [" ".join(str(t).split()) for t in texts if str(t).strip()]
    text = " ".join(sample.get("txt", b"").decode("utf-8", "replace").split())
    return [text] if text else []


def decode_sample(sample: dict, size_px: int, rng: random.Random) -> tuple[torch.Tensor, str] | None:
    """((3, size_px, size_px) uint8, one of its captions), None where either is missing or broken."""
    try:
        picture = next(sample[extension] for extension in PICTURES if extension in sample)
        captions = captions_of(sample)
        pixels = torch.from_numpy(load_image(io.BytesIO(picture), size_px)).permute(2, 0, 1)
        return pixels, rng.choice(captions)
    except (StopIteration, IndexError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


class ShardStream(torch.utils.data.IterableDataset):
    """Endless batches (pixels (B, 3, size, size) uint8, list of captions) of one process.

    Every shard goes to one worker of one process in each epoch; shards and then samples are shuffled by (seed, epoch).
    A broken sample's place is taken by a good one of its batch, so that `skip` batches can be passed over unread.
    """

    def __init__(self, shards: list[str], size_px: int, batch: int, seed: int, rank: int, processes: int, skip: int = 0):
        self.shards, self.size_px, self.batch, self.seed, self.skip = shards, size_px, batch, seed, skip
        self.rank, self.processes = rank, processes

    def raw(self, worker: int, workers: int):
        """(epoch, sample) of one worker, for ever."""
        for epoch in itertools.count():
            order = [self.shards[i] for i in np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))]
            mine = order[self.rank * workers + worker :: self.processes * workers]
            shuffle = wds.shuffle(1000, rng=random.Random(f"{self.seed} {epoch} {self.rank} {worker}"))
            empty = True
            for sample in shuffle(samples(mine)):
                empty = False
                yield epoch, sample
            if empty:
                raise RuntimeError("none of these shards can be read: " + ", ".join(mine[:3]))

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # a DataLoader takes batches from its workers in turn
        skip = len(range(worker, self.skip, workers)) * self.batch
        stream, bad = itertools.islice(self.raw(worker, workers), skip, None), 0
        while bad < 1000:
            group = list(itertools.islice(stream, self.batch))
            good = [decode_sample(x, self.size_px, random.Random(f"{self.seed} {e} {x['__key__']}")) for e, x in group]
            good = [g for g in good if g is not None]
            bad = 0 if good else bad + len(group)
            if good:
                good = (good * self.batch)[: self.batch]
                yield torch.stack([pixels for pixels, _ in good]), [caption for _, caption in good]
        raise RuntimeError(f"none of {bad:,} samples in a row has a picture that can be decoded and a caption")


class ShardPairs:
    """The same as `TrainingPairs` from tar shards: `draw` must be called for every share of every step, in order."""

    def __init__(self, pattern: str, teacher, *, size_px: int, seed: int, rank: int, processes: int, workers: int, device,
                 flip: bool = False):
        self.shards = find_shards(pattern)
        if len(self.shards) < processes * max(1, workers):
            raise SystemExit(f"error: {len(self.shards)} shards are too few for {processes} processes with {workers} workers")
        self.teacher, self.size_px, self.seed, self.device, self.flip = teacher, size_px, seed, device, flip
        self.rank, self.processes, self.workers = rank, processes, workers
        self.empty = encode_captions(teacher.text_encoder, teacher.tokenizer, [""]).float()
        self.stream = None

    def draw(self, step: int, batch_size: int, dropout: float, seed: int, *, part: int = 0, parts: int = 1) -> Batch:
        share = batch_size // parts
        if self.stream is None:
            stream = ShardStream(self.shards, self.size_px, share, self.seed, self.rank, self.processes,
                                 skip=step * parts // self.processes)
            self.stream = iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=self.workers))
        try:
            pixels, captions = next(self.stream)
        except RuntimeError as error:  # a worker's comes with its traceback
            reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise SystemExit(f"error: --shards: {reason}; look at them with python v3/data.py --check") from None
        rng = np.random.default_rng([seed, 1, step])
        mine = slice(share * part, share * (part + 1))
        captions = ["" if drop else c for c, drop in zip(captions, (rng.random(batch_size) < dropout)[mine])]
        if self.flip:
            mirrored = torch.from_numpy(rng.random(batch_size) < 0.5)[mine]
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        with torch.no_grad():
            latents = encode_pictures(self.teacher.vae, pixels).float()
            hidden = encode_captions(self.teacher.text_encoder, self.teacher.tokenizer, captions).float()
        chain = torch.arange(self.teacher.noise_scheduler.config.num_train_timesteps)
        return Batch(latents, hidden, *draw_noise(rng, (batch_size, *latents.shape[1:]), chain, mine, self.device))
