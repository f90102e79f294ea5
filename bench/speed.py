"""How far a training step is from its floor, and what the shortcuts bring, on this machine.

    python bench/stand_in.py --out stand-in           # once: true sizes, random weights
    python bench/speed.py --stand-in stand-in         # SD-1.5's size
    python bench/speed.py                             # the embedded world

Every line is a ratio of medians from interleaved rounds of one run. The floor of a KD step is one teacher forward and
one student forward and backward, alone; of a noise-only step the student's part.
"""

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from common.cache import TeacherStore
from common.coco import load_image, pictures
from common.run import table
from common.sampling import encode_captions, encode_pictures, sample
from common.settings import check, parse
from common.training import Learner, prepare


@dataclass
class Settings:
    stand_in: str = ""  # the folder that bench/stand_in.py made; empty: the embedded world
    batch: int = 16  # pictures a step
    rounds: int = 5  # of every measurement
    pictures: int = 16  # sampled and evaluated
    dtype: str = "fp32"  # of autocast: fp32, fp16 or bf16


def v22_settings(s: Settings, out: str):
    spec = importlib.util.spec_from_file_location("v22", ROOT / "v2" / "2.2.py")
    v22 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(v22)
    place = dict(teacher=f"{s.stand_in}/sd15", data=f"{s.stand_in}/coco2017") if s.stand_in else {**v22.MINI, "mini": True}
    return v22.Settings(**place | dict(out=out, batch_size=s.batch, dtype=s.dtype, final_samples=s.pictures, eval_samples=2))


