"""How far a training step is from its floor, and what the shortcuts bring, on this machine.

    python bench/stand_in.py --out stand-in           # once: true sizes, random weights
    python bench/speed.py --stand-in stand-in         # SD-1.5's size
    python bench/speed.py                             # the embedded world

Every line is a ratio of medians from interleaved rounds of one run. The floor of a KD step is one teacher forward and
one student forward and backward, alone; of a noise-only step the student's part. The peak is what a product of two
square matrices reaches in the same precision.
"""

import copy
import os
import runpy
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common.cache import Batch, TeacherStore, TrainingPairs
from common.coco import CocoCaptions, images
from common.files import from_root, make_folder
from common.images import load_image
from common.metrics import Evaluator
from common.precision import autocast, multiplies_bf16, pick_dtype, time_kernels, use_kernels
from common.report import table
from common.sampling import caption_layers, computed_once, decode_latents, encode_captions, encode_images, sample
from common.settings import parse, require, start
from common.slicing import slice_unet, student_config
from common.teacher import Teacher, load_teacher
from common.trainer import Trainer, predict_noise, start_accelerator
from data.draw_mini import draw_mini

AGAINST = {"sampling": "StableDiffusionPipeline", "sampling in bf16": "StableDiffusionPipeline",
           "image loading": "plain PIL", "image loading by workers": "plain PIL", "evaluation": "pytorch_fid",
           "student, 4 passes": "teacher's pipeline, 50 passes", "student, a pass of drawing": "student, a whole pass",
           "teacher, a pass of drawing": "teacher, a whole pass"}


@dataclass
class Settings:
    stand_in: str = ""  # the folder that bench/stand_in.py made; empty: the embedded world
    batch: int = 16  # pictures a step
    rounds: int = 5  # of every measurement
    pictures: int = 16  # sampled and evaluated
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of frozen parts and autocast, chosen as a run chooses it


@dataclass
class World:
    """V-2.2's building blocks."""

    teacher: Teacher
    pairs: TrainingPairs
    evaluator: Evaluator
    trainer: Trainer

    @property
    def device(self) -> torch.device:
        return self.trainer.accelerator.device


def v22_settings(s: Settings):
    v22 = runpy.run_path(str(ROOT / "v2" / "2.2.py"))
    place = dict(teacher=f"{s.stand_in}/sd15", data=f"{s.stand_in}/coco2017") if s.stand_in else {**v22["MINI"], "mini": True}
    steps = 3 * (s.rounds + 2)  # three of the functions below train, once a round and once when operations are counted
    return v22["Settings"](**place | dict(steps=steps, batch_size=s.batch, dtype=s.dtype, final_samples=s.pictures))


def set_up(v) -> World:
    """What V-2.2 trains with under the settings `v`, without a run's folder."""
    accelerator = start_accelerator(v.device)
    device, dtype = accelerator.device, pick_dtype(v.dtype, accelerator.device)
    torch.manual_seed(v.seed)
    data = draw_mini(ROOT / v.data) if v.mini else Path(v.data)
    train_set = CocoCaptions(data, v.train_split, v.resolution)
    val_set = CocoCaptions(data, v.val_split, v.resolution, limit=v.final_samples)
    teacher = load_teacher(from_root(v.teacher), device, dtype)
    config = student_config(teacher.unet, v.channels, v.layers, v.groups, v.mid_block)
    config["sample_size"] = teacher.latent_side(v.resolution)
    student = slice_unet(teacher.unet, config).to(device)
    if v.dtype == "auto" and multiplies_bf16(device):
        dtype = use_kernels(student, time_kernels(student, v.batch_size, teacher.tokenizer.model_max_length))
    cache = make_folder(ROOT / v.cache_folder, "--cache-folder")
    evaluator = Evaluator(v.features, val_set, teacher, cache, accelerator, sampling={}, workers=v.workers)
    pairs = TrainingPairs(train_set, teacher, cache, accelerator, batch_size=v.batch_size, seed=v.seed, caption_gb=v.cache_gb,
                          workers=v.workers)
    trainer = Trainer(accelerator, student, dtype=dtype, steps=v.steps, batch_size=v.batch_size, lr=v.lr, warmup=v.warmup,
                      weight_decay=v.weight_decay, max_grad_norm=v.max_grad_norm, ema_decay=v.ema_decay)
    return World(teacher, pairs, evaluator, trainer)


