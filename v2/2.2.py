"""V-2.2: distil a light student from Stable Diffusion by output KD with growing caption dropout.

    python v2/2.2.py --mini        # the embedded world: offline, on a laptop CPU, in minutes
    python v2/2.2.py               # SD-1.5 and COCO 2017 at 64 px: a 65 M student

The student starts as a slice of the teacher. Its loss on a noisy latent x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise is
    alpha MSE(student(x_t), teacher(x_t)) + (1 - alpha) MSE(student(x_t), noise),
alpha falling linearly from 1 to 0.5 over training, while captions are dropped more and more often, which teaches the
unconditional half of classifier-free guidance. Latents and caption embeddings are computed once, before training.
"""

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.cache import TrainingPairs
from common.coco import CocoCaptions
from common.ema import EMA
from common.metrics import FEATURES, Evaluator, load_reader
from common.run import Run, pick_device, pick_dtype, save_student, table
from common.sampling import SAMPLERS, sample
from common.settings import check, parse
from common.teacher import load_teacher, slice_unet, student_config
from data.draw_mini import draw_mini


@dataclass
class Settings:
    mini: bool = False  # the embedded world: the teacher in checkpoints/mini-teacher and drawn scenes, all offline
    teacher: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a pipeline folder or a hub id
    data: str = "data/coco2017"  # a folder in COCO's format
    train_split: str = "train2017"  # <data>/<split>/ and annotations/captions_<split>.json
    val_split: str = "val2017"  # the split that evaluation takes its captions and pictures from
    resolution: int = 64  # pixels a side
    out: str = "checkpoints/v2.2"  # the run's folder
    resume: bool = False  # go on with the run in --out
    # the student
    channels: tuple[int, ...] = (160, 288, 320)  # width of each level; fewer levels keep the teacher's outer ones
    layers: int = 2  # resnets in a down block
    random_start: bool = False  # start from random weights, not from the teacher's slice (the baseline)
    # training
    steps: int = 60_000  # optimizer steps
    batch_size: int = 64  # pictures a step
    lr: float = 2e-4  # OneCycleLR's highest learning rate
    warmup: float = 0.05  # share of the steps in which it rises
    weight_decay: float = 0.01  # AdamW's
    max_grad_norm: float = 1.0  # gradients longer than this are shortened to it
    alpha_start: float = 1.0  # weight of the KD term at the first step
    alpha_end: float = 0.5  # and at the last one, linear in between
    dropout_start: float = 0.05  # share of captions replaced by the empty one at the first step
    dropout_end: float = 0.2  # and at the last one, linear in between
    ema_decay: float = 0.999  # of the weights' moving average, which is what is evaluated and saved
    # evaluation
    features: str = "inception"  # inception (FID, LPIPS) or effnet-lite0 (the embedded world's own names)
    sampler: str = "ddpm"  # ddpm or ddim
    sample_steps: int = 25  # of the sampler
    guidance: float = 5.0  # classifier-free guidance scale
    eval_every: int = 5_000  # steps between small evaluations; 0: none
    eval_samples: int = 500  # pictures of a small evaluation
    final_samples: int = 5_000  # pictures of the last one
    eval_batch: int = 100  # pictures sampled at a time
    # machine
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: str = "auto"  # of autocast: auto, fp32, fp16 or bf16
    cache: bool = True  # keep latents and caption embeddings in data/cache; --no-cache encodes them at every step
    cache_gb: float = 20.0  # at most this much for caption embeddings; the rest are encoded on the fly
    workers: int = 0  # processes that decode pictures
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between lines of metrics.jsonl
    seed: int = 0  # of everything random


MINI = dict(
    teacher="checkpoints/mini-teacher", data="data/mini", train_split="train", val_split="val", resolution=32,
    out="checkpoints/v2.2-mini", channels=(16, 32, 32, 48), steps=900, batch_size=64, lr=2e-3, ema_decay=0.99,
    features="effnet-lite0", guidance=3.0, eval_every=450, eval_samples=100, final_samples=1_000, cache_gb=0.5,
    save_every=300,
)


def linear(start: float, end: float, step: int, steps: int) -> float:
    """`start` at step 0, `end` at the last step, steps - 1."""
    return start + (end - start) * step / max(1, steps - 1)


