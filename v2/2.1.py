"""V-2.1: a light Stable Diffusion student from the teacher's sliced weights, trained on plain noise prediction.

    python v2/2.1.py --mini        # the embedded world: offline, on a laptop CPU, in minutes
    python v2/2.1.py               # SD-1.5 and COCO 2017 at 64 px: a 65 M student

The student starts as a slice of the teacher. Its loss on a noisy latent x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise is
MSE(student(x_t), noise), the loss of DDPM (arXiv 2006.11239). The teacher's U-Net leaves memory before training; its
autoencoder and text encoder have made the latents and as many caption embeddings as `--cache-gb` holds by then.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch.nn.functional as F

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
    out: str = "checkpoints/v2.1"  # the run's folder
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
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
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
    cache: bool = True  # keep latents and caption embeddings; --no-cache encodes them at every step
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
    out="checkpoints/v2.1-mini", channels=(64,), steps=1_000, lr=2e-3, ema_decay=0.99,
    features="effnet-lite0", guidance=3.0, eval_every=500, eval_samples=100, final_samples=1_000, cache_gb=0.5,
    workers=0, save_every=250,
)


def main(s: Settings):
    world = prepare(s, {"--caption-dropout must lie in 0..1": 0 <= s.caption_dropout <= 1})
    student, noise_scheduler = world.student, world.teacher.noise_scheduler
    learner = Learner(world, s)
    let_teacher_go(world, s)

    for step in world.run.steps(learner, s, "V-2.1", lambda step, count: evaluate(world, learner, step, count)):
        latents, hidden, noise, timesteps = world.pairs.draw(step, s.batch_size, s.caption_dropout, s.seed)
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)  # sqrt(a_t) x_0 + sqrt(1 - a_t) noise

        with world.autocast():
            noise_pred = student(noisy, timesteps, hidden, return_dict=False)[0].float()
        loss = F.mse_loss(noise_pred, noise)

        world.run.report(loss=loss, lr=learner.lr)
        learner.step(loss, step)

    finish(world, learner, s, "V-2.1")


if __name__ == "__main__":
    main(parse(Settings, __doc__, MINI))
