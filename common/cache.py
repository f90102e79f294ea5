"""Latents, caption embeddings and teacher predictions of a data set, computed once and kept: the frozen parts are paid once.

    python -m common.cache data/cache       # read every cached file whole and remove what is damaged
"""

import argparse
import functools
import json
import math
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from common.coco import CocoCaptions, images
from common.files import fingerprint, full_disk_is_one_line, read_kept, read_tensors, reserve, write_atomically
from common.precision import autocast, kept_dtype
from common.sampling import encode_captions, encode_images, images_at_once, upload
from common.settings import require

# Raise it with every change of the code that changes what is computed from the same inputs, and make the embedded teacher's
# shipped images anew (checkpoints/mini-teacher/README.md).
FORMAT = 2

KEEP_EVERY_S = 60  # between notes of how far an array is: what a kill costs

DEPENDS_ON = {  # the teacher's parts that each kind of cached thing is computed with
    "pairs": ("vae", "text_encoder", "tokenizer"),
    "store": ("vae", "text_encoder", "tokenizer", "noise_scheduler", "unet"),
    "teacher images": ("vae", "text_encoder", "tokenizer", "noise_scheduler", "unet"),
    "trajectories": ("text_encoder", "tokenizer", "noise_scheduler", "unet"),
    "teacher scores": ("vae",),
    "fitness": ("vae", "text_encoder", "tokenizer", "noise_scheduler", "unet"),
    "image features": (),
    "reconstruction features": ("vae",),
}


def cache_key(kind: str, teacher, *others) -> str:
    """A hash of all that a cached thing of this `kind` depends on: the code's FORMAT, the weights and configs of the
    teacher's parts that make it, and `others` (of a data set its `fingerprint()`, a network, options)."""
    parts = DEPENDS_ON[kind]
    return fingerprint(FORMAT, kind, teacher.fingerprint(*parts) if parts else "", *others)


# --- arrays on disk -------------------------------------------------------------------------------------------------


def cached_array(folder: Path, name: str, shape: tuple, produce, unit: str, dtype=np.float16,
                 limit: str = "") -> tuple[np.ndarray, dict]:
    """The array `<folder>/<name>.npy` of `shape`, memory-mapped, and how it was made: `bad` rows, `seconds`.

    `produce(start)` yields (indices, end, values) from row `start`; how far it got is written after the data is on
    disk, so a killed run goes on there. Of two runs that start at once the second waits. Every start checks shape and size;
    the checksum that is taken when a file is whole is for `damaged`. Raises SystemExit where the disk is full, with the option
    that is the array's `limit`.
    """
    path, record = folder / f"{name}.npy", folder / f"{name}.json"
    wanted = f"{name} takes {math.prod(shape) * np.dtype(dtype).itemsize / 1e9:.2g} GB" + (f" ({limit})" if limit else "")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"), full_disk_is_one_line(folder, f"what is cached is kept; {wanted}"):
        state = {"rows": 0, "bad": [], "seconds": 0.0}
        if fits(path, shape, dtype):
            state = read_kept(record) or state
        if state["rows"] < shape[0]:
            fill(path, record, state, shape, produce, unit, dtype)
    return np.load(path, mmap_mode="r"), state


