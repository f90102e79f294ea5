"""Draw pictures with a student of any version, or with any Stable Diffusion 1.x pipeline folder.

    python v3/inference.py --model checkpoints/v2.2-mini/student --prompt "a cat on the grass" --out pictures
    python v3/inference.py --model ... --prompts prompts.txt --grid --compare checkpoints/mini-teacher

Picture i starts from the noise of seed + i, whatever the batch, so a student and `--compare` start from the same.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import common  # noqa: F401  (before diffusers: see there)

# isort: split
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from common import sampling
from common.run import pick_device, pick_dtype, save_sheet
from common.settings import check, first_line, parse

SAMPLERS = {**sampling.SAMPLERS, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}


@dataclass
class Settings:
    model: str = "checkpoints/v2.2/student"  # a pipeline folder, a run's folder or a hub id
    compare: str = ""  # another one, whose pictures from the same noise stand beside
    prompt: str = ""  # what to draw
    prompts: str = ""  # a text file, one prompt a line
    negative: str = ""  # what not to draw
    out: str = "pictures"  # the folder of the PNGs
    grid: bool = False  # also one picture of all, grid.png
    sampler: str = "ddim"  # ddim, ddpm, dpm++ or euler
    steps: int = 25  # of the sampler
    guidance: float = 5.0  # classifier-free guidance scale
    size_px: int = 0  # side of the pictures; 0: what the model was trained at
    seed: int = 0  # of the first picture
    batch: int = 8  # pictures at a time
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: str = "auto"  # auto, fp32, fp16 or bf16
    compile: bool = False  # torch.compile the U-Net: worth it for many pictures


def load(name: str, s: Settings, device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Raises SystemExit with one line where `name` cannot be loaded."""
    folder = Path(name) / "student" if (Path(name) / "student" / "model_index.json").is_file() else Path(name)
    if (folder.exists() or name.startswith((".", "/", "checkpoints"))) and not (folder / "model_index.json").is_file():
        raise SystemExit(f"error: {name} is no pipeline folder; train a student first, or give --model another")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder if folder.is_dir() else name, safety_checker=None, requires_safety_checker=False, dtype=dtype)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {name} could not be loaded ({first_line(error)})") from None
    pipeline.scheduler = SAMPLERS[s.sampler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if s.compile:
        pipeline.unet.compile()
    return pipeline.to(device)


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], s: Settings, title: str) -> tuple[list[Image.Image], float]:
    """One picture a prompt, and seconds a picture."""
    pictures, began = [], time.perf_counter()
    for i in tqdm(range(0, len(prompts), s.batch), desc=title, unit="batch"):
        part = prompts[i : i + s.batch]
        pictures += pipeline(
            part, negative_prompt=[s.negative] * len(part), num_inference_steps=s.steps, guidance_scale=s.guidance,
            height=s.size_px or None, width=s.size_px or None,
            generator=[torch.Generator().manual_seed(s.seed + i + k) for k in range(len(part))]).images
    return pictures, (time.perf_counter() - began) / len(prompts)


def main(s: Settings):
    check({
        "give --prompt or --prompts": bool(s.prompt) != bool(s.prompts),
        f"{s.prompts} is missing": not s.prompts or Path(s.prompts).is_file(),
        f"--sampler must be one of {', '.join(SAMPLERS)}": s.sampler in SAMPLERS,
        "--steps and --batch must be at least 1": min(s.steps, s.batch) >= 1,
        "--dtype must be auto, fp32, fp16 or bf16": s.dtype in ("auto", "fp32", "fp16", "bf16"),
    })
    lines = Path(s.prompts).read_text("utf-8").splitlines() if s.prompts else [s.prompt]
    prompts = [line.strip() for line in lines if line.strip()]
    check({f"{s.prompts} has no prompt": bool(prompts)})
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in [s.model, *([s.compare] if s.compare else [])]:
        pipeline = load(name, s, device, dtype)
        s.size_px = s.size_px or pipeline.unet.config.sample_size * pipeline.vae_scale_factor  # --compare's too
        pictures, seconds = draw(pipeline, prompts, s, Path(name).name)
        rows.append(pictures)
        print(f"{name}: {seconds:.3f} s an image on {device.type}, batches of {min(s.batch, len(prompts))}")
    for i, shown in enumerate(zip(*rows)):
        wide = Image.new("RGB", (sum(p.width for p in shown), max(p.height for p in shown)))
        for k, picture in enumerate(shown):
            wide.paste(picture, (sum(p.width for p in shown[:k]), 0))
        wide.save(out / f"{i:05d}.png")
    if s.grid:
        tensors = [torch.stack([torch.frombuffer(bytearray(p.convert("RGB").tobytes()), dtype=torch.uint8)
                                .view(p.height, p.width, 3).permute(2, 0, 1) for p in row]) for row in rows]
        if len(rows) == 1:
            save_sheet(out / "grid.png", tensors[0], prompts)
        else:  # the model's pictures over the other's
            save_sheet(out / "grid.png", torch.cat(tensors), prompts, columns=len(prompts))
    print(f"{len(prompts)} pictures in {out}")


if __name__ == "__main__":
    main(parse(Settings, __doc__))