def steps_to_time(world: World, v) -> dict:
    """name: a function that makes one step of that kind."""
    teacher, pairs, trainer = world.teacher, world.pairs, world.trainer
    scheduler = teacher.noise_scheduler
    store = TeacherStore(pairs, lambda noisy, batch: predict_noise(teacher.unet, noisy, batch), [0.1], v.steps)
    count = iter(range(v.steps))
    fixed = pairs.draw(0, 0.1)

    def train(batches, kd=True):
        batch = batches.draw(next(count), 0.1)
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        with trainer.autocast():
            teacher_pred = batch.teacher_pred
            if kd and teacher_pred is None:
                with torch.no_grad():
                    teacher_pred = predict_noise(teacher.unet, noisy, batch)
            noise_pred = predict_noise(trainer.model, noisy, batch)
        loss = F.mse_loss(noise_pred, batch.noise)
        if kd:
            loss = loss + F.mse_loss(noise_pred, teacher_pred)
        trainer.step(loss)

    @torch.no_grad()
    def teacher_forward():
        with trainer.autocast():
            predict_noise(teacher.unet, fixed.latents, fixed)

    def student_both():
        with trainer.autocast():
            noise_pred = predict_noise(trainer.model, fixed.latents, fixed)
        F.mse_loss(noise_pred, fixed.noise).backward()
        trainer.student.zero_grad()  # a step begins without gradients too

    return {"teacher forward": teacher_forward, "student forward + backward": student_both, "KD step": lambda: train(pairs),
            "noise-only step": lambda: train(pairs, kd=False), "step from the store": lambda: train(store),
            "plain step": plain_step(world, v.batch_size)}


def plain_step(world: World, batch_size: int):
    """A KD step as a script writes it that encodes every step and asks the teacher with and without the caption."""
    teacher, trainer, dataset = world.teacher, world.trainer, world.pairs.dataset
    optimizer = torch.optim.AdamW(trainer.student.parameters(), lr=1e-4)
    indices = [i % len(dataset) for i in range(batch_size)]
    pixels = torch.stack([dataset[i] for i in indices])
    texts = [dataset.captions[i][0] for i in indices]

    def step():
        with torch.no_grad():
            latents = encode_images(teacher.vae, pixels).float()
            encoded = encode_captions(teacher.text_encoder, teacher.tokenizer, texts)
            empty = encode_captions(teacher.text_encoder, teacher.tokenizer, [""] * batch_size)
            noise, timesteps = torch.randn_like(latents), torch.randint(1000, (batch_size,), device=world.device)
            noisy = teacher.noise_scheduler.add_noise(latents, noise, timesteps)
            batch = Batch(latents, encoded.float(), noise, timesteps)
            with trainer.autocast():
                target = predict_noise(teacher.unet, noisy, batch)
                predict_noise(teacher.unet, noisy, batch._replace(encoder_hidden_states=empty.float()))
        with trainer.autocast():
            noise_pred = predict_noise(trainer.student, noisy, batch)
        (F.mse_loss(noise_pred, noise) + F.mse_loss(noise_pred, target)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def medians(functions: dict, rounds: int) -> dict[str, float]:
    """Seconds of each, from rounds that take turns; the first round warms up."""
    times = {name: [] for name in functions}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if number:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}


