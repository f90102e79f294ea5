"""Measure a teacher, or a student's pipeline folder, on the embedded set, with the floor and the ceiling beside it.

    python -m common.evaluate                                           # the embedded teacher, 5,000 samples
    python -m common.evaluate --model checkpoints/v2.2-mini/student     # a student, against the same teacher

The floor is what training pictures score against validation pictures at the same count, the ceiling is pure noise.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from common.coco import CocoCaptions
from common.metrics import Evaluator, load_reader
from common.run import pick_device, save_sheet, table
from common.sampling import reconstruct
from common.settings import parse
from common.teacher import load_teacher
from data.draw_mini import draw_mini


@dataclass
class Settings:
    teacher: str = "checkpoints/mini-teacher"  # whose autoencoder, text encoder and pictures serve as the reference
    model: str = ""  # the pipeline folder to measure; empty: the teacher itself
    samples: int = 5_000  # pictures, at most the validation set's 5,000
    sampler: str = "ddpm"  # ddpm or ddim
    sample_steps: int = 25  # of the sampler
    guidance: float = 3.0  # classifier-free guidance scale
    seed: int = 0  # of the noise
    batch: int = 100  # pictures sampled at a time
    bounds: bool = True  # also measure the floor and the ceiling
    ship: bool = False  # keep the teacher's pictures and row beside its weights
    sheet: str = ""  # a PNG to write, with 64 captions and the measured model's pictures
    device: str = "auto"  # auto, cuda, mps or cpu


def main(s: Settings):
    device, data, cache = pick_device(s.device), draw_mini(), ROOT / "data" / "cache"
    name = str(ROOT / s.teacher) if (ROOT / s.teacher).is_dir() else s.teacher
    teacher = load_teacher(name, device)
    val = CocoCaptions(data, "val", 32, limit=s.samples)
    count = len(val)
    how = dict(sampler=s.sampler, steps=s.sample_steps, guidance=s.guidance, seed=s.seed, size_px=32, batch=s.batch)
    evaluator = Evaluator("effnet-lite0", val, teacher, cache, device, how, load_reader(Path(name)))

    real = torch.stack([val[i] for i in range(count)])
    psnr = peak_signal_noise_ratio(reconstruct(teacher.vae, real).float(), real.float(), data_range=255.0)
    print(f"autoencoder: {psnr:.2f} dB PSNR over {count:,} validation pictures")

    shown, row = evaluator.teacher_side(count, keep=Path(name) / "evaluation" if s.ship else None)
    rows = {"teacher": row}
    if s.model:
        shown, rows["student"] = evaluator.student_side(load_teacher(s.model, device).unet, count)
    if s.sheet:
        save_sheet(Path(s.sheet), shown[:64], evaluator.captions[:64])
    if s.bounds:
        evaluator.reader = None  # these pictures have other captions
        train = CocoCaptions(data, "train", 32, limit=count)
        rows["floor: training pictures"] = evaluator.score(torch.stack([train[i] for i in range(count)]))
        noise = torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(s.seed))
        rows["ceiling: noise"] = evaluator.score(noise.to(torch.uint8))
    print(f"{count:,} samples, {s.sample_steps} {s.sampler.upper()} steps, guidance {s.guidance:g}\n")
    print(table(rows))


if __name__ == "__main__":
    main(parse(Settings, __doc__))
