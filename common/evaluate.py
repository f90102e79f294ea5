"""Measure a teacher, and students beside it, in either world.

    python -m common.evaluate --mini                                          # the embedded teacher, 5,000 samples
    python -m common.evaluate --mini --model checkpoints/v2.2-mini/student    # a student, against the same teacher
    python -m common.evaluate --model checkpoints/v2.2/student                # a student of SD-1.5's, FID on COCO
    python -m common.evaluate --mini --model checkpoints/v2.2-mini,checkpoints/v4-mini --passes 2,4,8,16,50   # in few passes

The floor is what training images score against validation images at the same count, through the autoencoder for distances to
reconstructions; the ceiling is pure noise.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

from common.coco import CocoCaptions, images
from common.files import from_root, make_folder, model_place, name_of
from common.metrics import Evaluator
from common.mini import caption_scores
from common.precision import drawing_dtype, pick_dtype
from common.report import drawn_with, label, save_sheet, scores_table, table
from common.sampling import reconstruct
from common.settings import parse, require, start
from common.teacher import load_teacher, load_unet
from common.trainer import start_accelerator
from data.draw_mini import draw_mini


@dataclass
class Settings:
    mini: bool = False  # the embedded world: the teacher in checkpoints/mini-teacher and drawn scenes, all offline
    teacher: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # whose autoencoder, text encoder and images are the reference
    model: tuple[str, ...] = ()  # students' pipeline folders or runs to measure; none: the teacher alone
    data: str = "data/coco2017"  # a folder in COCO's format, or own pictures with .txt, metadata.jsonl or .csv captions
    train_split: str = "train2017"  # the floor is measured on this split's images
    val_split: str = "val2017"  # the split whose captions are drawn
    val_share: float = 0.05  # share of own pictures, which have no splits, that is held out for evaluation
    resolution: int = 64  # pixels a side
    samples: int = 5_000  # images, at most one a validation picture
    features: Literal["inception", "effnet-lite0"] = "inception"  # inception: FID, LPIPS; effnet-lite0: the embedded world's
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # how to draw; where a student's card says how, that is how
    sample_steps: int = 25  # of the sampler
    guidance: float = 5.0  # classifier-free guidance scale
    seed: int = 0  # of the noise
    batch: int = 100  # images sampled at a time
    passes: tuple[int, ...] = ()  # also draw by so many U-Net passes, of which a step with guidance takes two
    curve: str = ""  # a PNG to write, with the distance against the passes
    bounds: bool = True  # also measure the floor and the ceiling, and the autoencoder
    ship: bool = False  # keep the teacher's images beside its weights, where evaluations look first
    sheet: str = ""  # a PNG to write, with captions and images: a row a model, or 64 of the one that is measured
    cache_folder: str = "data/cache"  # seen from the repository: holds the evaluations' frozen side
    max_broken: float = 0.05  # share of the pictures that may be missing, without caption or undecodable
    workers: int = 2  # processes that decode pictures; 0: this one
    device: str = "auto"  # auto, cuda, cuda:N, mps or cpu
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of the teacher's weights and of the students' autocast


MINI = dict(teacher="checkpoints/mini-teacher", data="data/mini", train_split="train", val_split="val", resolution=32,
            features="effnet-lite0", guidance=3.0, workers=0)


def all_images(dataset: CocoCaptions, workers: int) -> torch.Tensor:
    """(N, 3, H, W) uint8."""
    return torch.cat([pixels for pixels, *_ in images(dataset, 100, workers)])


def measure_bounds(evaluator: Evaluator, train_set: CocoCaptions, val_set: CocoCaptions, vae, seed: int, workers: int) -> dict:
    """The rows of the floor and the ceiling; prints how well the autoencoder rebuilds the validation set."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    real = all_images(val_set, workers)
    training = all_images(train_set, workers)[: len(real)]
    psnr_db = peak_signal_noise_ratio(reconstruct(vae, real).float(), real.float(), data_range=255.0)
    print(f"autoencoder: {psnr_db:.2f} dB PSNR over {len(real):,} validation images")
    evaluator.more_scores = None  # these images have other captions, or none
    noise = torch.randint(256, real.shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    rows = {"floor: training images": training, "the same, reconstructed": reconstruct(vae, training), "ceiling: noise": noise}
    return {name: evaluator.score(pixels) for name, pixels in rows.items()}


def few_steps(passes: tuple[int, ...], guidance: float) -> dict[int, dict]:
    """By their number, how `sample` draws in so many passes by DDIM; only for numbers that are of 1 to 1,000 whole steps."""
    each = 2 if guidance > 1 else 1
    return {number: dict(sampler="ddim-trailing", steps=number // each, guidance=guidance)
            for number in passes if number % each == 0 and number <= 1000 * each}


def note_other_size(accelerator, name: str, unet, teacher, resolution: int):
    """Print a line about a model that draws pictures of another size by itself."""
    own = unet.config.sample_size
    if own != teacher.latent_side(resolution):
        made_for_px = own * teacher.vae_factor
        accelerator.print(f"note: {name} was made for {made_for_px} px and is measured at {resolution} px (--resolution)")


def save_curve(path: Path, few: dict[str, dict], score: str):
    """A PNG of one score against the passes, a line a model."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for title, found in few.items():
        style = dict(color="gray", linestyle=":") if title == "teacher" else {}
        plain = title.replace("$", r"\$")  # or it is taken for a formula
        axis.plot(list(found), [scores[score] for scores in found.values()], marker="o", label=plain, **style)
    axis.set(xlabel="U-Net passes a picture", ylabel=label(score), xscale="log", yscale="log")
    ticks = sorted({number for found in few.values() for number in found})
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.legend()
    figure.savefig(path, dpi=100)


def main(s: Settings):
    require(s.passes or not s.curve, "--curve needs --passes, such as --passes 2,4,8,16,50")
    for option, name in (("--sheet", s.sheet), ("--curve", s.curve)):
        require(name.endswith(".png") or not name, f"{option} must end in .png")
        make_folder(Path(name).parent, option)
    folder = Path(from_root(s.teacher)).is_dir()
    require(folder or not s.ship, "--ship writes beside the teacher's weights: it needs their folder, not a hub id")
    accelerator = start_accelerator(s.device)
    data = draw_mini(ROOT / s.data) if s.mini else Path(from_root(s.data))
    val_set = CocoCaptions(data, s.val_split, s.resolution, limit=s.samples, part=(0, s.val_share))
    train_set = CocoCaptions(data, s.train_split, s.resolution, len(val_set), (s.val_share, 1)) if s.bounds else None
    accelerator.print(f"data: {data}, captions in {val_set.format}")
    teacher = load_teacher(from_root(s.teacher), accelerator.device, pick_dtype(s.dtype, accelerator.device))
    note_other_size(accelerator, "the teacher", teacher.unet, teacher, s.resolution)
    cache = make_folder(ROOT / s.cache_folder, "--cache-folder")
    sampling = dict(sampler=s.sampler, steps=s.sample_steps, guidance=s.guidance, seed=s.seed, size_px=s.resolution,
                    batch=s.batch)
    more_scores = caption_scores(teacher.name, val_set, accelerator.device) if s.mini else None
    evaluator = Evaluator(s.features, val_set, teacher, cache, accelerator, sampling, max_broken=s.max_broken,
                          workers=s.workers, more_scores=more_scores)

    score = evaluator.fd_name + " to reconstructions"
    count, keep = len(evaluator.captions), None
    if s.ship:
        keep = make_folder(Path(teacher.name) / "evaluation", "--ship")
    shown = {"teacher": evaluator.teacher_images(count, keep)}
    rows, few = {"teacher": evaluator.teacher_scores(count)}, {}
    ways = few_steps(s.passes, s.guidance)
    few["teacher"] = {number: evaluator.teacher_scores(count, keep, **way) for number, way in ways.items()}
    for name in s.model:
        place = model_place(name)
        unet = load_unet(place, what="the model").to(accelerator.device)
        ours, theirs = unet.config.in_channels, teacher.unet.config.in_channels
        require(ours == theirs, f"{name} has {ours} latent channels, the teacher's autoencoder decodes {theirs}")
        ours, theirs = unet.config.cross_attention_dim, teacher.unet.config.cross_attention_dim
        require(ours == theirs, f"{name} takes captions {ours} wide, the teacher's text encoder gives {theirs}")
        dtype = drawing_dtype(s.dtype, accelerator.device, place)
        own = drawn_with(place)  # a student of few steps or of learned guidance
        note_other_size(accelerator, name, unet, teacher, s.resolution)
        evaluation = evaluator.evaluate(unet, count, dtype, **own)
        title = name_of(place)
        title = f"{title} ({len(rows)})" if title in rows else title
        accelerator.print(f"{title}: {evaluation.how}; {label(score)} {evaluation.scores[score]:.4g}")
        shown[title], rows[title] = evaluation.images, evaluation.scores
        ways = few_steps(s.passes, own.get("guidance", s.guidance))
        few[title] = {number: evaluator.evaluate(unet, count, dtype, **way).scores for number, way in ways.items()}
    if s.sheet and accelerator.is_main_process:
        last = list(shown.values())[-1]
        save_sheet(Path(s.sheet), shown if len(shown) > 2 else {"": last[:64]}, evaluator.captions)
    if s.bounds:
        rows |= measure_bounds(evaluator, train_set, val_set, teacher.vae, s.seed, s.workers)
    accelerator.print(f"teacher: {evaluator.how(count)}\n\n{scores_table(rows)}")
    if s.passes:
        distances = {}
        for title, found in few.items():
            distances[title] = {f"{number}": found[number][score] if number in found else None for number in s.passes}
        accelerator.print(f"\n{label(score)} by passes a picture:\n{table(distances)}")
    if s.curve and accelerator.is_main_process:
        whole = any(few.values())
        require(whole, "no curve: a step with guidance takes two passes, so --passes must name an even number")
        save_curve(Path(s.curve), few, score)


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, MINI, limits={"passes": (1, 2000)}))
