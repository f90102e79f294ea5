"""V-1: progressive DDPM schedule and layer-wise feature matching.

    python v1/1.py --mini        # the embedded world: offline, on a laptop CPU, in minutes
    python v1/1.py               # SD-1.5 and COCO 2017 at 64 px: a 65 M student

The chain of noise levels that is trained gets shorter from stage to stage, always spread over the whole range, until
only the timesteps are left that a 25-step sampler visits. The loss on a noisy latent x_t is
    d(student(x_t), noise) + feature_weight mean_k d(P_k f_k^student / s_k, f_k^teacher / s_k),
f_k being the output of block k, caught by a forward hook, s_k its channels' root mean squares in the teacher, and P_k a
`ConvProjection` (common/features.py), trained with the student and dropped in the end. The student's start and every
P_k come from one map of the student's channels into the teacher's. With `--progressive` the shortened stages learn by
progressive distillation instead: one DDIM step of the student does what two of the chain before did. It is then drawn in as
many of them as the last chain has.
With `--weigh-teacher`, the default, features count at each noise level as far as the teacher knows more than a blind guess.
"""

import bisect
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from common.cache import Batch, TrainingPairs
from common.coco import CocoCaptions
from common.features import StudentWithFeatures
from common.files import from_root, make_folder
from common.fitness import measure_fitness
from common.metrics import Evaluator
from common.mini import caption_scores
from common.precision import fastest_kernels, pick_dtype
from common.report import check_hub, finish, summary
from common.run import Run
from common.sampling import ddim_step
from common.settings import parse, require, start
from common.slicing import slice_unet, student_config
from common.teacher import DDPMScheduler, UNet2DConditionModel, load_teacher
from common.trainer import Trainer, due, predict_noise, start_accelerator
from data.draw_mini import draw_mini


@dataclass
class Settings:
    mini: bool = False  # the embedded world: the teacher in checkpoints/mini-teacher and drawn scenes, all offline
    teacher: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a pipeline folder or a hub id
    data: str = "data/coco2017"  # a folder in COCO's format, or own pictures with .txt, metadata.jsonl or .csv captions
    train_split: str = "train2017"  # <data>/<split>/ and annotations/captions_<split>.json
    val_split: str = "val2017"  # the split that evaluation takes its captions and pictures from
    val_share: float = 0.05  # share of own pictures, which have no splits, that is held out for evaluation
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
    target: Literal["epsilon", "x0", "v", "truncated"] = "epsilon"  # with --progressive: whose error counts
    # feature matching
    loss: Literal["mse", "smooth_l1"] = "mse"  # of the noise and of the features
    feature_weight: float = 0.1  # of the features' loss; 0: the teacher is not run at all
    weigh_teacher: bool = True  # believe the teacher at each noise level only as far as it knows more than a blind guess
    feature_blocks: tuple[str, ...] = ("down_blocks.0", "down_blocks.1.attentions.1", "up_blocks.0", "up_blocks.1")
    # evaluation
    features: Literal["inception", "effnet-lite0"] = "inception"  # inception: FID, LPIPS; effnet-lite0: the embedded world's
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # how pictures are drawn; --progressive: its last chain's DDIM steps
    sample_steps: int = 25  # of the sampler
    guidance: float = 5.0  # classifier-free guidance scale
    eval_every: int = 5_000  # steps between small evaluations; 0: none
    eval_samples: int = 500  # pictures of a small evaluation
    final_samples: int = 5_000  # pictures of the last one
    eval_batch: int = 100  # pictures sampled at a time
    # machine
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of the frozen parts and of autocast around the student
    compile: bool = False  # torch.compile the student: pays on long runs only; on a CPU it takes a C++ compiler
    cache: bool = True  # keep latents and caption embeddings; --no-cache encodes them at every step
    cache_folder: str = "data/cache"  # seen from the repository: it serves all runs, and holds the evaluations' frozen side too
    cache_gb: float = 20.0  # at most this much for caption embeddings; the rest are encoded on the fly
    workers: int = 2  # processes that decode pictures for the cache; 0: this one
    max_broken: float = 0.05  # share of the pictures that may be missing, without caption or undecodable
    max_bad_steps: int = 20  # steps in a row without finite gradients that end the run
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between lines of metrics.jsonl
    track: Literal["none", "tensorboard", "trackio", "wandb"] = "none"  # where losses, scores and sheets are logged too
    push_to_hub: str = ""  # a hub repository (user/name) to upload the student to in the end
    seed: int = 0  # of everything random