def steps_to_time(world, v, s: Settings) -> dict:
    """name: a function that makes one step of that kind."""
    device, scheduler = world.device, world.teacher.noise_scheduler
    learner = Learner(world, v)
    plain_optimizer = torch.optim.AdamW(world.student.parameters(), lr=1e-4)
    store = TeacherStore(world.pairs, world.teacher_pred, [0.1])
    dataset = world.pairs.dataset
    pixels = torch.stack([dataset[i % len(dataset)] for i in range(s.batch)])
    texts = [dataset.captions[i % len(dataset)][0] for i in range(s.batch)]
    count = iter(range(10**9))

    def train(stored=None, kd=True):
        step = next(count) % v.steps
        batch = stored[0] if stored else world.pairs.draw(step, s.batch, 0.1, 0)
        latents, hidden, noise, timesteps = batch
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with world.autocast():
            pred = world.student(noisy, timesteps, hidden, return_dict=False)[0].float()
            loss = F.mse_loss(pred, noise)
            if kd:
                loss = loss + F.mse_loss(pred, stored[1] if stored else world.teacher_pred(noisy, timesteps, hidden))
        learner.step(loss, step)

    def plain():
        """As a script writes it that encodes every step and asks the teacher with and without the caption."""
        with torch.no_grad():
            latents = encode_pictures(world.teacher.vae, pixels).float()
            hidden = encode_captions(world.teacher.text_encoder, world.teacher.tokenizer, texts).float()
            empty = encode_captions(world.teacher.text_encoder, world.teacher.tokenizer, [""] * s.batch).float()
            noise, timesteps = torch.randn_like(latents), torch.randint(1000, (s.batch,), device=device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            with world.autocast():
                target = world.teacher_pred(noisy, timesteps, hidden)
                world.teacher_pred(noisy, timesteps, empty)
        with world.autocast():
            pred = world.student(noisy, timesteps, hidden, return_dict=False)[0].float()
        plain_optimizer.zero_grad()
        (F.mse_loss(pred, noise) + F.mse_loss(pred, target)).backward()
        plain_optimizer.step()

    fixed = world.pairs.draw(0, s.batch, 0.1, 0)

    def teacher_forward():
        with world.autocast():
            world.teacher_pred(fixed.latents, fixed.timesteps, fixed.hidden)

    def student_both():
        with world.autocast():
            pred = world.student(fixed.latents, fixed.timesteps, fixed.hidden, return_dict=False)[0].float()
        F.mse_loss(pred, fixed.noise).backward()

    return {"teacher forward": teacher_forward, "student forward + backward": student_both, "KD step": train,
            "noise-only step": lambda: train(kd=False),
            "step from the store": lambda: train(store.draw(next(count) % v.steps, v.steps, s.batch, 0)), "plain step": plain}


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


def others_to_time(world, v, s: Settings, folder: Path) -> tuple[dict, dict]:
    """Sampling, loading and evaluation, each beside the usual way; and checks that both give the same."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    teacher, captions = world.teacher, world.evaluator.captions[: s.pictures]
    student = world.student.eval()
    pipeline = StableDiffusionPipeline(
        vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=student, feature_extractor=None,
        scheduler=DDIMScheduler.from_config(teacher.noise_scheduler.config), safety_checker=None,
        requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    how = dict(sampler="ddim", steps=5, guidance=5.0, seed=0, size_px=v.resolution, batch=s.pictures)

    def by_pipeline():
        with world.autocast():
            return pipeline(captions, num_inference_steps=5, guidance_scale=5.0, output_type="np",
                            generator=torch.Generator().manual_seed(0)).images

    ours = sample(student, teacher, captions, **how)[0]
    theirs = torch.from_numpy((by_pipeline() * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    facts = {"largest difference to the pipeline's pictures, of 255": (ours.int() - theirs.int()).abs().max().item()}
    dataset = world.pairs.dataset
    repeated = torch.utils.data.Subset(dataset, [i % len(dataset) for i in range(1024)])
    files = [dataset.root / dataset.split / dataset.files[i] for i in repeated.indices]

    def by_ours(dtype):
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            return sample(student, teacher, captions, **how)

    def by_pil():
        for file in files:
            with Image.open(file) as image:
                ImageOps.fit(image.convert("RGB"), (v.resolution,) * 2, Image.Resampling.BICUBIC)

    functions = {
        "sampling": lambda: by_ours(torch.float32), "sampling in bf16": lambda: by_ours(torch.bfloat16),
        "StableDiffusionPipeline": by_pipeline,
        "image loading": lambda: [load_image(file, v.resolution) for file in files],
        "image loading by workers": lambda: list(pictures(repeated, 128, os.cpu_count())), "plain PIL": by_pil}
    if v.features == "inception":
        from pytorch_fid.fid_score import calculate_fid_given_paths

        reals = [world.evaluator.dataset[i] for i in range(s.pictures)]
        for name, found in (("real", reals), ("drawn", ours)):
            (folder / name).mkdir()
            for i, picture in enumerate(found):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name / f"{i}.png")
        world.evaluator.score(ours)  # the frozen side, paid once
        # the command without its start-up, which this process has had: importing torch would count against it
        functions |= {"evaluation": lambda: world.evaluator.score(ours), "pytorch_fid": lambda: calculate_fid_given_paths(
            [str(folder / "real"), str(folder / "drawn")], 50, world.device, 2048, 0)}
    return functions, facts


def main(s: Settings):
    check({f"{s.stand_in} is no stand-in; make it with python bench/stand_in.py --out {s.stand_in}":
               not s.stand_in or (Path(s.stand_in) / "sd15").is_dir(),
           "--batch, --rounds and --pictures must be at least 2": min(s.batch, s.rounds, s.pictures) >= 2})
    if s.stand_in:
        os.environ["TORCH_HOME"] = str(Path(s.stand_in).resolve() / "torch")
    with tempfile.TemporaryDirectory() as folder:
        v = v22_settings(s, f"{folder}/run")
        world = prepare(v)
        t = medians(steps_to_time(world, v, s), s.rounds)
        kd_floor, noise_floor = t["teacher forward"] + t["student forward + backward"], t["student forward + backward"]
        rows = {name: {"seconds": seconds, "images/s": s.batch / seconds, "x its floor": {
            "KD step": seconds / kd_floor, "plain step": seconds / kd_floor}.get(
                name, seconds / noise_floor if "step" in name else None)} for name, seconds in t.items()}
        print(f"\n{torch.get_num_threads()} threads, {world.device.type}, {s.dtype}, batch {s.batch}\n{table(rows)}")
        print(f"KD step against the plain one: {t['plain step'] / t['KD step']:.2f} x faster\n"
              f"step from the store against the KD step: {t['KD step'] / t['step from the store']:.2f} x faster")
        functions, facts = others_to_time(world, v, s, Path(folder))
        t = medians(functions, s.rounds)
        print(table({name: {"seconds": seconds} for name, seconds in t.items()}))
        for ours, theirs in (("sampling", "StableDiffusionPipeline"), ("sampling in bf16", "StableDiffusionPipeline"),
                             ("image loading", "plain PIL"), ("image loading by workers", "plain PIL"),
                             ("evaluation", "pytorch_fid")):
            if ours in t:
                print(f"{ours} against {theirs}: {t[theirs] / t[ours]:.2f} x faster")
        for what, value in facts.items():
            print(f"{what}: {value}")


if __name__ == "__main__":
    main(parse(Settings, __doc__))
