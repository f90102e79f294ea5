"""Make stand-ins of true size for what cannot be downloaded: SD-1.5, COCO 2017, and the metrics' networks.

    python bench/stand_in.py --out stand-in        # and run what it prints

The layouts, configs and sizes are the real ones and all weights are random, so what is measured with them are times,
memory and agreement between programs, never quality. 2.6 GB; the pictures are noise over gradients.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import common  # noqa: F401  (before diffusers: see there)

# isort: split
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.settings import parse, require, start


@dataclass
class Settings:
    out: str = "stand-in"  # the folder to make
    train: int = 64  # training pictures
    val: int = 16  # validation pictures
    seed: int = 0  # of weights and pictures


@torch.no_grad()
def half_random(kind, *args, **config) -> torch.nn.Module:
    """A model of `kind` in half precision whose outputs stay finite: weights N(0, 1 / fan-in), norms one, biases zero."""
    with torch.device("meta"):
        model = kind(*args, **config)
    model = model.half().to_empty(device="cpu")
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            p.copy_(torch.randn(p.shape) * p[0].numel() ** -0.5)
    for name, b in model.named_buffers():
        if name.endswith("position_ids"):
            b.copy_(torch.arange(b.shape[-1]).expand_as(b))
    return model


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's 49,408 entries in their layout: bytes, bytes that end a word, merges, the two markers. The merges are pairs of
    letters of no particular language."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [c + "</w>" for c in alphabet]
    letters = [c for c in alphabet if c.isascii() and c.isalpha() and c.islower()]
    pairs = [(a, b) for a in letters for b in letters]
    merges = pairs + [(a + b, c) for a, b in pairs for c in letters] + [(a + b, c + d) for a, b in pairs for c, d in pairs]
    merges = merges[: 49_408 - 2 * len(alphabet) - 2]
    tokens = [*alphabet, *ends, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def sd15(make) -> dict[str, torch.nn.Module]:
    """SD-1.5's three networks, each `make(class, *args, **config)`; the U-Net has 859,520,964 parameters."""
    return dict(
        unet=make(UNet2DConditionModel, sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=make(
            AutoencoderKL, sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.18215),
        text_encoder=make(CLIPTextModel, CLIPTextConfig(
            vocab_size=49_408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=768, bos_token_id=49_406,
            eos_token_id=49_407, pad_token_id=49_407)))


def make_teacher(folder: Path):
    """SD-1.5 in fp16 safetensors, as the hub lays it out."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    StableDiffusionPipeline(
        **sd15(half_random), tokenizer=tokenizer,
        scheduler=PNDMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    config = folder / "scheduler" / "scheduler_config.json"  # the hub's has an entry that this class does not take
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_sample": False}, indent=2))


def make_coco(folder: Path, train: int, val: int, seed: int):
    """COCO 2017's folders and files: JPEGs of the usual sizes, five captions each."""
    rng = np.random.default_rng(seed)
    sizes = ((640, 480), (640, 427), (480, 640), (500, 375))
    words = "a cat dog on in the street field red big small two".split()
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train2017", train), ("val2017", val)):
        (folder / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for i in tqdm(range(count), desc=split, unit="img"):
            width, height = sizes[i % len(sizes)]
            slope = np.linspace(0, 1, height)[:, None, None] * rng.integers(0, 200, 3)
            blobs = np.asarray(Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((width, height)))
            pixels = (0.4 * slope + 0.5 * blobs + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)
            name = f"{i + 1:012d}.jpg"
            Image.fromarray(pixels).save(folder / split / name, quality=92)
            images.append({"id": i + 1, "file_name": name, "width": width, "height": height})
            annotations += [{"id": 5 * i + k, "image_id": i + 1, "caption": " ".join(rng.choice(words, 8)) + "."}
                            for k in range(5)]
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))


def make_metric_networks(folder: Path):
    """Inception-v3 as pytorch-fid takes it and torchvision's AlexNet, as torch's hub cache holds them."""
    import pytorch_fid.inception as fid
    import torchvision

    folder.mkdir(parents=True, exist_ok=True)
    made, original = [], fid._inception_v3

    def keep(**options):
        made.append(original(init_weights=False, **options))
        return made[-1]

    with mock.patch.object(fid, "_inception_v3", keep), \
            mock.patch.object(fid, "load_state_dict_from_url", lambda *_, **__: made[-1].state_dict()):
        inception = fid.fid_inception_v3()
    for module in inception.modules():  # so that features differ from picture to picture
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(inception.state_dict(), folder / "pt_inception-2015-12-05-6726825d.pth")
    torch.save(torchvision.models.alexnet().state_dict(), folder / "alexnet-owt-7be5be79.pth")


def main(s: Settings):
    out = Path(s.out)
    empty = not out.exists() or out.is_dir() and not any(out.iterdir())
    require(empty, f"{out} holds something already; choose another --out")
    torch.manual_seed(s.seed)
    make_coco(out / "coco2017", s.train, s.val, s.seed)
    make_metric_networks(out / "torch" / "hub" / "checkpoints")
    make_teacher(out / "sd15")
    print(f"stand-ins (random weights) in {out}: sd15, coco2017, torch. With TORCH_HOME={out}/torch in the environment:\n"
          f"python v2/2.2.py --teacher {out}/sd15 --data {out}/coco2017 --steps 4 --batch-size 2 --eval-every 0 "
          f"--final-samples 2 --sample-steps 2 --out {out}/run")


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, limits={"train": (2, None), "val": (2, None)}))