def main(s: Settings):
    check({
        "--steps, --batch-size, --eval-samples and --final-samples must be at least 2":
            min(s.steps, s.batch_size, s.eval_samples, s.final_samples) >= 2,
        "--lr must be positive": s.lr > 0,
        "--alpha-start and --alpha-end must lie in 0..1": all(0 <= a <= 1 for a in (s.alpha_start, s.alpha_end)),
        "--dropout-start and --dropout-end must lie in 0..1": all(0 <= d <= 1 for d in (s.dropout_start, s.dropout_end)),
        "--warmup must lie between 0 and 1": 0 < s.warmup < 1,
        f"--sampler must be one of {', '.join(SAMPLERS)}": s.sampler in SAMPLERS,
        f"--features must be one of {', '.join(FEATURES)}": s.features in FEATURES,
        "--dtype must be auto, fp32, fp16 or bf16": s.dtype in ("auto", "fp32", "fp16", "bf16"),
    })
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    torch.manual_seed(s.seed)

    # --- data and teacher -------------------------------------------------------------------------------------------
    data, teacher_name = Path(s.data), s.teacher
    if s.mini:
        data = draw_mini(ROOT / s.data)
        teacher_name = str(ROOT / s.teacher) if (ROOT / s.teacher).is_dir() else s.teacher
    train_set = CocoCaptions(data, s.train_split, s.resolution)
    val_set = CocoCaptions(data, s.val_split, s.resolution, limit=s.final_samples)
    teacher = load_teacher(teacher_name, device, dtype if device.type == "cuda" else torch.float32)
    check({f"--resolution must be a multiple of {8 * teacher.vae_factor}": s.resolution % (8 * teacher.vae_factor) == 0})
    config = student_config(teacher.unet, s.channels, s.layers)
    run = Run(s.out, s, s.resume)
    cache = ROOT / "data" / "cache"
    pairs = TrainingPairs(train_set, teacher, cache if s.cache else None, caption_gb=s.cache_gb, device=device,
                          workers=s.workers)
    skipped = ", ".join(f"{n} {why}" for why, n in train_set.skipped.items() if n)
    print(f"{len(pairs):,} training pictures" + (f" (left out: {skipped})" if skipped else ""))

    # --- student ----------------------------------------------------------------------------------------------------
    if s.random_start:
        student = type(teacher.unet)(**config)
    else:
        student = slice_unet(teacher.unet, config)
    student.to(device).train()
    for model in (student, teacher.unet):
        model.to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in student.parameters())
    teacher_parameters = sum(p.numel() for p in teacher.unet.parameters())
    print(f"student: {parameters / 1e6:.2f} M parameters, {parameters / teacher_parameters:.1%} of the teacher's U-Net")
    optimizer = torch.optim.AdamW(student.parameters(), lr=s.lr, weight_decay=s.weight_decay, fused=device.type != "mps")
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, total_steps=s.steps, pct_start=s.warmup)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ema = EMA(student, s.ema_decay)

    # --- resume -----------------------------------------------------------------------------------------------------
    start, state = 0, run.load() if s.resume else None
    if state:
        start = state["step"]
        student.load_state_dict(state["student"])
        for average, saved in zip(ema.shadow, state["ema"]):
            average.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        scaler.load_state_dict(state["scaler"])
        print(f"going on at step {start:,}")

    def checkpoint(step: int):
        run.save({"step": step, "student": student.state_dict(), "ema": ema.shadow, "optimizer": optimizer.state_dict(),
                  "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict()})

    # --- evaluation -------------------------------------------------------------------------------------------------
    evaluator = Evaluator(s.features, val_set, teacher, cache, device, load_reader(teacher_name) if s.mini else None)
    how = dict(sampler=s.sampler, steps=s.sample_steps, guidance=s.guidance, seed=s.seed, size_px=s.resolution,
               batch=s.eval_batch)

    def evaluate(step: int, count: int) -> tuple[dict, dict]:
        """(teacher's row, student's row); logs it and writes the sheet and the curves."""
        count = min(count, len(val_set))
        wanted, teacher_row = evaluator.teacher_side(count, how)
        ema.swap(student)
        drawn, seconds = sample(student.eval(), teacher, evaluator.captions[:count], progress="student's pictures", **how)
        ema.swap(student.train())
        row = {"parameters": parameters, **evaluator.score(drawn, wanted), "seconds an image": seconds}
        run.log(step=step, evaluation=row)
        run.sheet(step, {"teacher": wanted, "student": drawn}, evaluator.captions)
        run.curves()
        return teacher_row, row

    # --- training ---------------------------------------------------------------------------------------------------
    alphas_cumprod = teacher.noise_scheduler.alphas_cumprod.to(device)
    per_epoch = len(pairs) // s.batch_size
    check({f"--batch-size {s.batch_size} is more than the {len(pairs)} training pictures": per_epoch > 0})
    stop = []

    def on_signal(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    began, done = time.time(), start
    with tqdm(total=s.steps, initial=start, desc="V-2.2", unit="step") as bar:
        for step in range(start, s.steps):
            # every random draw of step i comes from (seed, i), so that a resumed run repeats the unbroken one
            epoch, place = divmod(step, per_epoch)
            if step == start or place == 0:
                order = np.random.default_rng([s.seed, epoch]).permutation(len(pairs))
            rng = np.random.default_rng([s.seed, 1, step])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            alpha = linear(s.alpha_start, s.alpha_end, step, s.steps)
            dropout = linear(s.dropout_start, s.dropout_end, step, s.steps)

            indices = order[place * s.batch_size : (place + 1) * s.batch_size]
            choices = np.where(rng.random(len(indices)) < dropout, -1, rng.integers(0, 60, len(indices)))
            latents, encoder_hidden_states = pairs.batch(indices, choices)  # (B, 4, h, w), (B, tokens, width)
            noise = torch.randn(latents.shape, generator=generator).to(device)
            timesteps = torch.randint(len(alphas_cumprod), (len(latents),), generator=generator).to(device)
            a = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            noisy = a.sqrt() * latents + (1 - a).sqrt() * noise

            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                noise_pred = student(noisy, timesteps, encoder_hidden_states, return_dict=False)[0].float()
                kd_loss = torch.zeros((), device=device)
                if alpha > 0:  # the teacher's pass costs more than the student's step
                    with torch.no_grad():
                        target = teacher.unet(noisy.to(teacher.unet.dtype), timesteps,
                                              encoder_hidden_states.to(teacher.unet.dtype), return_dict=False)[0]
                    kd_loss = F.mse_loss(noise_pred, target.float())
            noise_loss = F.mse_loss(noise_pred, noise)
            loss = alpha * kd_loss + (1 - alpha) * noise_loss

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(student.parameters(), s.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            ema.update(student, step)

            done = step + 1
            bar.update()
            if done % s.log_every == 0 or done == s.steps:
                speed = (done - start) * s.batch_size / (time.time() - began)
                run.log(step=done, loss=loss.item(), kd_loss=kd_loss.item(), noise_loss=noise_loss.item(), lr=lr,
                        alpha=alpha, dropout=dropout, images_per_s=speed)
                bar.set_postfix(loss=f"{loss.item():.4f}", images_per_s=f"{speed:.0f}")
            if stop or done % s.save_every == 0 or done == s.steps:
                checkpoint(done)
            if stop:
                bar.close()
                print(f"stopped at step {done:,}; go on with --resume")
                raise SystemExit(128 + stop[0])
            if s.eval_every and done % s.eval_every == 0 and done < s.steps:
                paused = time.time()
                _, row = evaluate(done, s.eval_samples)
                began += time.time() - paused
                bar.write(f"step {done:,}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "parameters"))

    # --- the result -------------------------------------------------------------------------------------------------
    teacher_row, row = evaluate(s.steps, s.final_samples)
    ema.swap(student)
    save_student(student.eval(), teacher, run.folder / "student")
    print(f"\nThe student lies in {run.folder / 'student'}, samples and curves beside it. {s.sample_steps} {s.sampler.upper()} "
          f"steps at guidance {s.guidance:g}:\n")
    print(table({"teacher": teacher_row, "student": row}))


if __name__ == "__main__":
    main(parse(Settings, __doc__, MINI))
