"""V-1: progressive DDPM schedule and layer-wise feature matching.

    python v1/1.py --mini        # the embedded world: offline, on a laptop CPU, in minutes
    python v1/1.py               # SD-1.5 and COCO 2017 at 64 px: a 65 M student

The chain of noise levels that is trained gets shorter from stage to stage, always spread over the whole range, until
only the timesteps are left that a 25-step sampler visits. The loss on a noisy latent x_t is
    d(student(x_t), noise) + feature_weight mean_k d(P_k f_k^student / s_k, f_k^teacher / s_k),
f_k being the output of block k, caught by a forward hook, s_k its root mean square in the teacher, and P_k a
`ConvProjection` (common/features.py), trained with the student and dropped in the end. The student's start and every
P_k come from one map of the student's channels into the teacher's. With `--progressive` the shortened stages learn by
progressive distillation instead: one student step does what two steps of the chain before did.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from common.features import match_features
from common.settings import parse
from common.training import Learner, evaluate, finish, prepare


@dataclass
class Settings:
    mini: bool = False  # the embedded world: the teacher in checkpoints/mini-teacher and drawn scenes, all offline
    teacher: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a pipeline folder or a hub id
    data: str = "data/coco2017"  # a folder in COCO's format
    train_split: str = "train2017"  # <data>/<split>/ and annotations/captions_<split>.json
    val_split: str = "val2017"  # the split that evaluation takes its captions and pictures from
    resolution: int = 64  # pixels a side
    flip: bool = False  # mirror half of the pictures, whatever their captions say of left and right
    out: str = "checkpoints/v1"  # the run's folder
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
    # the progressive schedule
    chains: tuple[int, ...] = (1000, 250, 125, 50, 25)  # steps of the DDPM chain in each stage, over the whole noise range
    stage_percent: tuple[int, ...] = (60, 10, 10, 10, 10)  # share of the training steps that each stage takes
    progressive: bool = False  # two steps of the chain before become one (arXiv 2202.00512) in every shortened stage
    target: str = "epsilon"  # with --progressive, whose error is minimised: epsilon, x0, v, or truncated (max(SNR, 1))
    # feature matching
    loss: str = "mse"  # mse or smooth_l1, of the noise and of the features
    feature_weight: float = 0.1  # of the features' loss; 0: the teacher is not run at all
    feature_blocks: tuple[str, ...] = ("down_blocks.0", "down_blocks.1.attentions.1", "up_blocks.0", "up_blocks.1")
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
    out="checkpoints/v1-mini", channels=(64,), steps=1_000, lr=2e-3, ema_decay=0.99,
    feature_blocks=("down_blocks.0.attentions.0", "down_blocks.0.attentions.1", "up_blocks.0.attentions.0", "up_blocks.0"),
    features="effnet-lite0", guidance=3.0, eval_every=500, eval_samples=100, final_samples=1_000, cache_gb=0.5,
    workers=0, save_every=250,
)


LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
TARGETS = ("epsilon", "x0", "v", "truncated")


# --- the progressive schedule ---------------------------------------------------------------------------------------


def chain_timesteps(noise_scheduler: DDPMScheduler, length: int) -> torch.Tensor:
    """(length,) rising timesteps of a chain: those that the sampler visits when it is given `length` steps.

    The spacing is the noise schedule's own (`timestep_spacing`, `steps_offset`), over the whole range, never a prefix.
    """
    whole = noise_scheduler.config.num_train_timesteps
    if length == whole:
        return torch.arange(whole)
    scheduler = DDPMScheduler.from_config(noise_scheduler.config)
    scheduler.set_timesteps(length)
    return scheduler.timesteps.flip(0).clamp(max=whole - 1)


def stage_starts(steps: int, percent: tuple[int, ...]) -> list[int]:
    """The first training step of each stage."""
    return [steps * sum(percent[:k]) // sum(percent) for k in range(len(percent))]


def ddim_step(z: torch.Tensor, noise_pred: torch.Tensor, a: torch.Tensor, a_next: torch.Tensor) -> torch.Tensor:
    """DDIM's deterministic step (arXiv 2010.02502, eq. 12, eta = 0) between two cumulative alphas."""
    x0 = (z - (1 - a).sqrt() * noise_pred) / a.sqrt()
    return a_next.sqrt() * x0 + (1 - a_next).sqrt() * noise_pred