def fill(path: Path, record: Path, state: dict, shape: tuple, produce, unit: str, dtype):
    """Compute the rows from `state["rows"]` on, and update `state`, on disk too."""
    if not state["rows"]:  # of an earlier array: a kill now must not leave it beside rows that were never computed
        record.unlink(missing_ok=True)
    array = np.lib.format.open_memmap(path, mode="r+" if state["rows"] else "w+", dtype=dtype, shape=shape)
    if not state["rows"]:
        try:
            reserve(path)
        except OSError:  # the file holds all that was left, and with another limit its name would be another
            del array
            path.unlink()
            raise
    began = time.perf_counter() - state["seconds"]

    def keep():
        array.flush()
        state["seconds"] = time.perf_counter() - began
        write_atomically(record, json.dumps(state).encode())

    with tqdm(total=shape[0], initial=state["rows"], desc=f"caching {path.stem}", unit=unit) as bar:
        try:
            for indices, end, values in produce(state["rows"]):
                array[indices] = values
                start = state["rows"]
                state["bad"] += sorted(set(range(start, end)) - set(indices))
                state["rows"] = end
                bar.update(end - start)
                if time.perf_counter() - began - state["seconds"] > KEEP_EVERY_S and end < shape[0]:
                    keep()
        except KeyboardInterrupt:
            keep()
            raise
    state["bad"] += range(state["rows"], shape[0])  # the last batches held nothing that can be decoded
    array.flush()
    state["rows"], state["crc32"] = shape[0], checksum(path)
    keep()


