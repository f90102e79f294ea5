"""V-2.2: distil a light student from Stable Diffusion by output KD with growing caption dropout.

    python v2/2.2.py --mini        # the embedded world: offline, on a laptop CPU, in minutes
    python v2/2.2.py               # SD-1.5 and COCO 2017 at 64 px: a 65 M student

The student starts as a slice of the teacher. Its loss on a noisy latent x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise is
    alpha MSE(student(x_t), teacher(x_t)) + (1 - alpha) MSE(student(x_t), noise),
alpha falling linearly from 1 to 0.5 over training, while captions are dropped more and more often (with a store of K
draws, in K steps), which teaches the unconditional half of classifier-free guidance. Latents and caption embeddings (as
many as `--cache-gb` holds) are computed once, before training, and so are the teacher's predictions, for `--store` K fixed
draws of every picture: its U-Net does not run in training.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from common.cache import TeacherStore
from common.settings import parse
from common.training import Learner, evaluate, finish, let_teacher_go, prepare


@dataclass
class Settings:
    mini: bool = False  # the embedded world: the teacher in checkpoints/mini-teacher and drawn scenes, all offline
    teacher: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a pipeline folder or a hub id
    data: str = "data/coco2017"  # a folder in COCO's format
    train_split: str = "train2017"  # <data>/<split>/ and annotations/captions_<split>.json
    val_split: str = "val2017"  # the split that evaluation takes its captions and pictures from
    resolution: int = 64  # pixels a side
    flip: bool = False  # mirror half of the pictures, whatever their captions say of left and right
    out: str = "checkpoints/v2.2"  # the run's folder
    resume: bool = False  # go on with the run in --out
    # the student
    channels: tuple[int, ...] = (320, 352)  # widths of the levels that stay, outermost first (SD-1.5's are 320,640,1280,1280)
    layers: int = 2  # resnets in a down block
    mid_block: bool = False  # keep the block below the innermost level
    groups: int = 0  # of every GroupNorm; 0: as many as the teacher has
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
    dropout_end: float = 0.2  # and at the last one, linear in between (with a store in as many steps as it has draws)
    store: int = 4  # draws of each picture whose teacher predictions are cached for all runs; 0: fresh draws
    ema_decay: float = 0.999  # of the weights' moving average, which is what is evaluated and saved; 0: none
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
    cache: bool = True  # keep latents and caption embeddings; --no-cache --store 0 encodes them at every step
    cache_folder: str = "data/cache"  # where: it serves all runs, and holds the evaluations' frozen side too
    cache_gb: float = 20.0  # at most this much for caption embeddings; the rest are encoded on the fly
    workers: int = 2  # processes that decode pictures for the cache; 0: this one
    max_broken: float = 0.05  # share of the pictures that may be missing, without caption or undecodable
    max_bad_steps: int = 20  # steps in a row without finite gradients that end the run
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between lines of metrics.jsonl
    seed: int = 0  # of everything random


MINI = dict(  # the student is the teacher's outermost level, whole
    teacher="checkpoints/mini-teacher", data="data/mini", train_split="train", val_split="val", resolution=32,
    out="checkpoints/v2.2-mini", channels=(64,), steps=1_000, store=1, lr=2e-3, ema_decay=0.99,
    features="effnet-lite0", guidance=3.0, eval_every=500, eval_samples=100, final_samples=1_000, cache_gb=0.5,
    workers=0, save_every=250,
)


def linear(start: float, end: float, step: float, steps: int) -> float:
    """`start` at step 0, `end` at the last step, steps - 1."""
    return start + (end - start) * step / max(1, steps - 1)


def main(s: Settings):
    world = prepare(s, {
        "--store must not be negative": s.store >= 0,
        "--store needs the cache: leave out --no-cache, or take fresh draws with --store 0": s.cache or not s.store,
        "--alpha-start and --alpha-end must lie in 0..1": all(0 <= a <= 1 for a in (s.alpha_start, s.alpha_end)),
        "--dropout-start and --dropout-end must lie in 0..1": all(0 <= d <= 1 for d in (s.dropout_start, s.dropout_end)),
    })
    student, device, noise_scheduler = world.student, world.device, world.teacher.noise_scheduler
    learner = Learner(world, s)
    store = None
    if s.store:  # the teacher is paid once, here or by an earlier run; each draw has the mean dropout of the part it serves
        rates = [linear(s.dropout_start, s.dropout_end, k + 0.5, s.store + 1) for k in range(s.store)]
        store = TeacherStore(world.pairs, world.teacher_pred, rates)
        if not world.run.begun:
            world.run.log(step=0, store_seconds=store.seconds)
        let_teacher_go(world, s)

    for step in world.run.steps(learner, s, "V-2.2", lambda step, count: evaluate(world, learner, step, count)):
        alpha = linear(s.alpha_start, s.alpha_end, step, s.steps)
        dropout = linear(s.dropout_start, s.dropout_end, step, s.steps)
        if store:
            (latents, hidden, noise, timesteps), teacher_pred = store.draw(step, s.steps, s.batch_size, s.seed)
            dropout = rates[store.serving(step, s.steps)]
        else:
            latents, hidden, noise, timesteps = world.pairs.draw(step, s.batch_size, dropout, s.seed)
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)  # sqrt(a_t) x_0 + sqrt(1 - a_t) noise

        with world.autocast():
            noise_pred = student(noisy, timesteps, hidden, return_dict=False)[0].float()
            kd_loss = torch.zeros((), device=device)
            if alpha > 0:
                if not store:  # the teacher's pass costs more than the student's step
                    teacher_pred = world.teacher_pred(noisy, timesteps, hidden)
                kd_loss = F.mse_loss(noise_pred, teacher_pred)
        noise_loss = F.mse_loss(noise_pred, noise)
        loss = alpha * kd_loss + (1 - alpha) * noise_loss

        world.run.report(loss=loss, kd_loss=kd_loss, noise_loss=noise_loss, lr=learner.lr, alpha=alpha, dropout=dropout)
        learner.step(loss, step)

    finish(world, learner, s, "V-2.2")


if __name__ == "__main__":
    main(parse(Settings, __doc__, MINI))
