"""V-2.2: distil a light student from Stable Diffusion by output KD with growing caption dropout.

    python v2/2.2.py --mini        # the embedded world: offline, on a laptop CPU, in minutes
    python v2/2.2.py               # SD-1.5 and COCO 2017 at 64 px: a 65 M student

The student starts as a slice of the teacher. Its loss on a noisy latent x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise is
    alpha MSE(student(x_t), target) + (1 - alpha) MSE(student(x_t), noise),
alpha falling linearly from 1 to 0.5 over training. The target is the teacher's prediction as far as the teacher, at this
noise level and resolution, knows more than a blind guess, which is measured first, and for the rest the noise. Captions are
dropped more and more often (a store of K draws has K rates), which teaches the unconditional half of classifier-free
guidance. Latents and caption embeddings (as many as `--cache-gb` holds) are computed once, before training, and so are the
teacher's predictions, for `--store` K fixed draws of every picture: its U-Net does not run in training.

With `--learned-guidance` w above 1 the student's output eps is the guided prediction. The loss takes the guidance out again,
eps_empty + (eps - eps_empty) / w with the student's own eps_empty (arXiv 2501.15420), and compares that with target and noise.
With `--guided-teacher` the target is the teacher's guided prediction instead, at alpha 1 and without dropped captions
(arXiv 2210.03142). Either student is drawn with guidance 1: one pass a step instead of two.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from common.cache import TeacherStore, TrainingPairs
from common.coco import CocoCaptions
from common.files import from_root, make_folder
from common.fitness import measure_fitness
from common.metrics import Evaluator
from common.mini import caption_scores
from common.precision import fastest_kernels, pick_dtype
from common.report import check_hub, finish, summary
from common.run import Run
from common.sampling import guide
from common.settings import parse, require, start
from common.slicing import slice_unet, student_config
from common.teacher import UNet2DConditionModel, load_teacher
from common.trainer import Trainer, before_guidance, due, predict_noise, start_accelerator
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
    learned_guidance: float = 1.0  # guidance scale that the student learns; above 1 it is drawn without
    guided_teacher: bool = False  # learn it from the teacher's guided predictions
    weigh_teacher: bool = True  # believe the teacher at each noise level only as far as it knows more than a blind guess
    dropout_start: float = 0.05  # share of captions replaced by the empty one at the first step
    dropout_end: float = 0.2  # and at the last one, linear in between (--store K has K rates, and --store 1 their mean)
    store: int = 4  # draws of each picture whose teacher predictions are cached for all runs; 0: fresh draws
    ema_decay: float = 0.999  # of the weights' moving average, which is what is evaluated and saved; 0: none
    # evaluation
    features: Literal["inception", "effnet-lite0"] = "inception"  # inception: FID, LPIPS; effnet-lite0: the embedded world's
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # how pictures are drawn
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
    cache: bool = True  # keep latents and caption embeddings; --no-cache --store 0 encodes them at every step
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
    out="checkpoints/v2.2-mini", channels=(64, 48), steps=300, store=1, lr=2e-3, ema_decay=0.99,
    features="effnet-lite0", guidance=3.0, eval_every=150, eval_samples=100, final_samples=1_000, cache_gb=0.5,
    workers=0, save_every=100,
)


def linear(start: float, end: float, step: int, steps: int) -> float:
    """`start` at step 0, `end` at the last step, steps - 1."""
    return start + (end - start) * step / max(1, steps - 1)


def teacher_noise(unet, noisy: torch.Tensor, batch, empty: torch.Tensor, guidance: float) -> torch.Tensor:
    """(B, 4, h, w): the teacher's prediction; for a `guidance` above 1 the guided one, in one pass. `empty`: the empty
    caption's states (1, tokens, width)."""
    if guidance <= 1:
        return predict_noise(unet, noisy, batch)
    states = torch.cat([empty.expand(len(noisy), -1, -1), batch.encoder_hidden_states])
    both = batch._replace(encoder_hidden_states=states, timesteps=batch.timesteps.repeat(2))
    return guide(predict_noise(unet, noisy.repeat(2, 1, 1, 1), both), guidance)


