"""Training pairs of V-3 from WebDataset shards, streamed (from COCO or own pictures: `common.cache.TrainingPairs`).

A random one of a picture's captions is taken each time; validation (`common.metrics.Evaluator`) takes the first.
"""

import functools
import glob
import io
import itertools
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from common.cache import Batch, draw_noise, share_of
from common.files import fingerprint
from common.formats import captions_of
from common.images import load_image
from common.sampling import encode_captions, encode_images
from common.settings import require

# all that Pillow opens, the usual ones first: a sample may also hold, say, features in .h5, which Pillow claims to open
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", *sorted(name[1:] for name in Image.registered_extensions()))


def find_shards(pattern: str) -> list[str]:
    """The tar files of a folder or a glob pattern, sorted. Raises SystemExit where there is none."""
    place = Path(pattern)
    if place.is_dir():
        found = place.glob("*.tar")
    elif place.is_file():
        found = [place]
    elif place.parent.is_dir():  # so that only the last part is a pattern: a folder's name may hold [ and ]
        found = place.parent.glob(place.name)
    else:
        found = glob.glob(pattern)
    shards = sorted(map(str, found))
    require(shards, f"no .tar shards at {pattern}; make them with python v3/data.py")
    return shards


def samples(shards: list[str], on_error=wds.warn_and_continue):
    """The samples of tar files, in order: dicts from lower-case extension to bytes, with `__key__`."""
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


@functools.cache
def count_samples(shard: str) -> int:
    """How many a shard holds, whole or not: read once in a process."""
    return sum(1 for _ in samples([shard]))


def sample_captions(sample: dict) -> list[str]:
    """`captions`, or `caption`, of its .json; its .txt where the .json has neither key (a null there is no caption).

    Raises ValueError where the .json is broken.
    """
    found = json.loads(sample.get("json", b"{}"))
    if isinstance(found, dict) and not found.keys().isdisjoint({"captions", "caption"}):
        return captions_of(found.get("captions")) or captions_of(found.get("caption"))
    return captions_of(sample.get("txt", b"").decode("utf-8-sig", "replace"))


def decode_sample(sample: dict, size_px: int, rng: random.Random) -> tuple[torch.Tensor, str] | None:
    """((3, size_px, size_px) uint8, one of its captions), None where either is missing or broken."""
    content = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    try:
        captions = sample_captions(sample)
        if content is None or not captions:
            return None
        pixels = load_image(io.BytesIO(content), size_px)
    except Exception:  # Pillow's decoders raise errors of many kinds
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1), rng.choice(captions)


class ShardStream(torch.utils.data.IterableDataset):
    """Endless batches (pixels (B, 3, size, size) uint8, list of captions) of one process, from batch number `skip` on.

    Every shard goes to one worker of one process in each epoch; shards and then samples are shuffled by (seed, epoch).
    A broken sample's place is taken by a good one of its batch, and a batch without any by the next good batch: so the
    batches' numbers do not depend on what can be decoded, and those before `skip` are passed over undecoded.
    """

    def __init__(self, shards: list[str], size_px: int, batch: int, seed: int, rank: int, processes: int, skip: int = 0):
        self.shards, self.size_px, self.batch, self.seed, self.skip = shards, size_px, batch, seed, skip
        self.rank, self.processes = rank, processes

    def raw(self, worker: int, workers: int, skip: int = 0):
        """(epoch, sample) of one worker, for ever, from its sample number `skip` on; whole epochs before are not read."""
        for epoch in itertools.count():
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
            mine = [self.shards[i] for i in order[self.rank * workers + worker :: self.processes * workers]]
            count = sum(map(count_samples, mine)) if skip else 0
            if 0 < count <= skip:
                skip -= count
                continue
            shuffle = wds.shuffle(1000, rng=random.Random(f"{self.seed} {epoch} {self.rank} {worker}"))
            empty = True
            for sample in shuffle(samples(mine)):
                empty = False
                if skip:
                    skip -= 1
                else:
                    yield epoch, sample
            if empty:
                raise RuntimeError("none of these shards can be read: " + ", ".join(mine[:3]))

    def decoded(self, group: list) -> list[tuple[torch.Tensor, str]]:
        """(pixels (3, size, size), caption) of the samples of a batch that are whole."""
        good = []
        for epoch, sample in group:
            rng = random.Random(f"{self.seed} {epoch} {sample['__key__']}")
            pair = decode_sample(sample, self.size_px, rng)
            if pair is not None:
                good.append(pair)
        return good

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        # Batch b is worker b % workers' of the unbroken run. A DataLoader takes batches from its workers in turn and begins
        # with number 0, which therefore goes on with the shards of the worker that made batch `skip`.
        worker = (self.skip + number) % workers
        passed = len(range(worker, self.skip, workers))
        stream = self.raw(worker, workers, passed * self.batch)
        bad, waiting = 0, 1  # samples in a row that are broken; batches that the next good one stands for
        while bad < 1000:
            group = list(itertools.islice(stream, self.batch))
            good = self.decoded(group)
            if not good:
                bad += len(group)
                waiting += 1
                continue
            whole = (good * self.batch)[: self.batch]
            pixels, captions = zip(*whole)
            for _ in range(waiting):
                yield torch.stack(pixels), list(captions)  # (B, 3, size, size)
            bad, waiting = 0, 1
        raise RuntimeError(f"none of {bad:,} samples in a row has a picture that can be decoded and a caption")


