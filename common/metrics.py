"""Metrics: Frechet distance, KID, perceptual distance to the teacher's image.

Two feature networks, never mixed and never under each other's name: `inception` (pytorch-fid's Inception-v3, so that
the Frechet distance is FID, and `lpips` with AlexNet) for the real world; `effnet-lite0` (`common.mini`) for the embedded
world, where the names are FD(effnet-lite0), KID(effnet-lite0) and PD(effnet-lite0).
"""

import contextlib
import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from common.cache import cache_key, cached_array
from common.coco import images as images_of
from common.files import fingerprint, full_disk_is_one_line, read_kept, read_tensors, write_atomically
from common.mini import EFFNET_INPUT_PX, EffNetLite0
from common.precision import autocast, kept_dtype
from common.sampling import reconstruct, sample
from common.settings import require


class InceptionV3(nn.Module):
    """pytorch-fid's Inception-v3: (N, 3, H, W) uint8 to its 2,048 pool features, so that the distance is FID."""

    num_features = 2048
    batch = 50  # images a pass, as pytorch-fid takes them

    def __init__(self):
        super().__init__()
        from pytorch_fid.inception import InceptionV3 as Inception

        try:
            self.net = Inception([3]).eval().requires_grad_(False)
        except OSError as error:  # URLError is one
            raise SystemExit(
                f"error: Inception-v3's weights could not be downloaded ({error}). Put pt_inception-2015-12-05-6726825d.pth "
                "into torch's hub cache (~/.cache/torch/hub/checkpoints), or run the embedded world with --mini"
            ) from None
        import lpips

        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(None):
                warnings.simplefilter("ignore")
                self.lpips = lpips.LPIPS(net="alex").eval().requires_grad_(False)
        except OSError as error:
            raise SystemExit(f"error: AlexNet's weights for LPIPS could not be downloaded ({error})") from None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images.float() / 255)[0].flatten(1)

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(N,) LPIPS with AlexNet, which needs 64 px."""
        a, b = a.float() / 127.5 - 1, b.float() / 127.5 - 1
        if a.shape[-1] < 64:
            a, b = (F.interpolate(x, (64, 64), mode="bilinear") for x in (a, b))
        return self.lpips(a, b).flatten()


FEATURES = {"inception": (InceptionV3, "FID", "KID", "LPIPS"),
            "effnet-lite0": (EffNetLite0, "FD(effnet-lite0)", "KID(effnet-lite0)", "PD(effnet-lite0)")}


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^1/2) of two feature sets (N, D), in float64.

    With A and B the centred sets, each over the root of N - 1, C_a C_b has the eigenvalues of (A B^T)(A B^T)^T, so that the
    trace of its root is the sum of the singular values of A B^T: a small matrix where there are fewer pictures than features,
    and a fifth of torchmetrics' time. Of more pictures the triangular factor R, R^T R = A^T A, stands for A.
    """
    a, b = a.double(), b.double()
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    root_a, root_b = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in centred)
    means = (a.mean(0) - b.mean(0)).square().sum()
    traces = root_a.square().sum() + root_b.square().sum()
    return (means + traces - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()).item()


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """KID (arXiv 1801.01401): the unbiased MMD^2 of two feature sets with the kernel (x.y / D + 1)^3, on all pairs."""
    from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel

    a, b = a.double(), b.double()
    count = min(len(a), len(b))  # torchmetrics takes sets of one size
    a, b = a[:count], b[:count]
    return maximum_mean_discrepancy(poly_kernel(a, a), poly_kernel(a, b), poly_kernel(b, b)).item()


def coverage(real: torch.Tensor, drawn: torch.Tensor, k: int = 5) -> float:
    """Coverage (arXiv 2002.09797, section 3.2): the share of real features with a drawn one nearer than their k-th nearest
    real neighbour. Falls where pictures collapse to few kinds, which a Frechet distance may not show."""
    k = min(k, len(real) - 1)
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # (N,) the nearest one is the feature itself
    nearest = torch.cdist(real, drawn).amin(1)
    return (nearest < radius).float().mean().item()


class Evaluation(NamedTuple):
    images: torch.Tensor  # (N, 3, H, W) uint8
    teacher_images: torch.Tensor  # of the same captions and noise
    captions: list[str]
    scores: dict[str, float]
    teacher_scores: dict[str, float]
    how: str  # the images were drawn, in words


def everywhere(kept) -> bool:
    """Whether every process has found what is kept: they must all go the same way."""
    return all(gather_object([kept is not None]))