def sampling_to_time(world: World, v, count: int) -> tuple[dict, torch.Tensor, int]:
    """Sampling beside the usual way; what is drawn, and the largest difference between both ways' pictures."""
    from diffusers import DDIMScheduler

    teacher, student, captions = world.teacher, world.trainer.ema_student, world.evaluator.captions[:count]
    pipeline = teacher.pipeline(student, DDIMScheduler.from_config(teacher.noise_scheduler.config))

    def by_pipeline():
        with autocast(world.device, teacher.vae.dtype):  # the frozen weights', which `sampling` has too
            return pipeline(captions, num_inference_steps=5, guidance_scale=5.0, output_type="np",
                            generator=torch.Generator().manual_seed(0)).images

    def by_ours(dtype=torch.float32):
        with autocast(world.device, dtype):
            return sample(student, teacher, captions, sampler="ddim", steps=5, guidance=5.0, seed=0, size_px=v.resolution,
                          batch=count)[0]

    ours = by_ours()
    theirs = torch.from_numpy((by_pipeline() * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    difference = (ours.int() - theirs.int()).abs().max().item()
    functions = {"sampling": by_ours, "StableDiffusionPipeline": by_pipeline}
    if world.trainer.dtype != torch.float16:  # a CPU's operators take no mixture of both halves
        functions["sampling in bf16"] = lambda: by_ours(torch.bfloat16)
    return functions, ours, difference


def passes_to_time(world: World, v, count: int) -> dict:
    """A guided pass of either U-Net for `count` pictures, and one of drawing, which has the captions' keys and values."""
    side = world.teacher.latent_side(v.resolution)
    captions = world.evaluator.captions[:count]
    encoded = encode_captions(world.teacher.text_encoder, world.teacher.tokenizer, [""] * len(captions) + captions)
    z, functions = torch.randn(len(encoded), 4, side, side, device=world.device), {}
    for name, unet in (("student", world.trainer.ema_student), ("teacher", world.teacher.unet)):
        layers, kept = caption_layers(unet), {}

        @torch.no_grad()
        def whole(unet=unet):
            with world.trainer.autocast():
                unet(z.to(unet.dtype), 500, encoded.to(unet.dtype))

        def drawing(whole=whole, layers=layers, kept=kept):
            with computed_once(layers, kept):
                whole()

        functions |= {f"{name}, a whole pass": whole, f"{name}, a pass of drawing": drawing}
    return functions


def few_passes_to_time(world: World, v) -> dict:
    """Four pictures by the student in 4 passes, as V-4 draws, and by the teacher's stock pipeline in 25 guided steps, 50
    passes; the two parts that no student makes cheaper; and a tiny autoencoder's decoder, of TAESD's size, random weights."""
    from diffusers import AutoencoderTiny

    teacher, student, captions = world.teacher, world.trainer.ema_student, world.evaluator.captions[:4]
    pipeline = teacher.pipeline()
    side = teacher.latent_side(v.resolution)
    latents = torch.randn(len(captions), 4, side, side, generator=torch.Generator().manual_seed(0)).to(world.device)

    def by_the_teacher():
        pipeline(captions, num_inference_steps=25, guidance_scale=5.0, height=v.resolution, width=v.resolution)

    def by_the_student():
        sample(student, teacher, captions, sampler="ddim-trailing", steps=4, guidance=1.0, size_px=v.resolution)

    tiny = AutoencoderTiny().eval().to(world.device, teacher.vae.dtype)
    return {"student, 4 passes": by_the_student, "teacher's pipeline, 50 passes": by_the_teacher,
            "of both: text encoder": lambda: encode_captions(teacher.text_encoder, teacher.tokenizer, captions),
            "of both: decoder": lambda: decode_latents(teacher.vae, latents),
            "a tiny decoder": lambda: decode_latents(tiny, latents)}


def loading_to_time(dataset: CocoCaptions, size_px: int) -> dict:
    """Decoding of 1,024 files, beside the usual way."""
    repeated = copy.copy(dataset)
    repeated.files = [dataset.files[i % len(dataset)] for i in range(1024)]
    files = [repeated.path(i) for i in range(1024)]

    def by_pil():
        for file in files:
            with Image.open(file) as image:
                ImageOps.fit(image.convert("RGB"), (size_px, size_px), Image.Resampling.BICUBIC)

    return {"image loading": lambda: [load_image(file, size_px) for file in files],
            "image loading by workers": lambda: list(images(repeated, 128, os.cpu_count())),
            "plain PIL": by_pil}


def evaluation_to_time(world: World, drawn: torch.Tensor, folder: Path) -> dict:
    """FID, KID and the rest, beside pytorch-fid on folders of the same pictures."""
    from pytorch_fid.fid_score import calculate_fid_given_paths

    evaluator = world.evaluator
    real = [evaluator.dataset[i] for i in evaluator.usable[: len(drawn)]]
    for name, pictures in (("real", real), ("drawn", drawn)):
        (folder / name).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name / f"{i}.png")
    paths = [str(folder / "real"), str(folder / "drawn")]
    evaluator.score(drawn)  # the frozen side, paid once
    # the command without its start-up, which this process has had: importing torch would count against it
    return {"evaluation": lambda: evaluator.score(drawn),
            "pytorch_fid": lambda: calculate_fid_given_paths(paths, 50, world.device, 2048, 0)}


def peak(world: World, size: int = 2048) -> float:
    """Operations a second of a product of two matrices in the precision of a step."""
    a, b = torch.randn(2, size, size, device=world.device).to(world.trainer.dtype)
    return 2 * size**3 / medians({"peak": lambda: a @ b}, 10)["peak"]


def operations(functions: dict) -> dict[str, int]:
    """How many multiplications and additions of products and convolutions each function makes."""
    counts = {}
    for name, function in functions.items():
        with FlopCounterMode(display=False) as counter:
            function()
        counts[name] = counter.get_total_flops()
    return counts


def print_steps(t: dict[str, float], counts: dict[str, int], world: World, s: Settings):
    noise_floor = t["student forward + backward"]
    kd_floor = t["teacher forward"] + noise_floor
    floors = {"KD step": kd_floor, "plain step": kd_floor, "noise-only step": noise_floor, "step from the store": noise_floor}
    rows, most = {}, peak(world)
    for name, seconds in t.items():
        times_floor = seconds / floors[name] if name in floors else None
        rows[name] = {"seconds": seconds, "images/s": s.batch / seconds, "x its floor": times_floor,
                      "of the peak": f"{counts[name] / seconds / most:.0%}"}
    dtype = str(world.trainer.dtype).removeprefix("torch.")
    print(f"\n{torch.get_num_threads()} threads, {world.device.type}, {dtype}, batch {s.batch}; "
          f"peak {most / 1e9:,.0f} GFLOP/s\n{table(rows)}")
    print(f"KD step against the plain one: {t['plain step'] / t['KD step']:.2f} x faster\n"
          f"step from the store against the KD step: {t['KD step'] / t['step from the store']:.2f} x faster")


def main(s: Settings):
    there = not s.stand_in or (Path(s.stand_in) / "sd15").is_dir()
    require(there, f"{s.stand_in} is no stand-in; make it with python bench/stand_in.py --out {s.stand_in}")
    if s.stand_in:
        os.environ["TORCH_HOME"] = str(Path(s.stand_in).resolve() / "torch")
    v = v22_settings(s)
    world = set_up(v)
    steps = steps_to_time(world, v)
    print_steps(medians(steps, s.rounds), operations(steps), world, s)
    functions, drawn, difference = sampling_to_time(world, v, s.pictures)
    functions |= loading_to_time(world.pairs.dataset, v.resolution)
    with tempfile.TemporaryDirectory() as folder:
        if v.features == "inception":
            functions |= evaluation_to_time(world, drawn, Path(folder))
        t = medians(functions, s.rounds)
    print(table({name: {"seconds": seconds} for name, seconds in t.items()}))
    passes = medians(passes_to_time(world, v, s.pictures), s.rounds)
    print(table({name: {"seconds": seconds} for name, seconds in passes.items()}))
    few = medians(few_passes_to_time(world, v), min(3, s.rounds))
    print(table({name: {"seconds for 4 pictures": seconds} for name, seconds in few.items()}))
    t |= passes | few
    for ours, theirs in AGAINST.items():
        if ours in t:
            print(f"{ours} against {theirs}: {t[theirs] / t[ours]:.2f} x faster")
    print(f"largest difference to the pipeline's pictures, of 255: {difference}")


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, limits={name: (2, None) for name in ("batch", "rounds", "pictures")}))