def fits(path: Path, shape: tuple, dtype) -> bool:
    """Whether the .npy file has this shape and all of its bytes."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError):
        return False
    return array.shape == shape and array.dtype == dtype


def checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def damaged(folder: Path) -> list[Path]:
    """The finished arrays below `folder` that are not what their checksum says, and pictures that cannot be read."""
    found = [path for path in sorted(folder.rglob("*.safetensors")) if read_tensors(path) is None]
    for record in sorted(folder.rglob("*.json")):
        path, state = record.with_suffix(".npy"), read_kept(record) or {}
        if "crc32" in state and path.is_file() and checksum(path) != state["crc32"]:
            found.append(path)
    return found


# --- training data --------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    latents: torch.Tensor  # (B, 4, h, w) scaled
    encoder_hidden_states: torch.Tensor  # (B, tokens, width) the text encoder's states of the captions
    noise: torch.Tensor  # (B, 4, h, w) standard normal
    timesteps: torch.Tensor  # (B,)
    teacher_pred: torch.Tensor | None = None  # (B, 4, h, w) the teacher's prediction, where it was stored
    dropout: float = 0.0  # the rate at which captions were dropped


def draw_noise(rng: np.random.Generator, shape: tuple, chain: torch.Tensor | None, mine: slice, noise_scheduler, device):
    """Standard normal noise for latents of `shape` and timesteps out of `chain`, or of all of the noise scheduler's, of which
    the share `mine` is returned."""
    if chain is None:
        chain = torch.arange(noise_scheduler.config.num_train_timesteps)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))  # on the CPU: the same numbers for every device
    noise = torch.randn(shape, generator=generator)[mine]
    timesteps = chain[torch.randint(len(chain), shape[:1], generator=generator)[mine]]
    return upload(noise, device), upload(timesteps, device)


def share_of(batch_size: int, share: int, shares: int) -> slice:
    """Where share number `share` of a batch stands in it."""
    size = batch_size // shares
    return slice(share * size, (share + 1) * size)


def require_even_shares(batch_size: int, processes: int):
    """Raises SystemExit where the processes cannot share a batch evenly."""
    require(batch_size % processes == 0, f"--batch-size must be a multiple of {processes}, the number of processes")


@functools.lru_cache(maxsize=2)
def order_of_epoch(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def rows_of_step(step: int, count: int, batch_size: int, seed: int) -> np.ndarray:
    """(B,) which of `count` rows a step takes: each at most once in an epoch, in a new order every time."""
    epoch, place = divmod(step, count // batch_size)
    return order_of_epoch(epoch, count, seed)[place * batch_size : (place + 1) * batch_size]


class TrainingPairs:
    """(latents, caption embedding) pairs of a data set, from the cache or, without a `folder`, encoded on the fly.

    `batch(indices, choices, mirrored)` gives latents (n, 4, h, w) and embeddings (n, tokens, width) on the device:
    picture `indices[i]`, left and right exchanged where `mirrored[i]`, with its caption number `choices[i]` modulo how
    many it has, or the empty caption where it is -1. With `flip`, `draw` mirrors half of the pictures.
    Of several processes of Accelerate's each draws its share of a batch. Raises SystemExit where the disk is full, where more
    than `max_broken` of the pictures cannot be used, or fewer than a batch takes can.
    """

    def __init__(self, dataset: CocoCaptions, teacher, folder: Path | None, accelerator, *, batch_size: int, seed: int,
                 caption_gb: float, workers: int = 0, flip: bool = False, max_broken: float = 1.0):
        self.dataset, self.teacher, self.batch_size, self.seed, self.flip = dataset, teacher, batch_size, seed, flip
        self.device, self.rank, self.processes = accelerator.device, accelerator.process_index, accelerator.num_processes
        self.usable = np.arange(len(dataset))
        self.row_of = {}  # of each caption that is cached, in `embeddings`
        self.empty = self._encode_captions([""]).float()  # (1, tokens, width)
        require_even_shares(batch_size, self.processes)
        dataset.require_share(max_broken)
        self._require_a_batch()
        self.folder = None
        if folder is not None:
            key = cache_key("pairs", teacher, dataset.fingerprint(), str(kept_dtype(teacher.vae)))
            self.folder = Path(folder) / f"pairs-{key}"
            self._cache_latents(workers)
            dataset.require_share(max_broken)
            self._require_a_batch()
            self._cache_captions(caption_gb)

    def _require_a_batch(self):
        require(self.batch_size <= len(self), f"--batch-size {self.batch_size} is more than the {len(self)} training pictures")

    def __len__(self) -> int:
        return len(self.usable)

    def describe(self) -> str:
        return self.dataset.describe(len(self), "training")

    @torch.no_grad()
    def _cache_latents(self, workers: int):
        """`self.latents`: one array of all pictures and, with `flip`, one of their mirror images."""
        side = self.dataset.size_px // self.teacher.vae_factor
        shape = (len(self.dataset), 4, side, side)
        self.latents = []
        for name in ("latents", "latents-mirrored")[: 1 + self.flip]:
            def produce(start, mirrored=name == "latents-mirrored"):
                for stacked, indices, end in images(self.dataset, 128, workers, start):
                    latents = self._encode_images(stacked.flip(3) if mirrored else stacked)
                    yield indices, end, latents.float().cpu().numpy()  # numpy knows no bf16

            array, made = cached_array(self.folder, name, shape, produce, "img")
            self.latents.append(array)
        self.usable = np.setdiff1d(self.usable, made["bad"])
        for i in made["bad"]:
            self.dataset.skip("cannot be decoded", self.dataset.files[i])

    @torch.no_grad()
    def _cache_captions(self, caption_gb: float):
        """Distinct captions, the first ones of all pictures first, as many as fit into `caption_gb`."""
        rounds = max(len(captions) for captions in self.dataset.captions)
        in_turn = (captions[k] for k in range(rounds) for captions in self.dataset.captions if k < len(captions))
        distinct = list(dict.fromkeys(in_turn))
        bytes_each = self.empty.numel() * 2
        texts = distinct[: int(caption_gb * 1e9 / bytes_each)]
        self.row_of = {text: row for row, text in enumerate(texts)}
        if texts:
            def produce(start, batch=256):
                for i in range(start, len(texts), batch):
                    part = texts[i : i + batch]
                    states = self._encode_captions(part)
                    yield list(range(i, i + len(part))), i + len(part), states.float().cpu().numpy()

            shape = (len(texts), *self.empty.shape[1:])
            self.embeddings, _ = cached_array(self.folder, f"captions-{len(texts)}", shape, produce, "cap",
                                              limit="--cache-gb")
        if len(texts) < len(distinct) and self.rank == 0:
            print(f"{len(texts):,} of {len(distinct):,} captions are cached; the rest are encoded on the fly")

    def draw(self, step: int, dropout: float, *, chain: torch.Tensor | None = None, part: int = 0, parts: int = 1) -> Batch:
        """The batch of one step. It depends on (seed, step) alone, so a resumed run repeats the unbroken one.

        Pictures come in a new order each epoch, each with one of its captions, or the empty one at rate `dropout`, at
        timesteps out of `chain` (all of the noise schedule's). It is this process's share, or one of its `parts`.
        """
        rng = np.random.default_rng([self.seed, 1, step])
        mine = share_of(self.batch_size, self.rank * parts + part, self.processes * parts)
        dropped = rng.random(self.batch_size) < dropout
        choices = np.where(dropped, -1, rng.integers(0, 60, self.batch_size))
        mirrored = rng.random(self.batch_size) < 0.5 if self.flip else np.zeros(self.batch_size, bool)
        latents, encoder_hidden_states = self.batch(self.indices(step)[mine], choices[mine], mirrored[mine])
        shape = (self.batch_size, *latents.shape[1:])
        noise, timesteps = draw_noise(rng, shape, chain, mine, self.teacher.noise_scheduler, self.device)
        return Batch(latents, encoder_hidden_states, noise, timesteps, dropout=dropout)

    def indices(self, step: int) -> np.ndarray:
        """(B,) which of the pictures a step takes, over all processes."""
        return rows_of_step(step, len(self), self.batch_size, self.seed)

    def batch(self, indices: np.ndarray, choices: np.ndarray, mirrored: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        indices = self.usable[indices]
        if self.folder is None:
            indices, latents = self._encode(indices, mirrored)
        else:
            rows = [self.latents[int(mirror)][i] for i, mirror in zip(indices, mirrored)]
            latents = upload(torch.from_numpy(np.stack(rows)), self.device)
        texts = []
        for i, choice in zip(indices, choices):
            captions = self.dataset.captions[i]
            texts.append("" if choice < 0 else captions[choice % len(captions)])
        return latents.float(), self.embed(texts)

    def embed(self, texts: list[str]) -> torch.Tensor:
        """(n, tokens, width) float32: from the cache where it has them, the rest encoded now."""
        states = self.empty.repeat(len(texts), 1, 1)
        cached = [i for i, text in enumerate(texts) if text in self.row_of]
        live = [i for i, text in enumerate(texts) if text and text not in self.row_of]
        if cached:
            rows = [self.row_of[texts[i]] for i in cached]
            embeddings = upload(torch.from_numpy(self.embeddings[rows]), self.device)
            states.index_copy_(0, upload(torch.tensor(cached), self.device), embeddings.float())
        if live:
            encoded = self._encode_captions([texts[i] for i in live])
            states.index_copy_(0, upload(torch.tensor(live), self.device), encoded.float())
        return states

    @torch.no_grad()
    def _encode(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[list[int], torch.Tensor]:
        """Latents without a cache. A picture that cannot be decoded is replaced by the next one that can."""
        found, pixels = [], []
        for i, mirror in zip(indices, mirrored):
            nearest = ((i + k) % len(self.dataset) for k in range(len(self.dataset)))
            index, image = next(((j, x) for j in nearest if (x := self.dataset[j]) is not None), (None, None))
            if image is None:
                raise SystemExit(f"error: no picture in {self.dataset.root / self.dataset.split} can be decoded")
            found.append(index)
            pixels.append(image.flip(2) if mirror else image)
        return found, self._encode_images(torch.stack(pixels))

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, kept_dtype(self.teacher.vae)):
            return encode_images(self.teacher.vae, images)

    def _encode_captions(self, captions: list[str]) -> torch.Tensor:
        with autocast(self.device, kept_dtype(self.teacher.text_encoder)):
            return encode_captions(self.teacher.text_encoder, self.teacher.tokenizer, captions)


class TeacherStore:
    """The teacher's predictions for fixed draws of caption, timestep and noise of every training picture.

    Written once to the cache, next to the latents, and read by every later run, whatever its student: then no teacher
    runs in training at all. A prediction takes as many bytes as a latent (512 at 64 px). Draw k of picture i depends
    on (k, i) alone; its caption is dropped at rate `dropouts[k]`. The `steps` of a training are cut into as many equal parts
    as there are draws; part k uses draw k.
    """

    def __init__(self, pairs: TrainingPairs, predict, dropouts: list[float], steps: int, guidance: float = 1.0):
        """`predict(noisy, batch)` is the teacher's pass, with `guidance`, called for what is not in the cache yet."""
        self.pairs, self.dropouts, self.steps, self.stored = pairs, dropouts, steps, []
        self.seconds = 0.0  # that it took to make, now or in an earlier run
        teacher = pairs.teacher
        lowered = kept_dtype(teacher.unet)
        batch_size = min(128, images_at_once(pairs.dataset.size_px, pairs.dataset.size_px))
        for k, dropout in enumerate(dropouts):
            def produce(start, k=k):
                for i in range(start, len(pairs), batch_size):
                    indices = np.arange(i, min(i + batch_size, len(pairs)))
                    batch = self.fixed(k, indices)
                    noisy = teacher.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
                    with autocast(pairs.device, lowered):
                        predicted = predict(noisy, batch)
                    yield indices.tolist(), int(indices[-1]) + 1, predicted.float().cpu().numpy()

            key = cache_key("store", teacher, pairs.dataset.fingerprint(), k, dropout, pairs.flip,
                            str(lowered), guidance)
            shape = (len(pairs), *pairs.latents[0].shape[1:])
            array, made = cached_array(pairs.folder, f"teacher-{k}-{key}", shape, produce, "img", limit="--store")
            self.stored.append(array)
            self.seconds += made["seconds"]

    def fixed(self, k: int, indices: np.ndarray) -> Batch:
        """Draw k of the pictures `indices`."""
        shape = self.pairs.latents[0].shape[1:]
        choices, timesteps, noise, mirrored = [], [], [], []
        for i in indices:
            rng = np.random.Generator(np.random.Philox(key=[k, i]))
            choices.append(-1 if rng.random() < self.dropouts[k] else rng.integers(60))
            timesteps.append(rng.integers(self.pairs.teacher.noise_scheduler.config.num_train_timesteps))
            noise.append(rng.standard_normal(shape, dtype=np.float32))
            mirrored.append(self.pairs.flip and rng.random() < 0.5)
        latents, encoder_hidden_states = self.pairs.batch(indices, np.array(choices), np.array(mirrored))
        noise = upload(torch.from_numpy(np.stack(noise)), self.pairs.device)
        timesteps = upload(torch.tensor(timesteps), self.pairs.device)
        return Batch(latents, encoder_hidden_states, noise, timesteps, dropout=self.dropouts[k])

    def draw(self, step: int, dropout: float = 0.0, *, part: int = 0, parts: int = 1) -> Batch:
        """The batch of one step, or this process's share of it, as `TrainingPairs.draw` gives it, with `teacher_pred`.
        The rate at which its captions were dropped is the draw's, whatever `dropout` is."""
        pairs = self.pairs
        k = step * len(self.stored) // self.steps
        mine = share_of(pairs.batch_size, pairs.rank * parts + part, pairs.processes * parts)
        indices = pairs.indices(step)[mine]
        teacher_pred = upload(torch.from_numpy(self.stored[k][indices]), pairs.device).float()
        return self.fixed(k, indices)._replace(teacher_pred=teacher_pred)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read every cached file whole and remove what is damaged.")
    parser.add_argument("folder", type=Path, nargs="?", default="data/cache", help="the cache (default data/cache)")
    cache_folder = parser.parse_args().folder
    require(cache_folder.is_dir(), f"there is no folder {cache_folder}")
    broken = damaged(cache_folder)
    for path in broken:
        print(f"{path} is damaged: removed, the next run makes it again")
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)
    print(f"{len(broken)} damaged files")