MINI = dict(  # the student is the teacher's outermost level, whole, and half of the next, as the real world's is
    teacher="checkpoints/mini-teacher", data="data/mini", train_split="train", val_split="val", resolution=32,
    out="checkpoints/v1-mini", channels=(64, 48), steps=300, lr=2e-3, ema_decay=0.99,
    features="effnet-lite0", guidance=3.0, eval_every=150, eval_samples=100, final_samples=1_000, cache_gb=0.5,
    workers=0, save_every=100,
)


LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


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


@torch.no_grad()
def two_step_target(unet, z: torch.Tensor, batch: Batch, stride: int, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The noise that makes one DDIM step from `batch.timesteps` to `batch.timesteps - stride` land where those of `unet` land
    in two (arXiv 2202.00512, section 3 and appendix G). The chain ends at timestep 0's noise, as Stable Diffusion's does.
    """
    def level(t):
        return alphas_cumprod[t.clamp(min=0)].view(-1, 1, 1, 1)

    middle, end = batch.timesteps - stride // 2, batch.timesteps - stride
    a, a_middle, a_end = level(batch.timesteps), level(middle), level(end)
    z_middle = ddim_step(z, predict_noise(unet, z, batch), a, a_middle)
    pred_middle = predict_noise(unet, z_middle, batch._replace(timesteps=middle.clamp(min=0)))
    z_end = ddim_step(z_middle, pred_middle, a_middle, a_end)
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
    falling = list(s.chains) == sorted(s.chains, reverse=True)
    in_range = s.chains and all(1 <= chain <= 1000 for chain in s.chains)
    require(in_range and falling, "--chains must lie in 1..1000 and not rise")
    require(all(1000 % chain == 0 for chain in s.chains), "--chains must divide 1000")
    halving = s.chains[-1] < 1000 and all(a == 2 * b for a, b in zip(s.chains, s.chains[1:]) if a < 1000)
    require(halving or not s.progressive, "--progressive needs chains that halve after the first that is shortened, such as "
            "--chains 1000,200,100,50,25")
    shares = len(s.stage_percent) == len(s.chains) and min(s.stage_percent) > 0
    require(shares, "--stage-percent must give each of --chains a share")
    accelerator = start_accelerator(s.device, track=s.track, out=s.out, compile=s.compile)
    dtype = pick_dtype(s.dtype, accelerator.device)
    run = Run(s.out, s, s.resume, accelerator)
    torch.manual_seed(s.seed)

    # data and teacher
    data = draw_mini(ROOT / s.data) if s.mini else Path(from_root(s.data))
    train_set = CocoCaptions(data, s.train_split, s.resolution, part=(s.val_share, 1), reach=s.steps * s.batch_size)
    val_set = CocoCaptions(data, s.val_split, s.resolution, limit=s.final_samples, part=(0, s.val_share))
    accelerator.print(f"data: {data}, captions in {val_set.format}")
    teacher = load_teacher(from_root(s.teacher), accelerator.device, dtype)
    check_hub(s.push_to_hub, accelerator, teacher, val_set)
    noise_scheduler = teacher.noise_scheduler

    # the student's start
    config = student_config(teacher.unet, s.channels, s.layers, s.groups, s.mid_block)
    config["sample_size"] = teacher.latent_side(s.resolution)
    student = UNet2DConditionModel(**config) if s.random_start else slice_unet(teacher.unet, config)
    student.to(accelerator.device)
    run.create(train_set.fingerprint() + val_set.fingerprint(), teacher.fingerprint(), dtype)

    # what is computed once: the evaluation's frozen side, latents and caption embeddings
    cache = make_folder(ROOT / s.cache_folder, "--cache-folder")
    sampling = dict(sampler=s.sampler, steps=s.sample_steps, guidance=s.guidance, seed=s.seed, size_px=s.resolution,
                    batch=s.eval_batch)
    more_scores = caption_scores(teacher.name, val_set, accelerator.device) if s.mini else None
    evaluator = Evaluator(s.features, val_set, teacher, cache, accelerator, sampling, max_broken=s.max_broken,
                          workers=s.workers, more_scores=more_scores)
    pairs = TrainingPairs(train_set, teacher, cache if s.cache else None, accelerator, batch_size=s.batch_size, seed=s.seed,
                          caption_gb=s.cache_gb, workers=s.workers, flip=s.flip, max_broken=s.max_broken)
    accelerator.print(summary(student, teacher, pairs, evaluator))

    alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)
    chains = [chain_timesteps(noise_scheduler, length) for length in s.chains]
    no_zero = all(chain[0] > 0 for chain in chains if len(chain) < len(alphas_cumprod))  # two steps from 0 lead nowhere
    require(no_zero or not s.progressive, "--progressive needs a teacher whose schedule leaves out timestep 0")
    starts = stage_starts(s.steps, s.stage_percent)
    loss_of, with_features, chain_before, also_saved = LOSSES[s.loss], None, None, {}
    if s.progressive:  # the student as the stage before left it
        chain_before = copy.deepcopy(student).eval().requires_grad_(False)
        also_saved["chain_before"] = chain_before
    if s.feature_weight:
        with_features = StudentWithFeatures(student, teacher.unet, s.feature_blocks, loss_of, pairs.empty)
    warning = ""
    if s.feature_weight or s.progressive:
        fitness = measure_fitness(teacher, evaluator)
        effect = "its features count less there" if s.weigh_teacher and not s.progressive else "it teaches what is wrong there"
        accelerator.print(fitness.describe(s.resolution, effect))
        run.log_once(**fitness._asdict())
        warning = fitness.warning(s.resolution, effect)
        knowledge = fitness.knowledge(noise_scheduler, s.weigh_teacher).to(accelerator.device)  # (timesteps,) in 0..1

    dtype = fastest_kernels(run, student, dtype, auto=s.dtype == "auto", steps=s.steps, batch_size=s.batch_size,
                            tokens=teacher.tokenizer.model_max_length)
    if s.compile:
        student.compile()
    trainer = Trainer(accelerator, student, with_features, dtype=dtype, steps=s.steps, batch_size=s.batch_size, lr=s.lr,
                      warmup=s.warmup, weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, ema_decay=s.ema_decay,
                      also_saved=also_saved)
    student_sampling, how = {}, {}  # where it draws in another way than the teacher, in our words and in the card's
    if s.progressive:  # it knows the last chain's steps alone
        student_sampling = {"sampler": "ddim", "steps": s.chains[-1]}
        how = {"sampler": "ddim", "inference": {"num_inference_steps": s.chains[-1], "guidance_scale": s.guidance}}
    first_step = trainer.restore(run.folder) if s.resume else 0
    run.begin("V-1", first_step)
    for step in range(first_step, s.steps):
        if due(step, s.eval_every) and step not in run.evaluated:
            run.record(step, evaluator.evaluate(trainer.ema_student, s.eval_samples, dtype, **student_sampling))

        stage = bisect.bisect(starts, step) - 1
        chain = chains[stage]
        if s.progressive and step == starts[stage]:
            chain_before.load_state_dict(trainer.ema_student.state_dict())
        batch = pairs.draw(step, s.caption_dropout, chain=chain)
        noisy = noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)  # sqrt(a_t) x_0 + sqrt(1 - a_t) noise

        with trainer.autocast():
            target, weight = batch.noise, torch.ones((), device=accelerator.device)
            if s.progressive and len(chain) < len(alphas_cumprod):
                before = teacher.unet if stage == 0 else chain_before
                stride = len(alphas_cumprod) // len(chain)
                target = two_step_target(before, noisy, batch, stride, alphas_cumprod)
                weight = epsilon_weight(s.target, alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1))
            if s.feature_weight:
                with torch.no_grad():
                    predict_noise(teacher.unet, noisy, batch)
                teacher_features = with_features.teacher_hooks.take()
                known = knowledge[batch.timesteps].view(-1, 1, 1, 1)
                noise_pred, feature_loss = trainer.model(
                    noisy, batch.timesteps, batch.encoder_hidden_states, teacher_features, known)
            else:
                noise_pred = predict_noise(trainer.model, noisy, batch)
                feature_loss = torch.zeros((), device=accelerator.device)
        noise_loss = (weight * loss_of(noise_pred, target, reduction="none")).mean()
        loss = noise_loss + s.feature_weight * feature_loss
        lr = trainer.lr
        trainer.step(loss)  # backward, clip, AdamW, OneCycleLR, EMA

        done = step + 1
        run.log_step(done, trainer, loss=loss, noise_loss=noise_loss, feature_loss=feature_loss, lr=lr, chain=len(chain))
        stopping = run.stop_requested(done)
        if stopping or due(done, s.save_every) or done == s.steps:
            run.save(trainer)
        if stopping:
            run.leave(done)

    evaluation = evaluator.evaluate(trainer.ema_student, s.final_samples, dtype, **student_sampling)
    run.record(s.steps, evaluation)
    if accelerator.is_main_process:
        finish(run.folder, "V-1", trainer.ema_student, teacher, evaluation, val_set,
               warning=warning, push_to_hub=s.push_to_hub, **how)
    accelerator.end_training()


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, MINI))