def main(s: Settings):
    guided = s.learned_guidance > 1
    require(guided or not s.guided_teacher, "--guided-teacher needs a scale: add --learned-guidance 5")
    require(s.cache or not s.store, "--store needs the cache: leave out --no-cache, or take fresh draws with --store 0")
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

    fitness = measure_fitness(teacher, evaluator)
    scale = s.learned_guidance if s.guided_teacher else 1.0  # of the teacher's predictions
    weighed = s.weigh_teacher and not s.guided_teacher  # noise knows no guidance
    effect = "the KD counts less there" if weighed else "the KD pulls the student to what is wrong"
    accelerator.print(fitness.describe(s.resolution, effect))
    run.log_once(**fitness._asdict())
    knowledge = fitness.knowledge(noise_scheduler, weighed).to(accelerator.device)  # (timesteps,) in 0..1

    def ask(noisy, batch):  # (B, 4, h, w) of the teacher
        return teacher_noise(teacher.unet, noisy, batch, pairs.empty, scale)

    batches = pairs
    if s.store:  # the teacher is paid once, here or by an earlier run; each draw has the mean dropout of the part it serves
        rates = [s.dropout_start + (s.dropout_end - s.dropout_start) * (k + 0.5) / s.store for k in range(s.store)]
        rates = [0.0] * s.store if s.guided_teacher else rates
        batches = TeacherStore(pairs, ask, rates, s.steps, scale)
        run.log_once(store_seconds=batches.seconds)
        if s.eval_every:
            evaluator.teacher_images(s.eval_samples)
        evaluator.teacher_images(s.final_samples)
        teacher.unet = None  # nothing asks it from here on: its memory is free

    dtype = fastest_kernels(run, student, dtype, auto=s.dtype == "auto", steps=s.steps, batch_size=s.batch_size,
                            tokens=teacher.tokenizer.model_max_length)
    if s.compile:
        student.compile()
    trainer = Trainer(accelerator, student, dtype=dtype, steps=s.steps, batch_size=s.batch_size, lr=s.lr, warmup=s.warmup,
                      weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, ema_decay=s.ema_decay)
    student_sampling = {"guidance": 1.0} if guided else {}  # where it draws in another way than the teacher
    first_step = trainer.restore(run.folder) if s.resume else 0
    run.begin("V-2.2", first_step)
    for step in range(first_step, s.steps):
        if due(step, s.eval_every) and step not in run.evaluated:
            run.record(step, evaluator.evaluate(trainer.ema_student, s.eval_samples, dtype, **student_sampling))

        alpha = 1.0 if s.guided_teacher else linear(s.alpha_start, s.alpha_end, step, s.steps)
        dropout = 0.0 if s.guided_teacher else linear(s.dropout_start, s.dropout_end, step, s.steps)
        batch = batches.draw(step, dropout)  # from the store or fresh; either way a Batch
        noisy = noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)  # sqrt(a_t) x_0 + sqrt(1 - a_t) noise
        with trainer.autocast():
            teacher_pred = batch.teacher_pred  # (B, 4, h, w)
            if teacher_pred is None:  # the teacher's pass costs more than the student's step
                with torch.no_grad():
                    teacher_pred = ask(noisy, batch)
            noise_pred = predict_noise(trainer.model, noisy, batch)
            if guided and not s.guided_teacher:
                noise_pred = before_guidance(trainer.model, noise_pred, noisy, batch, pairs.empty, s.learned_guidance)
        known = knowledge[batch.timesteps].view(-1, 1, 1, 1)
        kd_loss = F.mse_loss(noise_pred, torch.lerp(batch.noise, teacher_pred, known))
        noise_loss = F.mse_loss(noise_pred, batch.noise)
        loss = alpha * kd_loss + (1 - alpha) * noise_loss
        lr = trainer.lr
        trainer.step(loss)  # backward, clip, AdamW, OneCycleLR, EMA

        done = step + 1
        run.log_step(done, trainer, loss=loss, kd_loss=kd_loss, noise_loss=noise_loss, lr=lr, alpha=alpha,
                     dropout=batch.dropout)
        stopping = run.stop_requested(done)
        if stopping or due(done, s.save_every) or done == s.steps:
            run.save(trainer)
        if stopping:
            run.leave(done)

    evaluation = evaluator.evaluate(trainer.ema_student, s.final_samples, dtype, **student_sampling)
    run.record(s.steps, evaluation)
    if accelerator.is_main_process:
        finish(run.folder, "V-2.2", trainer.ema_student, teacher, evaluation, val_set,
               warning=fitness.warning(s.resolution, effect), inference={"guidance_scale": 1.0} if guided else None,
               push_to_hub=s.push_to_hub)
    accelerator.end_training()


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, MINI))
