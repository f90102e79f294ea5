"""Draw images with a student of any version, or with any Stable Diffusion 1.x pipeline folder.

    python v3/inference.py --model checkpoints/v2.2-mini/student --prompt "a cat on the grass" --out pictures
    python v3/inference.py --model ... --prompts prompts.txt --grid --compare checkpoints/mini-teacher

Image i starts from the noise of seed + i, whatever the batch, so a student and `--compare` start from the same.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from common.files import full_disk_is_one_line, make_folder, model_place, name_of, read_text
from common.precision import pick_dtype
from common.report import drawn_with, save_sheet
from common.sampling import make_scheduler, require_no_extra_step
from common.settings import parse, require, start
from common.teacher import load_part, load_teacher
from common.trainer import start_accelerator

# isort: split
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm


@dataclass
class Settings:
    model: str = "checkpoints/v2.2/student"  # a pipeline folder, a run's folder or a hub id
    compare: str = ""  # another one, whose images from the same noise stand beside
    prompt: str = ""  # what to draw
    prompts: str = ""  # a text file, one prompt a line
    negative: str = ""  # what not to draw
    out: str = "pictures"  # the folder of the PNGs
    grid: bool = False  # also one sheet of all, grid.png
    sampler: Literal["auto", "ddim", "ddim-trailing", "ddpm", "dpm++", "euler"] = "auto"  # auto: the card's, or else ddim
    steps: int = 0  # of the sampler; 0: those that the model's card names, or else 25
    guidance: float = 0.0  # classifier-free guidance scale; 0: that of the model's card, or else 5
    size_px: int = 0  # side of the images; 0: what the model was trained at
    seed: int = 0  # of the first image
    batch: int = 8  # images at a time
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of all weights
    tiny_vae: str = ""  # a folder or hub id that decodes instead, far faster and less exactly: madebyollin/taesd for SD-1.5's
    compile: bool = False  # torch.compile the U-Net: worth it for many images


def load(name: str, sampler: str, device: torch.device, dtype: torch.dtype, tiny_vae: str = "") -> StableDiffusionPipeline:
    """Raises SystemExit with one line where `name` cannot be loaded, or not all of it, or its latents do not fit `tiny_vae`."""
    model = load_teacher(name, device, dtype, "the model")
    if tiny_vae:
        tiny = load_part(AutoencoderTiny, tiny_vae, "", "the tiny autoencoder", dtype=dtype)
        same = (len(tiny.config.block_out_channels), tiny.config.latent_channels) == (
            len(model.vae.config.block_out_channels), model.vae.config.latent_channels)
        require(same, f"{tiny_vae} decodes latents of another shape than {name}'s")
        model.vae = tiny.to(device)
    return model.pipeline(scheduler=make_scheduler(sampler, model.noise_scheduler))


def how_to_draw(place: str, **given) -> dict:
    """Sampler, steps and guidance: what is `given`, or, where that is "auto" or 0, the card's, or else the defaults."""
    how = {"sampler": "ddim", "steps": 25, "guidance": 5.0} | drawn_with(place)
    return how | {option: value for option, value in given.items() if value not in ("auto", 0)}


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], size_px: int, title: str, how: dict,
         s: Settings) -> tuple[list[Image.Image], float]:
    """One image a prompt, and seconds an image."""
    images, began = [], time.perf_counter()
    for i in tqdm(range(0, len(prompts), s.batch), desc=title, unit="batch"):
        part = prompts[i : i + s.batch]
        generators = [torch.Generator().manual_seed(s.seed + i + k) for k in range(len(part))]
        images += pipeline(
            part, negative_prompt=[s.negative] * len(part), num_inference_steps=how["steps"], guidance_scale=how["guidance"],
            height=size_px, width=size_px, generator=generators).images
    return images, (time.perf_counter() - began) / len(prompts)


def side_by_side(images: tuple[Image.Image, ...]) -> Image.Image:
    wide = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left_px = 0
    for image in images:
        wide.paste(image, (left_px, 0))
        left_px += image.width
    return wide


def main(s: Settings):
    require(bool(s.prompt) != bool(s.prompts), "give --prompt or --prompts")
    require(not s.prompts or Path(s.prompts).is_file(), f"{s.prompts} is missing")
    require(s.size_px % 8 == 0, "--size-px must be a multiple of 8")
    lines = read_text(Path(s.prompts)).splitlines() if s.prompts else [s.prompt]
    prompts = [line.strip() for line in lines if line.strip()]
    require(prompts, f"{s.prompts or '--prompt'} has no prompt")
    device = start_accelerator(s.device, compile=s.compile).device
    dtype = pick_dtype(s.dtype, device)
    out = make_folder(Path(s.out), "--out")
    rows, size_px = [], s.size_px
    for name in (s.model, s.compare) if s.compare else (s.model,):
        place = model_place(name)
        how = how_to_draw(place, sampler=s.sampler, steps=s.steps, guidance=s.guidance)
        pipeline = load(place, how["sampler"], device, dtype, s.tiny_vae)
        pipeline.scheduler.set_timesteps(how["steps"])
        require_no_extra_step(pipeline.scheduler, f"--steps {how['steps']}")
        if s.compile:
            pipeline.unet.compile()
        size_px = size_px or pipeline.unet.config.sample_size * pipeline.vae_scale_factor  # --compare's too
        images, seconds = draw(pipeline, prompts, size_px, name_of(place), how, s)
        rows.append(images)
        print(f"{name}: {seconds:.3f} s an image on {device.type}, batches of {min(s.batch, len(prompts))}; "
              f"{how['steps']} {how['sampler']} steps, guidance {how['guidance']:g}")
    with full_disk_is_one_line(out, "what was drawn is kept"):
        for i, images in enumerate(zip(*rows)):
            side_by_side(images).save(out / f"{i:05d}.png")
        if s.grid:  # the model's images over the other's
            names = ("model", "compare")
            pixels = {name: torch.stack([pil_to_tensor(image) for image in images]) for name, images in zip(names, rows)}
            save_sheet(out / "grid.png", pixels, prompts, columns=8 if len(rows) == 1 else len(prompts))
    print(f"{len(prompts)} pictures in {out}")


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, limits={"steps": (0, 999)}))
