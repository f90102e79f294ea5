"""V-3: distil a pruned student (`sd_small`, `sd_tiny`) on many GPUs and machines, with Accelerate.

    python v3/train_student_kd.py --mini                            # the embedded world, one process
    accelerate launch v3/train_student_kd.py --size sd_small --channels 320,640,1280,1280   # on what Accelerate was told
    accelerate launch v3/train_student_kd.py --shards data/shards --store 0   # WebDataset shards in place of COCO

The loss is BK-SDM's (arXiv 2305.15798): task_weight MSE(student, noise) + kd_weight MSE(student, teacher)
+ feature_weight mean_k |(P_k f_k^student - f_k^teacher) / s_k|^2 over the blocks' outputs f_k, s_k the root mean squares of
the teacher's channels, P_k a 1 x 1 projection where channels were sliced. The teacher counts as far as it knows more than a
blind guess (`--weigh-teacher`). Its predictions are computed once, for `--store` K fixed draws of every picture; features
(feature_weight is 0 by default) and shards need its U-Net at every step: `--store 0`. Step i draws its global batch from
(seed, i), each process takes its share: their number changes the speed alone; with --shards, what meets in a batch too.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from prepare_unet_small import pruned_config

from common.cache import TeacherStore, TrainingPairs
from common.coco import CocoCaptions
from common.features import StudentWithFeatures, block_names
from common.files import from_root, make_folder
from common.fitness import measure_fitness
from common.metrics import Evaluator
from common.mini import caption_scores
from common.precision import fastest_kernels, pick_dtype
from common.report import check_hub, finish, summary
from common.run import Run
from common.settings import parse, require, start
from common.slicing import slice_unet
from common.teacher import UNet2DConditionModel, load_teacher
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
    shards: str = ""  # a folder or pattern of WebDataset .tar shards to train on in place of the train split
    resolution: int = 64  # pixels a side
    flip: bool = False  # mirror half of the pictures, whatever their captions say of left and right
    out: str = "checkpoints/v3"  # the run's folder
    resume: bool = False  # go on with the run in --out
    # the student
    size: Literal["sd_small", "sd_tiny"] = "sd_tiny"  # sd_small (579 M of SD-1.5's 860 M) or sd_tiny (323 M), before --channels
    channels: tuple[int, ...] = (320, 480, 192)  # width of each level that is left (these: 65.2 M)
    groups: int = 0  # of every GroupNorm; 0: as many as the teacher has
    random_start: bool = False  # start from random weights, not from the teacher's
    # training
    steps: int = 60_000  # optimizer steps
    batch_size: int = 64  # pictures a step, over all processes and accumulated passes
    accumulate: int = 1  # passes that one step's batch is split into
    lr: float = 2e-4  # OneCycleLR's highest learning rate
    warmup: float = 0.05  # share of the steps in which it rises
    weight_decay: float = 0.01  # AdamW's
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw, or adamw8bit where bitsandbytes is installed
    max_grad_norm: float = 1.0  # gradients longer than this are shortened to it
    task_weight: float = 1.0  # of the error against the noise
    kd_weight: float = 1.0  # of the error against the teacher's prediction
    feature_weight: float = 0.0  # of the blocks' outputs, with --store 0; 0: none
    weigh_teacher: bool = True  # believe the teacher at each noise level only as far as it knows more than a blind guess
    store: int = 4  # draws of each picture whose teacher predictions are cached for all runs; 0: fresh draws
    feature_blocks: tuple[str, ...] = ()  # whose outputs are matched; none given: all that have the teacher's size
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    ema_decay: float = 0.999  # of the weights' moving average, which is what is evaluated and saved; 0: none
    mixed_precision: Literal["", "no", "fp16", "bf16"] = ""  # empty: the launcher's fp16 or bf16, else the device's best
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, slower
    compile: bool = False  # torch.compile the student: pays on long runs only; on a CPU it takes a C++ compiler
    # evaluation
    features: Literal["inception", "effnet-lite0"] = "inception"  # inception: FID, LPIPS; effnet-lite0: the embedded world's
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # how pictures are drawn
    sample_steps: int = 25  # of the sampler
    guidance: float = 5.0  # classifier-free guidance scale
    eval_every: int = 5_000  # steps between small evaluations; 0: none
    eval_samples: int = 500  # pictures of a small evaluation
    final_samples: int = 5_000  # pictures of the last one
    eval_batch: int = 100  # pictures sampled at a time, by each process
    # machine
    device: str = "auto"  # auto, cuda, mps or cpu
    cache: bool = True  # keep latents and caption embeddings; --no-cache --store 0 encodes them at every step
    cache_folder: str = "data/cache"  # seen from the repository: it serves all runs, and holds the evaluations' frozen side too
    cache_gb: float = 20.0  # at most this much for caption embeddings; the rest are encoded on the fly
    workers: int = 0  # processes that decode pictures; 0: this one
    max_broken: float = 0.05  # share of the pictures that may be missing, without caption or undecodable
    max_bad_steps: int = 20  # steps in a row without finite gradients that end the run
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints that stay
    log_every: int = 20  # steps between lines of metrics.jsonl
    track: Literal["none", "tensorboard", "trackio", "wandb"] = "none"  # where losses, scores and sheets are logged too
    push_to_hub: str = ""  # a hub repository (user/name) to upload the student to in the end
    seed: int = 0  # of everything random


MINI = dict(
    teacher="checkpoints/mini-teacher", data="data/mini", train_split="train", val_split="val", resolution=32,
    out="checkpoints/v3-mini", channels=(64, 64, 16), steps=1_800, store=1, lr=2e-3, ema_decay=0.99,
    features="effnet-lite0", guidance=3.0, eval_every=600, eval_samples=100, final_samples=1_000, cache_gb=0.5,
    save_every=300,
)


def main(s: Settings):
    webdataset = importlib.util.find_spec("webdataset")
    require(webdataset or not s.shards, "--shards needs webdataset: pip install -r v3/requirements.txt")
    require(s.cache or not s.store, "--store needs the cache: leave out --no-cache, or take fresh draws with --store 0")
    require(not s.store or s.kd_weight and not (s.feature_weight or s.shards), "--store serves --kd-weight alone, without "
            "--feature-weight and --shards: add --store 0")
    require(s.task_weight + s.kd_weight + s.feature_weight > 0, "give --task-weight or --kd-weight more than 0")
    require(s.feature_weight or not s.feature_blocks, "--feature-blocks needs features: --feature-weight 0.1 --store 0")
    if s.mixed_precision:  # DeepSpeed reads it there
        os.environ["ACCELERATE_MIXED_PRECISION"] = s.mixed_precision
    accelerator = start_accelerator(s.device, s.accumulate, s.track, s.out, s.compile)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "no" and not s.mixed_precision and not accelerator.state.deepspeed_plugin:
        precision = "auto"  # the launcher says "no" also where it was told nothing
    dtype = pick_dtype(precision, accelerator.device)
    shares = accelerator.num_processes * s.accumulate
    require(s.batch_size % shares == 0, f"--batch-size must be a multiple of {shares}, processes x --accumulate")
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    require(not fsdp or s.optimizer == "adamw", "--optimizer adamw8bit does not work with FSDP")
    run = Run(s.out, s, s.resume, accelerator)
    torch.manual_seed(s.seed)

    # data and teacher
    data = draw_mini(ROOT / s.data) if s.mini else Path(from_root(s.data))
    train_set = None if s.shards else CocoCaptions(data, s.train_split, s.resolution, part=(s.val_share, 1),
                                                   reach=s.steps * s.batch_size)  # of shards: below
    val_set = CocoCaptions(data, s.val_split, s.resolution, limit=s.final_samples, part=(0, s.val_share))
    accelerator.print(f"data: {data}, captions in {val_set.format}")
    teacher = load_teacher(from_root(s.teacher), accelerator.device, dtype)
    noise_scheduler = teacher.noise_scheduler
    options = dict(batch_size=s.batch_size, seed=s.seed, workers=s.workers, flip=s.flip)
    if s.shards:
        from coco_dataset import ShardPairs

        batches = ShardPairs(s.shards, teacher, accelerator, size_px=s.resolution, **options)
    check_hub(s.push_to_hub, accelerator, teacher, val_set)

    # the student's start
    config = pruned_config(teacher.unet, s.size, s.channels, s.groups)
    config["sample_size"] = teacher.latent_side(s.resolution)
    student = UNet2DConditionModel(**config) if s.random_start else slice_unet(teacher.unet, config)
    student.to(accelerator.device)
    run.create((train_set or batches).fingerprint() + val_set.fingerprint(), teacher.fingerprint(), dtype)

    # what is computed once: the evaluation's frozen side, latents and caption embeddings
    cache = make_folder(ROOT / s.cache_folder, "--cache-folder")
    sampling = dict(sampler=s.sampler, steps=s.sample_steps, guidance=s.guidance, seed=s.seed, size_px=s.resolution,
                    batch=s.eval_batch)
    more_scores = caption_scores(teacher.name, val_set, accelerator.device) if s.mini else None
    evaluator = Evaluator(s.features, val_set, teacher, cache, accelerator, sampling, max_broken=s.max_broken,
                          workers=s.workers, more_scores=more_scores)
    if not s.shards:
        batches = TrainingPairs(train_set, teacher, cache if s.cache else None, accelerator, caption_gb=s.cache_gb,
                                max_broken=s.max_broken, **options)
    accelerator.print(summary(student, teacher, batches, evaluator))
    fitness = measure_fitness(teacher, evaluator)
    effect = "its losses count less there" if s.weigh_teacher else "its losses teach what is wrong there"
    accelerator.print(fitness.describe(s.resolution, effect))
    knowledge = fitness.knowledge(noise_scheduler, s.weigh_teacher).to(accelerator.device)  # (timesteps,) in 0..1
    empty = batches.empty
    if s.store:
        rates = [s.caption_dropout] * s.store
        batches = TeacherStore(batches, lambda noisy, batch: predict_noise(teacher.unet, noisy, batch), rates, s.steps)
        run.log_once(store_seconds=batches.seconds)
        if s.eval_every:
            evaluator.teacher_images(s.eval_samples)
        evaluator.teacher_images(s.final_samples)
        teacher.unet = None  # nothing asks it from here on: its memory is free

    with_features, distils = None, s.kd_weight or s.feature_weight  # or no loss needs the teacher's pass
    if s.feature_weight:  # sd_tiny's innermost block does not halve its output, the teacher's does
        innermost = f"down_blocks.{len(student.down_blocks) - 1}"
        matching = tuple(name for name in block_names(student) if s.size == "sd_small" or name != innermost)
        with_features = StudentWithFeatures(student, teacher.unet, s.feature_blocks or matching, F.mse_loss, empty)
    run.log_once(**fitness._asdict())
    if s.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    dtype = fastest_kernels(run, student, dtype, auto=precision == "auto", steps=s.steps, batch_size=s.batch_size,
                            tokens=teacher.tokenizer.model_max_length)
    if s.compile:
        student.compile()
    trainer = Trainer(accelerator, student, with_features, dtype=dtype, steps=s.steps, batch_size=s.batch_size, lr=s.lr,
                      warmup=s.warmup, weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, ema_decay=s.ema_decay,
                      optimizer=s.optimizer, keep=s.keep)
    first_step = trainer.restore(run.folder) if s.resume else 0
    run.begin("V-3", first_step)
    for step in range(first_step, s.steps):
        if due(step, s.eval_every) and step not in run.evaluated:
            run.record(step, evaluator.evaluate(trainer.ema_student, s.eval_samples, dtype))

        lr = trainer.lr
        losses = torch.zeros(4, device=accelerator.device)  # in all, task, KD, features: means over the batch's passes
        for part in range(s.accumulate):
            with accelerator.accumulate(trainer.model):
                batch = batches.draw(step, s.caption_dropout, part=part, parts=s.accumulate)
                noisy = noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
                with trainer.autocast():
                    teacher_pred = batch.teacher_pred
                    if teacher_pred is None:
                        with torch.no_grad():
                            teacher_pred = predict_noise(teacher.unet, noisy, batch) if distils else batch.noise
                    known = knowledge[batch.timesteps].view(-1, 1, 1, 1)
                    if with_features:
                        noise_pred, feature_loss = trainer.model(noisy, batch.timesteps, batch.encoder_hidden_states,
                                                                 with_features.teacher_hooks.take(), known)
                    else:
                        noise_pred = predict_noise(trainer.model, noisy, batch)
                        feature_loss = noise_pred.new_zeros(())
                task_loss = F.mse_loss(noise_pred, batch.noise)
                kd_loss = F.mse_loss(noise_pred, torch.lerp(batch.noise, teacher_pred, known))
                loss = s.task_weight * task_loss + s.kd_weight * kd_loss + s.feature_weight * feature_loss
                trainer.step(loss)  # backward; after the last pass clip, AdamW, OneCycleLR, EMA
                losses += torch.stack([loss, task_loss, kd_loss, feature_loss]).detach() / s.accumulate

        done = step + 1
        loss, task_loss, kd_loss, feature_loss = losses
        run.log_step(done, trainer, loss=loss, task_loss=task_loss, kd_loss=kd_loss, feature_loss=feature_loss, lr=lr)
        stopping = run.stop_requested(done)
        if stopping or due(done, s.save_every) or done == s.steps:
            run.save(trainer)
        if stopping:
            run.leave(done)

    evaluation = evaluator.evaluate(trainer.ema_student, s.final_samples, dtype)
    run.record(s.steps, evaluation)
    if accelerator.is_main_process:
        finish(run.folder, "V-3", trainer.ema_student, teacher, evaluation, val_set,
               warning=fitness.warning(s.resolution, effect), push_to_hub=s.push_to_hub)
    accelerator.end_training()


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, MINI))
