"""Latents and caption embeddings of a data set, computed once and kept on disk: the frozen parts are paid once."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
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


class Batch(NamedTuple):
    latents: torch.Tensor  # (B, 4, h, w) scaled
    hidden: torch.Tensor  # (B, tokens, width) the text encoder's states of the captions
    noise: torch.Tensor  # (B, 4, h, w) standard normal
    timesteps: torch.Tensor  # (B,)


class TrainingPairs:
    """(latents, caption embedding) pairs of a data set, from the cache or encoded on the fly.

    `batch(indices, choices)` gives latents (n, 4, h, w) and embeddings (n, tokens, width) on the device: picture
    `indices[i]` with its caption number `choices[i]` modulo how many it has, or the empty caption where it is -1.
    Raises SystemExit where no picture can be decoded or the disk is full.
    """

    def __init__(self, dataset: CocoCaptions, teacher, folder: Path | None, *, caption_gb: float, device, workers=0):
        self.dataset, self.teacher, self.device, self.folder = dataset, teacher, device, None
        self.usable, self._order = np.arange(len(dataset)), None
        self.empty = encode_captions(teacher.text_encoder, teacher.tokenizer, [""]).to(device)
        if folder is None:
            return
        key = fingerprint(dataset.annotations, dataset.split, dataset.size_px, len(dataset), teacher.vae,
                          teacher.text_encoder)
        self.folder = Path(folder) / f"pairs-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._cache_latents(workers)
            self._cache_captions(caption_gb)
        except OSError as error:
            if error.errno == 28:  # no space left
                raise SystemExit(f"error: the disk of {folder} is full; free some space and run again, what is cached "
                                 "is kept (or use --no-cache)") from None
            raise

    def __len__(self) -> int:
        return len(self.usable)

    def _filled(self, name: str, shape: tuple, produce, unit: str) -> np.ndarray:
        """The (rows, ...) fp16 array `name`, memory-mapped. `produce(start)` yields (indices, end, values) from row
        `start`; how far it got is written after the data is on disk, so a killed run goes on there."""
        path, done = self.folder / f"{name}.npy", self.folder / f"{name}.json"
        state = json.loads(done.read_text()) if done.is_file() else {"rows": 0, "bad": []}
        if state["rows"] and not path.is_file():
            state = {"rows": 0, "bad": []}
        if state["rows"] < shape[0]:
            mode = "r+" if state["rows"] else "w+"
            array = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)
            since = 0
            with tqdm(total=shape[0], initial=state["rows"], desc=f"caching {name}", unit=unit) as bar:
                for indices, end, values in produce(state["rows"]):
                    array[indices] = values
                    state["bad"] += sorted(set(range(state["rows"], end)) - set(indices))
                    bar.update(end - state["rows"])
                    since, state["rows"] = since + end - state["rows"], end
                    if since >= 8192 or end == shape[0]:
                        array.flush()
                        write_atomically(done, json.dumps(state).encode())
                        since = 0
            if state["rows"] < shape[0]:  # the last batches held nothing that can be decoded
                state["bad"] += range(state["rows"], shape[0])
                state["rows"] = shape[0]
                write_atomically(done, json.dumps(state).encode())
            del array
        if state["bad"]:
            self.usable = np.setdiff1d(self.usable, state["bad"])
            self.dataset.skipped["cannot be decoded"] = len(state["bad"])
        return np.load(path, mmap_mode="r")

    @torch.no_grad()
    def _cache_latents(self, workers: int):
        def produce(start, batch=128):
            for stacked, indices in pictures(self.dataset, batch, workers, start):
                end = min(len(self.dataset), (indices[0] - start) // batch * batch + start + batch)
                yield indices, end, encode_pictures(self.teacher.vae, stacked).cpu().numpy()

        side = self.dataset.size_px // self.teacher.vae_factor
        self.latents = self._filled("latents", (len(self.dataset), 4, side, side), produce, "img")
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

        self.embeddings = self._filled(f"captions-{len(texts)}", (len(texts), *self.empty.shape[1:]), produce, "cap")
        if len(texts) < len(order):
            print(f"{len(texts):,} of {len(order):,} captions are cached; the rest are encoded on the fly")

    def draw(self, step: int, batch_size: int, dropout: float, seed: int, *, chain: torch.Tensor | None = None,
             part: int = 0, parts: int = 1) -> Batch:
        """The batch of one step. It depends on (seed, step) alone, so a resumed run repeats the unbroken one.

        Pictures come in a new order each epoch, each with one of its captions, or the empty one at rate `dropout`, at
        timesteps out of `chain` (all of the noise schedule's). Of `parts` equal shares only share `part` is returned.
        """
        epoch, place = divmod(step, len(self) // batch_size)
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(len(self))
        rng = np.random.default_rng([seed, 1, step])
        indices = self._order[1][place * batch_size : (place + 1) * batch_size]
        choices = np.where(rng.random(batch_size) < dropout, -1, rng.integers(0, 60, batch_size))
        mine = slice(batch_size // parts * part, batch_size // parts * (part + 1))
        latents, hidden = self.batch(indices[mine], choices[mine])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=generator)[mine].to(self.device)
        if chain is None:
            chain = torch.arange(self.teacher.noise_scheduler.config.num_train_timesteps)
        timesteps = chain[torch.randint(len(chain), (batch_size,), generator=generator)[mine]].to(self.device)
        return Batch(latents, hidden, noise, timesteps)

    def batch(self, indices: np.ndarray, choices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        indices = self.usable[indices]
        if self.folder is None:
            stacked = torch.stack([self._picture(i) for i in indices])
            with torch.no_grad():
                latents = encode_pictures(self.teacher.vae, stacked)
        else:
            latents = torch.from_numpy(self.latents[indices]).to(self.device)
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

    def _picture(self, i: int) -> torch.Tensor:
        """Picture i, or the next one that can be decoded (only without a cache, which leaves such pictures out)."""
        for j in range(len(self.dataset)):
            picture = self.dataset[(i + j) % len(self.dataset)]
            if picture is not None:
                return picture
        raise SystemExit(f"error: no picture in {self.dataset.root / self.dataset.split} can be decoded")