@torch.no_grad()
def two_step_target(predict, z: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor, stride: int,
                    alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The noise that makes one DDIM step from `timesteps` to `timesteps - stride` land where `predict(z, t, hidden)` lands
    in two (arXiv 2202.00512, section 3 and appendix G). The chain ends at timestep 0's noise, as Stable Diffusion's does.
    """
    def level(t):
        return alphas_cumprod[t.clamp(min=0)].view(-1, 1, 1, 1)

    middle, end = timesteps - stride // 2, timesteps - stride
    a, a_middle, a_end = level(timesteps), level(middle), level(end)
    z_middle = ddim_step(z, predict(z, timesteps, hidden), a, a_middle)
    z_end = ddim_step(z_middle, predict(z_middle, middle.clamp(min=0), hidden), a_middle, a_end)
    ratio = ((1 - a_end) / (1 - a)).sqrt()
    x0 = (z_end - ratio * z) / (a_end.sqrt() - ratio * a.sqrt())
    return (z - a.sqrt() * x0) / (1 - a).sqrt()


def epsilon_weight(target: str, a: torch.Tensor) -> torch.Tensor:
    """What the squared error of epsilon is multiplied with to be that of `target`, SNR = a / (1 - a): x0 = error / SNR,
    v = error (1 + 1 / SNR), and `truncated` the loss max(SNR, 1) |x0 error|^2."""
    inverse_snr = (1 - a) / a
    return {"epsilon": torch.ones_like(a), "x0": inverse_snr, "v": 1 + inverse_snr,
            "truncated": inverse_snr.clamp(min=1)}[target]


# --- training -------------------------------------------------------------------------------------------------------


def main(s: Settings):
    world = prepare(s, {
        "--caption-dropout must lie in 0..1": 0 <= s.caption_dropout <= 1,
        "--feature-weight must not be negative": s.feature_weight >= 0,
        f"--loss must be one of {', '.join(LOSSES)}": s.loss in LOSSES,
        f"--target must be one of {', '.join(TARGETS)}": s.target in TARGETS,
        "--chains must lie in 1..1000 and not rise": all(1 <= c <= 1000 for c in s.chains)
            and list(s.chains) == sorted(s.chains, reverse=True),
        "--chains must divide 1000": all(1000 % c == 0 for c in s.chains),
        "--progressive needs chains that halve after the first that is shortened, such as --chains 1000,200,100,50,25":
            not s.progressive or all(a == 2 * b for a, b in zip(s.chains, s.chains[1:]) if a < 1000),
        "--stage-percent must give each of --chains a share": len(s.stage_percent) == len(s.chains)
            and min(s.stage_percent) > 0,
    })
    teacher, student, device = world.teacher, world.student, world.device
    noise_scheduler, loss_of = teacher.noise_scheduler, LOSSES[s.loss]
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(device)
    chains = [chain_timesteps(noise_scheduler, length) for length in s.chains]
    starts = stage_starts(s.steps, s.stage_percent)

    extra = torch.nn.ModuleDict()  # checkpointed with the student, not kept
    if s.progressive:  # the student as the stage before left it
        extra["chain_before"] = copy.deepcopy(student).requires_grad_(False)
    if s.feature_weight:
        extra["matching"] = matching = match_features(world, s.feature_blocks, loss_of)
    learner = Learner(world, s, extra)

    for step in world.run.steps(learner, s, "V-1", lambda step, count: evaluate(world, learner, step, count)):
        stage = max(k for k, first in enumerate(starts) if first <= step)
        chain, halve = chains[stage], s.progressive and 2 * s.chains[stage] <= len(alphas_cumprod)
        if s.progressive and step == starts[stage]:
            with learner.ema.applied(student):
                extra["chain_before"].load_state_dict(student.state_dict())

        latents, hidden, noise, timesteps = world.pairs.draw(step, s.batch_size, s.caption_dropout, s.seed, chain=chain)
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)

        with world.autocast():
            noise_pred = student(noisy, timesteps, hidden, return_dict=False)[0].float()
            feature_loss, target, weight = torch.zeros((), device=device), noise, torch.ones((), device=device)
            if s.feature_weight:
                world.teacher_pred(noisy, timesteps, hidden)
                feature_loss = matching()
            if halve:
                predict = world.teacher_pred if stage == 0 else lambda *of: extra["chain_before"](*of).sample.float()
                target = two_step_target(predict, noisy, timesteps, hidden, len(alphas_cumprod) // s.chains[stage],
                                         alphas_cumprod)
                weight = epsilon_weight(s.target, alphas_cumprod[timesteps].view(-1, 1, 1, 1))
        noise_loss = (weight * loss_of(noise_pred, target, reduction="none")).mean()
        loss = noise_loss + s.feature_weight * feature_loss

        world.run.report(loss=loss, noise_loss=noise_loss, feature_loss=feature_loss, lr=learner.lr, chain=len(chain))
        learner.step(loss, step)

    finish(world, learner, s, "V-1")


if __name__ == "__main__":
    main(parse(Settings, __doc__, MINI))
