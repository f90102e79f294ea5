"""Latents and caption embeddings of a data set, computed once and kept on disk: the frozen parts are paid once."""

import contextlib
import errno
import hashlib
import json
import os
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from common.coco import CocoCaptions, pictures
from common.sampling import encode_captions, encode_pictures


def write_atomically(path: Path, content: bytes):
    """Write a file so that a reader sees either the old one or the new one, whole."""
    partial = Path(f"{path}.tmp-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fingerprint(*parts) -> str:
    """A short hash of modules (their weights), paths (file contents) and plain values."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, weight in part.state_dict().items():
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().cpu().float().numpy().tobytes())
        elif isinstance(part, Path):
            digest.update(part.read_bytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def filled(folder: Path, name: str, shape: tuple, produce, unit: str) -> tuple[np.ndarray, dict]:
    """The (rows, ...) fp16 array `<folder>/<name>.npy`, memory-mapped, and how it was made: `bad` rows, `seconds`.

    `produce(start)` yields (indices, end, values) from row `start`; how far it got is written after the data is on
    disk, so a killed run goes on there. A file that is not what its checksum says is made again, and of two runs that
    start at once the second waits. Raises SystemExit where the disk is full.
    """
    path, done = folder / f"{name}.npy", folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"), full_disk_is_one_line(folder, "what is cached is kept (or use --no-cache)"):
        state = json.loads(done.read_text()) if done.is_file() and path.is_file() else {}
        if state and not fits(path, shape):
            state = {}
        elif state.get("rows") == shape[0] and state.get("crc32") != checksum(path):
            print(f"{path} is damaged; making it again")
            state = {}
        state = state or {"rows": 0, "bad": [], "seconds": 0.0, "crc32": 0}
        if state["rows"] < shape[0]:
            array = np.lib.format.open_memmap(path, mode="r+" if state["rows"] else "w+", dtype=np.float16, shape=shape)
            if not state["rows"]:
                reserve(path)
            began = time.perf_counter() - state["seconds"]

            def keep():
                if state["rows"] < shape[0]:  # what is whole is written below, with its checksum
                    array.flush()
                    state["seconds"] = time.perf_counter() - began
                    write_atomically(done, json.dumps(state).encode())

            with tqdm(total=shape[0], initial=state["rows"], desc=f"caching {name}", unit=unit) as bar:
                try:
                    for indices, end, values in produce(state["rows"]):
                        array[indices] = values
                        start, bad = state["rows"], sorted(set(range(state["rows"], end)) - set(indices))
                        state.update(rows=end, bad=state["bad"] + bad)
                        bar.update(end - start)
                        if end // 8192 > start // 8192:
                            keep()
                except KeyboardInterrupt:
                    keep()
                    raise
            state["bad"] += range(state["rows"], shape[0])  # the last batches held nothing that can be decoded
            array.flush()
            del array
            state |= {"rows": shape[0], "seconds": time.perf_counter() - began, "crc32": checksum(path)}
            write_atomically(done, json.dumps(state).encode())
    return np.load(path, mmap_mode="r"), state


def fits(path: Path, shape: tuple) -> bool:
    """Whether the .npy file has this shape and all of its bytes."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError):
        return False
    return array.shape == shape and array.dtype == np.float16


def checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


@contextlib.contextmanager
def full_disk_is_one_line(folder: Path, kept: str):
    """Turns "no space left" into SystemExit with a line that says what is `kept`."""
    try:
        yield
    except OSError as error:
        cause = error  # libraries raise errors of their own on top
        while cause and getattr(cause, "errno", None) not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            cause = cause.__context__
        if not cause:
            raise
        raise SystemExit(f"error: the disk of {folder} is full; free some space and run again, {kept}") from None


def reserve(path: Path):
    """Claim the disk space of a file that was made with a hole in it: writing through a memory map onto a full disk would
    end the process with a bus error, which nothing can catch."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class Batch(NamedTuple):
    latents: torch.Tensor  # (B, 4, h, w) scaled
    hidden: torch.Tensor  # (B, tokens, width) the text encoder's states of the captions
    noise: torch.Tensor  # (B, 4, h, w) standard normal
    timesteps: torch.Tensor  # (B,)


def draw_noise(rng: np.random.Generator, shape: tuple, chain: torch.Tensor, mine: slice, device):
    """Standard normal noise for latents of `shape` and timesteps out of `chain`, of which the share `mine` is returned."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(shape, generator=generator)[mine]
    timesteps = chain[torch.randint(len(chain), shape[:1], generator=generator)[mine]]
    return noise.to(device), timesteps.to(device)


class TrainingPairs:
    """(latents, caption embedding) pairs of a data set, from the cache or encoded on the fly.

    `batch(indices, choices, mirrored)` gives latents (n, 4, h, w) and embeddings (n, tokens, width) on the device:
    picture `indices[i]`, left and right exchanged where `mirrored[i]`, with its caption number `choices[i]` modulo how
    many it has, or the empty caption where it is -1. With `flip`, `draw` mirrors half of the pictures.
    Raises SystemExit where no picture can be decoded or the disk is full.
    """

    def __init__(self, dataset: CocoCaptions, teacher, folder: Path | None, *, caption_gb: float, device, workers=0,
                 flip: bool = False):
        self.dataset, self.teacher, self.device, self.folder, self.flip = dataset, teacher, device, None, flip
        self.usable, self._order = np.arange(len(dataset)), None
        self.empty = encode_captions(teacher.text_encoder, teacher.tokenizer, [""]).to(device)
        if folder is None:
            return
        folder_of = dataset.root / dataset.split
        sizes = [(name, (folder_of / name).stat().st_size) for name in dataset.files]  # a mended picture is another one
        key = fingerprint(dataset.annotations, dataset.split, dataset.size_px, sizes, teacher.vae, teacher.text_encoder)
        self.folder = Path(folder) / f"pairs-{key}"
        self._cache_latents(workers)
        self._cache_captions(caption_gb)

    def __len__(self) -> int:
        return len(self.usable)

    @torch.no_grad()
    def _cache_latents(self, workers: int):
        """`self.latents`: one array of all pictures and, with `flip`, one of their mirror images."""
        side = self.dataset.size_px // self.teacher.vae_factor
        self.latents = []
        for name in ("latents", "latents-mirrored")[: 1 + self.flip]:
            def produce(start, mirrored=name == "latents-mirrored", batch=128):
                for stacked, indices in pictures(self.dataset, batch, workers, start):
                    end = min(len(self.dataset), (indices[0] - start) // batch * batch + start + batch)
                    stacked = stacked.flip(3) if mirrored else stacked
                    yield indices, end, encode_pictures(self.teacher.vae, stacked).cpu().numpy()

            array, made = filled(self.folder, name, (len(self.dataset), 4, side, side), produce, "img")
            self.latents.append(array)
        if made["bad"]:
            self.usable = np.setdiff1d(self.usable, made["bad"])
            for i in made["bad"]:
                self.dataset.skip("cannot be decoded", self.dataset.files[i])
        if not len(self.usable):
            raise SystemExit(f"error: no picture in {self.dataset.root / self.dataset.split} can be decoded")

    @torch.no_grad()
    def _cache_captions(self, caption_gb: float):
        """Distinct captions, the first ones of all pictures first, as many as fit into `caption_gb`."""
        rounds = max(len(c) for c in self.dataset.captions)
        order = dict.fromkeys(c[k] for k in range(rounds) for c in self.dataset.captions if k < len(c))
        row_bytes = self.empty[0].numel() * 2
        texts = list(order)[: int(caption_gb * 1e9 / row_bytes)]
        self.row_of = {text: row for row, text in enumerate(texts)}
        if not texts:
            self.embeddings = None
            return

        def produce(start, batch=256):
            for i in range(start, len(texts), batch):
                part = texts[i : i + batch]
                hidden = encode_captions(self.teacher.text_encoder, self.teacher.tokenizer, part)
                yield list(range(i, i + len(part))), i + len(part), hidden.float().cpu().numpy()

        shape = (len(texts), *self.empty.shape[1:])
        self.embeddings, _ = filled(self.folder, f"captions-{len(texts)}", shape, produce, "cap")
        if len(texts) < len(order):
            print(f"{len(texts):,} of {len(order):,} captions are cached; the rest are encoded on the fly")

    def draw(self, step: int, batch_size: int, dropout: float, seed: int, *, chain: torch.Tensor | None = None,
             part: int = 0, parts: int = 1) -> Batch:
        """The batch of one step. It depends on (seed, step) alone, so a resumed run repeats the unbroken one.

        Pictures come in a new order each epoch, each with one of its captions, or the empty one at rate `dropout`, at
        timesteps out of `chain` (all of the noise schedule's). Of `parts` equal shares only share `part` is returned.
        """
        indices, rng = self.indices(step, batch_size, seed), np.random.default_rng([seed, 1, step])
        choices = np.where(rng.random(batch_size) < dropout, -1, rng.integers(0, 60, batch_size))
        mirrored = rng.random(batch_size) < 0.5 if self.flip else np.zeros(batch_size, bool)
        mine = slice(batch_size // parts * part, batch_size // parts * (part + 1))
        latents, hidden = self.batch(indices[mine], choices[mine], mirrored[mine])
        if chain is None:
            chain = torch.arange(self.teacher.noise_scheduler.config.num_train_timesteps)
        return Batch(latents, hidden, *draw_noise(rng, (batch_size, *latents.shape[1:]), chain, mine, self.device))

    def batch(self, indices: np.ndarray, choices: np.ndarray, mirrored: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        indices = self.usable[indices]
        if self.folder is None:
            indices, found = zip(*map(self._picture, indices))
            stacked = torch.stack([p.flip(2) if m else p for p, m in zip(found, mirrored)])
            with torch.no_grad():
                latents = encode_pictures(self.teacher.vae, stacked)
        else:
            latents = torch.from_numpy(np.stack([self.latents[int(m)][i] for i, m in zip(indices, mirrored)])).to(self.device)
        texts = ["" if k < 0 else self.dataset.captions[i][k % len(self.dataset.captions[i])]
                 for i, k in zip(indices, choices)]
        hidden = self.empty.repeat(len(texts), 1, 1)
        cached = [] if self.folder is None or self.embeddings is None else [
            (i, self.row_of[t]) for i, t in enumerate(texts) if t in self.row_of]
        if cached:
            places, rows = zip(*cached)
            hidden[list(places)] = torch.from_numpy(self.embeddings[list(rows)]).to(hidden)
        live = sorted({i for i, t in enumerate(texts) if t} - {i for i, _ in cached})
        if live:
            hidden[live] = encode_captions(self.teacher.text_encoder, self.teacher.tokenizer, [texts[i] for i in live])
        return latents.float(), hidden.float()

    def indices(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """(B,) which of the pictures step takes."""
        epoch, place = divmod(step, len(self) // batch_size)
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(len(self))
        return self._order[1][place * batch_size : (place + 1) * batch_size]

    def _picture(self, i: int) -> tuple[int, torch.Tensor]:
        """Picture i, or the next one that can be decoded, and which that is (a cache leaves such pictures out)."""
        for j in range(len(self.dataset)):
            index = (i + j) % len(self.dataset)
            picture = self.dataset[index]
            if picture is not None:
                return index, picture
        raise SystemExit(f"error: no picture in {self.dataset.root / self.dataset.split} can be decoded")


class TeacherStore:
    """The teacher's predictions for `draws` fixed draws of caption, timestep and noise of every training picture.

    Written once to the cache, next to the latents, and read by every later run, whatever its student: then no teacher
    runs in training at all. A prediction takes as many bytes as a latent (512 at 64 px). Draw k of picture i depends
    on (k, i) alone; its caption is dropped at rate `dropouts[k]`.
    """

    def __init__(self, pairs: TrainingPairs, predict, dropouts: list[float]):
        """`predict(noisy, timesteps, hidden)` is the teacher's pass, called for what is not in the cache yet."""
        self.pairs, self.dropouts, self.stored = pairs, dropouts, []
        self.seconds = 0.0  # that it took to make, now or in an earlier run
        teacher_key = fingerprint(pairs.teacher.unet)
        # a CPU that multiplies in bf16 does so faster (3 x at SD-1.5's size), at an error (about 1 %) far below the student's
        bf16 = pairs.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
        for k, dropout in enumerate(dropouts):
            def produce(start, k=k, batch=128):
                for i in range(start, len(pairs), batch):
                    indices = np.arange(i, min(i + batch, len(pairs)))
                    latents, hidden, noise, timesteps = self.fixed(k, indices)
                    noisy = pairs.teacher.noise_scheduler.add_noise(latents, noise, timesteps)
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        prediction = predict(noisy, timesteps, hidden)
                    yield indices.tolist(), int(indices[-1]) + 1, prediction.float().cpu().numpy()

            name = f"teacher-{teacher_key}-{k}-{dropout:.4f}{'-flip' * pairs.flip}{'-bf16' * bf16}"
            array, made = filled(pairs.folder, name, (len(pairs), *pairs.latents[0].shape[1:]), produce, "img")
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
        latents, hidden = self.pairs.batch(indices, np.array(choices), np.array(mirrored))
        device = self.pairs.device
        return Batch(latents, hidden, torch.from_numpy(np.stack(noise)).to(device), torch.tensor(timesteps, device=device))

    def serving(self, step: int, steps: int) -> int:
        """Which draw a step takes: draw k serves the k-th part of the training."""
        return step * len(self.stored) // steps

    def draw(self, step: int, steps: int, batch_size: int, seed: int, *, part: int = 0,
             parts: int = 1) -> tuple[Batch, torch.Tensor]:
        """The batch of one step, or share `part` of `parts` of it, and the teacher's prediction (B, 4, h, w)."""
        share = batch_size // parts
        k, indices = self.serving(step, steps), self.pairs.indices(step, batch_size, seed)[part * share : (part + 1) * share]
        return self.fixed(k, indices), torch.from_numpy(self.stored[k][indices]).float().to(self.pairs.device)