def leave_ctrl_c(_):
    """Ctrl-C reaches the workers too, which must live until the main process has saved. Forked ones inherit its answer to it,
    spawned ones do not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ShardPairs:
    """The same as `TrainingPairs` from tar shards: `draw` must be called for every part of every step, in order.

    `batch_size` is the global one, of which every one of Accelerate's processes draws an equal share.
    Raises SystemExit where there are too few shards, and in `draw` where none of them has a usable sample.
    """

    def __init__(self, pattern: str, teacher, accelerator, *, size_px: int, batch_size: int, seed: int, workers: int,
                 flip: bool = False):
        self.shards = find_shards(pattern)
        self.device, self.rank, self.processes = accelerator.device, accelerator.process_index, accelerator.num_processes
        require(len(self.shards) >= self.processes * max(1, workers),
                f"{len(self.shards)} shards are too few for {self.processes} processes with {workers} workers")
        self.teacher, self.size_px, self.flip = teacher, size_px, flip
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.empty = encode_captions(teacher.text_encoder, teacher.tokenizer, [""]).float()
        self.stream = None

    def describe(self) -> str:
        return f"{len(self.shards):,} shards of training pictures"

    def fingerprint(self) -> str:
        """Of the shards' names, sizes and times and of how many processes and workers share them: a resumed run must find the
        same."""
        stamps = [(Path(shard).name, os.stat(shard).st_size, os.stat(shard).st_mtime_ns) for shard in self.shards]
        return fingerprint(stamps, self.processes, self.workers)

    @torch.no_grad()
    def draw(self, step: int, dropout: float, *, part: int = 0, parts: int = 1) -> Batch:
        """Part `part` of `parts` of this process's share of step `step`'s batch; noise and timesteps depend on
        (seed, step) alone. Captions are dropped at rate `dropout`."""
        share = self.batch_size // self.processes // parts
        if self.stream is None:
            self.stream = self._open(share, step * parts + part)
        try:
            pixels, captions = next(self.stream)  # (share, 3, size_px, size_px) uint8
        except RuntimeError as error:  # a worker's comes with its traceback
            reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise SystemExit(f"error: --shards: {reason}; look at them with python v3/data.py --check") from None
        mine = share_of(self.batch_size, self.rank * parts + part, self.processes * parts)
        rng = np.random.default_rng([self.seed, 1, step])  # draws for the global batch, of which this part is `mine`
        dropped = (rng.random(self.batch_size) < dropout)[mine]
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped)]
        if self.flip:
            mirrored = torch.from_numpy(rng.random(self.batch_size) < 0.5)[mine]
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        latents = encode_images(self.teacher.vae, pixels).float()  # (share, 4, h, w)
        encoder_hidden_states = encode_captions(self.teacher.text_encoder, self.teacher.tokenizer, captions).float()
        shape = (self.batch_size, *latents.shape[1:])
        noise, timesteps = draw_noise(rng, shape, None, mine, self.teacher.noise_scheduler, self.device)
        return Batch(latents, encoder_hidden_states, noise, timesteps, dropout=dropout)

    def _open(self, share: int, skip: int):
        """Batches of `share` pictures from number `skip` on."""
        stream = ShardStream(self.shards, self.size_px, share, self.seed, self.rank, self.processes, skip)
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=self.workers, worker_init_fn=leave_ctrl_c)
        return iter(loader)