class Evaluator:
    """Scores images drawn for the first validation captions against the validation set and the teacher.

    `sampling` are the options of `sample`; a student's images start from the same noise as the teacher's. Everything of
    the frozen side (features of the validation set and of its reconstructions, the teacher's images and scores) is computed
    once and kept in `folder`. Of several processes of Accelerate's each draws and looks at its share, and all must call the
    same methods. `more_scores(images, indices of their captions)` may add scores.

    Raises SystemExit where more than `max_broken` of the validation set cannot be used, or fewer than two pictures can.
    """

    def __init__(self, features: str, dataset, teacher, folder: Path, accelerator, sampling: dict, *, max_broken: float = 0.05,
                 workers: int = 0, more_scores=None):
        network, self.fd_name, self.kid_name, self.pd_name = FEATURES[features]
        self.dataset, self.teacher, self.folder, self.accelerator = dataset, teacher, Path(folder), accelerator
        self.device, self.sampling, self.workers, self.more_scores = accelerator.device, sampling, workers, more_scores
        self.network = network().to(self.device)
        self.network_key = fingerprint(features, EFFNET_INPUT_PX, self.network.net)
        self._reference, self._teacher_images, self._teacher_scores = {}, {}, {}
        self.usable = np.arange(len(dataset))
        _, made = self._features_of_set("image features")
        self.usable = np.setdiff1d(self.usable, made["bad"])
        for i in made["bad"]:
            dataset.skip("cannot be decoded", dataset.files[i])
        dataset.require_share(max_broken)
        require(len(self.usable) >= 2, f"only {len(self.usable)} pictures of {dataset.root / dataset.split} can be used; no "
                "metric works with fewer than 2")
        self.captions = [dataset.captions[i][0] for i in self.usable]

    def describe(self) -> str:
        return self.dataset.describe(len(self.captions), "validation")

    # --- the frozen side ---

    @torch.no_grad()
    def _features_of_set(self, kind: str) -> tuple[np.ndarray, dict]:
        """(N, D) features of the whole validation set, from the cache: its images, or their reconstructions."""
        key = cache_key(kind, self.teacher, self.network_key, self.dataset.fingerprint())
        shape = (len(self.dataset), self.network.num_features)

        def produce(start):
            for pixels, indices, end in images_of(self.dataset, self.network.batch, self.workers, start):
                if kind == "reconstruction features":
                    pixels = reconstruct(self.teacher.vae, pixels)
                yield indices, end, self.network(pixels.to(self.device)).float().cpu().numpy()

        return cached_array(self.folder / f"validation-{key}", kind.replace(" ", "-"), shape, produce, "img", np.float32)

    def reference(self, kind: str, count: int) -> torch.Tensor:
        """(count, D) features of the first usable validation images, or of their reconstructions."""
        if kind not in self._reference:
            array, _ = self._features_of_set(kind)
            self._reference[kind] = torch.from_numpy(array[self.usable])
        return self._reference[kind][:count]

    def teacher_images(self, count: int, keep: Path | None = None, **other) -> torch.Tensor:
        """What the teacher draws for the first `count` captions: made once, and looked for beside its weights
        (`<teacher>/evaluation/`), then in the cache folder, or in `keep`, where it is then written. The teacher's U-Net is
        needed for the first call of each count only. `other` options of `sample` replace the usual ones."""
        count = min(count, len(self.captions))
        options = (count, *sorted(other.items()))
        if options not in self._teacher_images:
            captions, sampling = self.captions[:count], self.sampling | other
            name = f"teacher-{count}-{cache_key('teacher images', self.teacher, captions, sorted(sampling.items()))}"
            shipped = read_tensors(Path(self.teacher.name) / "evaluation" / f"{name}.safetensors")
            dtype = torch.float32 if keep else kept_dtype(self.teacher.vae)  # what is shipped is as exact as the weights
            suffix = "-bf16" if dtype == torch.bfloat16 else ""
            path = Path(keep or self.folder) / f"{name}{suffix}.safetensors"
            kept = shipped or read_tensors(path)
            if not everywhere(kept):
                images, seconds = self._draw(self.teacher.unet, captions, "teacher's images", dtype, **other)
                kept = {"images": images.contiguous(), "seconds": torch.tensor([seconds], dtype=torch.float64)}
                with full_disk_is_one_line(path.parent, "what is cached is kept"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, save(kept))
            self._teacher_images[options] = kept["images"], None if shipped else kept["seconds"].item()  # or another machine's
        return self._teacher_images[options][0]

    def teacher_scores(self, count: int, keep: Path | None = None, **other) -> dict[str, float]:
        """The teacher's row of scores, from the cache where it has been scored before. Images drawn by `other` options, and
        kept in `keep`, are compared with the usual ones."""
        images, usual = self.teacher_images(count, keep, **other), self.teacher_images(count)
        count = len(images)
        options = (count, *sorted(other.items()))
        seconds = self._teacher_images[options][1]
        if options not in self._teacher_scores:
            more = self.more_scores.fingerprint if self.more_scores else ""
            key = cache_key("teacher scores", self.teacher, images.numpy().tobytes(), usual.numpy().tobytes(),
                            self.network_key, self.dataset.fingerprint(), more)
            path = self.folder / f"teacher-scores-{count}-{key}.json"
            if not everywhere(read_kept(path)):
                scores = self.score(images, usual)
                with full_disk_is_one_line(path.parent, "what is cached is kept"):
                    write_atomically(path, json.dumps(scores).encode())
            scores = read_kept(path)
            timed = {} if seconds is None else {"seconds an image": seconds}
            self._teacher_scores[options] = {"parameters": self.teacher.parameters, **scores, **timed}
        return self._teacher_scores[options]

    # --- drawing and scoring ---

    def how(self, count: int, **other) -> str:
        """How images are drawn, in words; `other` options replace the usual ones."""
        sampling = self.sampling | other
        return (f"{count:,} samples, {sampling['steps']} {sampling['sampler'].upper()} steps, "
                f"guidance {sampling['guidance']:g}")

    def _together(self, count: int, compute, progress: str) -> list:
        """[compute(0), ..., compute(count - 1)], each computed by one of the processes and known to all of them."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        bar = tqdm(range(rank, count, processes), desc=progress, leave=False, disable=rank > 0)
        found = gather_object([(i, compute(i)) for i in bar])
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    def _draw(self, unet, captions: list[str], progress: str, dtype=torch.float32, **other) -> tuple[torch.Tensor, float]:
        """What `sample` gives for all captions under autocast to `dtype`: images, seconds an image."""
        options = self.sampling | other
        batch, seed = options["batch"], options["seed"]

        def one_batch(i):
            part = captions[i * batch : (i + 1) * batch]
            with autocast(self.device, dtype):
                return sample(unet, self.teacher, part, **options | {"seed": seed + i})

        drawn = self._together(-(-len(captions) // batch), one_batch, progress)
        seconds = sum(seconds * len(images) for images, seconds in drawn)
        return torch.cat([images for images, _ in drawn]), seconds / len(captions)

    def evaluate(self, unet, count: int, dtype: torch.dtype = torch.float32, **other) -> Evaluation:
        """Draw with a student, under autocast to `dtype`, for the first `count` captions and score what comes. `other`
        options of `sample` replace the usual ones, with which the teacher's images were drawn."""
        wanted = self.teacher_images(count)
        captions = self.captions[: len(wanted)]
        drawn, seconds = self._draw(unet, captions, "student's images", dtype, **other)
        parameters = sum(p.numel() for p in unet.parameters())
        scores = {"parameters": parameters, **self.score(drawn, wanted), "seconds an image": seconds}
        how = self.how(len(wanted), **other)
        return Evaluation(drawn, wanted, captions, scores, self.teacher_scores(count), how)

    @torch.no_grad()
    def score(self, images: torch.Tensor, teacher_images: torch.Tensor | None = None) -> dict[str, float]:
        """All metrics of images drawn for the first len(images) captions; the count stands in the result."""
        batch = self.network.batch
        count, chunks = len(images), images.split(batch)
        found = self._together(len(chunks), lambda i: self.network(chunks[i].to(self.device)).float().cpu(), "features")
        found = torch.cat(found)  # (N, D)
        real, rebuilt = self.reference("image features", count), self.reference("reconstruction features", count)
        scores = {
            "samples": count,
            self.fd_name: frechet_distance(real, found),
            self.fd_name + " to reconstructions": frechet_distance(rebuilt, found),
            self.kid_name: kernel_distance(real, found),
            self.kid_name + " to reconstructions": kernel_distance(rebuilt, found),
            "coverage": coverage(rebuilt, found),
        }
        if teacher_images is images:
            scores[self.pd_name] = 0.0
        elif teacher_images is not None:
            distances = []
            pairs = zip(images[:500].split(batch), teacher_images[:500].split(batch))
            for ours, theirs in pairs:
                distances.append(self.network.distance(ours.to(self.device), theirs.to(self.device)).cpu())
            scores[self.pd_name] = torch.cat(distances).mean().item()
        if self.more_scores:
            scores |= self.more_scores(images, self.usable[:count])
        return scores
