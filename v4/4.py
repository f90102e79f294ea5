"""V-4: distil a student that draws a picture in four passes instead of fifty.

    python v4/4.py --mini                                     # the embedded world: offline, on a laptop CPU
    python v4/4.py --start checkpoints/v2.1                   # SD-1.5 at 64 px, from V-2.1's with --learned-guidance 5

The teacher draws `--trajectories` training captions once, from pure noise, by DPM-Solver++ (arXiv 2211.01095) with
classifier-free guidance, and of each path the states at the timesteps that a sampler of `--passes` steps visits are kept. The
student learns to go from one kept state to the next by one DDIM step of its own (arXiv 2010.02502, eq. 12; a and a' are the two
cumulative alphas):
    step(z, eps) = sqrt(a') (z - sqrt(1 - a) eps) / sqrt(a) + sqrt(1 - a') eps,   loss = |step(z_k, eps(z_k)) - z_k+1|^2 / u,
where u = mean_k (sqrt(1 - a') - sqrt(a' (1 - a) / a))^2, what an error of 1 in eps costs, so that the loss is in eps' units.
So it takes over the guidance (arXiv 2210.03142), needs one pass a step, and is trained at no other timestep; no pictures are
needed, only captions.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F

from common.cache import cache_key, cached_array, require_even_shares, rows_of_step, share_of
from common.coco import CocoCaptions
from common.files import from_root, make_folder, model_place
from common.fitness import measure_fitness
from common.metrics import Evaluator
from common.mini import caption_scores
from common.precision import autocast, fastest_kernels, kept_dtype, pick_dtype
from common.report import check_hub, finish, scores_table, summary
from common.run import Run
from common.sampling import ddim_step, denoise, encode_captions, make_scheduler, require_no_extra_step, upload
from common.settings import parse, require, start
from common.slicing import slice_unet, student_config
from common.teacher import load_teacher, load_unet
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
    out: str = "checkpoints/v4"  # the run's folder
    resume: bool = False  # go on with the run in --out
    # the student
    start: str = ""  # a student's folder or run to go on from, in its shape; empty: the teacher's slice
    channels: tuple[int, ...] = (320, 352)  # widths of the levels that stay, outermost first (SD-1.5's are 320,640,1280,1280)
    layers: int = 2  # resnets in a down block
    mid_block: bool = False  # keep the block below the innermost level
    groups: int = 0  # of every GroupNorm; 0: as many as the teacher has
    # the teacher's trajectories
    passes: int = 4  # steps that the student draws in
    teacher_steps: tuple[int, ...] = (4, 4, 4, 8)  # steps of the teacher's for each of the passes
    trajectories: int = 40_000  # captions that it draws
    learned_guidance: float = 5.0  # the guidance scale at which it draws them
    # training
    steps: int = 20_000  # optimizer steps
    batch_size: int = 64  # states a step
    lr: float = 2e-4  # OneCycleLR's highest learning rate
    warmup: float = 0.05  # share of the steps in which it rises
    weight_decay: float = 0.01  # AdamW's
    max_grad_norm: float = 1.0  # gradients longer than this are shortened to it
    ema_decay: float = 0.999  # of the weights' moving average, which is what is evaluated and saved; 0: none
    # evaluation
    features: Literal["inception", "effnet-lite0"] = "inception"  # inception: FID, LPIPS; effnet-lite0: the embedded world's
    teacher_passes: tuple[int, ...] = (16, 8)  # passes of the teacher's that it shows beside those of --sample-steps
    also_passes: tuple[int, ...] = (1, 2, 8)  # numbers of steps that the closing table shows beside --passes
    sampler: Literal["ddpm", "ddim", "ddim-trailing"] = "ddpm"  # the teacher's
    sample_steps: int = 25  # of its sampler
    guidance: float = 5.0  # its classifier-free guidance scale
    eval_every: int = 5_000  # steps between small evaluations; 0: none
    eval_samples: int = 500  # pictures of a small evaluation
    final_samples: int = 5_000  # pictures of the last one
    eval_batch: int = 100  # pictures sampled at a time
    # machine
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of the frozen parts and of autocast around the student
    compile: bool = False  # torch.compile the student: pays on long runs only; on a CPU it takes a C++ compiler
    cache_folder: str = "data/cache"  # seen from the repository: trajectories, the evaluations' frozen side, for all runs
    workers: int = 2  # processes that decode pictures for the evaluation; 0: this one
    max_broken: float = 0.05  # share of the pictures that may be missing, without caption or undecodable
    max_bad_steps: int = 20  # steps in a row without finite gradients that end the run
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between lines of metrics.jsonl
    track: Literal["none", "tensorboard", "trackio", "wandb"] = "none"  # where losses, scores and sheets are logged too
    push_to_hub: str = ""  # a hub repository (user/name) to upload the student to in the end
    seed: int = 0  # of everything random


MINI = dict(  # the student is the teacher's outermost level, whole, and half of the next, as the real world's is
    teacher="checkpoints/mini-teacher", data="data/mini", train_split="train", val_split="val", resolution=32,
    out="checkpoints/v4-mini", channels=(64, 48), teacher_steps=(2, 2, 2, 4), trajectories=3_000, learned_guidance=3.0,
    steps=800, lr=1e-3, ema_decay=0.99, features="effnet-lite0", guidance=3.0, eval_every=400, eval_samples=100,
    final_samples=1_000, workers=0, save_every=200,
)


class Segments(NamedTuple):
    """Pieces of trajectories, each of which the student is to go in one step."""

    z: torch.Tensor  # (B, 4, h, w) where they begin
    wanted: torch.Tensor  # (B, 4, h, w) where they end
    encoder_hidden_states: torch.Tensor  # (B, tokens, width) of their captions
    timesteps: torch.Tensor  # (B,) at which they begin
    a: torch.Tensor  # (B, 1, 1, 1) cumulative alphas at which they begin
    a_next: torch.Tensor  # (B, 1, 1, 1) and end


class Trajectories:
    """The teacher's paths from pure noise to a picture, of one caption each, kept in `folder` for all runs: the states
    (N, passes + 1, 4, side, side), the first of which is the noise, and the captions' embeddings (N, tokens, width)."""

    def __init__(self, teacher, captions: list[str], folder: Path, accelerator, *, teacher_steps: tuple[int, ...],
                 guidance: float, side: int, batch_size: int, seed: int):
        passes = len(teacher_steps)
        require(batch_size <= len(captions), f"--batch-size {batch_size} is more than the {len(captions)} captions")
        self.batch_size, self.seed = batch_size, seed
        self.device, self.rank, self.processes = accelerator.device, accelerator.process_index, accelerator.num_processes
        require_even_shares(batch_size, self.processes)
        self.scheduler = make_scheduler("ddim-trailing", teacher.noise_scheduler)
        self.scheduler.set_timesteps(passes)
        self.timesteps = self.scheduler.timesteps  # (passes,) falling
        require_no_extra_step(self.scheduler, f"--passes {passes}")
        alphas = self.scheduler.alphas_cumprod[self.timesteps]
        alphas = torch.cat([alphas, self.scheduler.final_alpha_cumprod.view(1)])
        self.a, self.a_next = alphas[:-1], alphas[1:]  # (passes,) each
        self.unit = ((1 - self.a_next).sqrt() - (self.a_next * (1 - self.a) / self.a).sqrt()).square().mean().item()
        empty = encode_captions(teacher.text_encoder, teacher.tokenizer, [""])  # (1, tokens, width)
        # the path ends where the student's own DDIM does: at timestep 0's noise, or at none
        last = "zero" if self.scheduler.config.set_alpha_to_one else "sigma_min"
        finer = make_scheduler("dpm++", teacher.noise_scheduler, final_sigmas_type=last)
        bounds = [*self.timesteps.tolist(), 0]
        visited = [np.linspace(t, end, count, endpoint=False) for t, end, count in zip(bounds, bounds[1:], teacher_steps)]
        visited[-1] = bounds[-2] * np.linspace(1, 0, teacher_steps[-1], endpoint=False) ** 1.5  # where a coarse step would blur
        visited = np.concatenate(visited).round().astype(int)  # the timesteps of the teacher's path
        require((np.diff(visited) < 0).all(), "--teacher-steps names more steps than there are timesteps for")
        shape = (4, side, side)

        @torch.no_grad()
        def embed(start, batch=256):
            for i in range(start, len(captions), batch):
                states = encode_captions(teacher.text_encoder, teacher.tokenizer, captions[i : i + batch])
                yield list(range(i, i + len(states))), i + len(states), states.float().cpu().numpy()

        @torch.no_grad()
        def draw(start, batch=64):
            for i in range(start, len(captions), batch):
                rows = range(i, min(i + batch, len(captions)))
                z = upload(torch.from_numpy(np.stack([noise_of(row, shape) for row in rows])), self.device)
                encoded = upload(torch.from_numpy(self.embeddings[list(rows)]), self.device).to(teacher.unet.dtype)
                if guidance > 1:
                    encoded = torch.cat([empty.expand(len(rows), -1, -1), encoded])  # (2 n, tokens, width)
                finer.set_timesteps(timesteps=visited.tolist(), device=self.device)  # it forgets the last path's predictions
                with autocast(z.device, lowered):
                    path = list(denoise(teacher.unet, finer, z, encoded, guidance, None))
                states = [z, *(path[end - 1] for end in np.cumsum(teacher_steps))]
                yield list(rows), rows[-1] + 1, torch.stack(states, 1).float().cpu().numpy()

        lowered = kept_dtype(teacher.text_encoder)  # the U-Net has its precision, and may be gone where all is cached
        key = cache_key("trajectories", teacher, captions, passes, teacher_steps, guidance, side, str(lowered))
        folder = folder / f"trajectories-{key}"
        self.embeddings, _ = cached_array(folder, "captions", (len(captions), *empty.shape[1:]), embed, "cap")
        self.states, made = cached_array(folder, "states", (len(captions), passes + 1, *shape), draw, "img")
        self.seconds = made["seconds"]

    def draw(self, step: int) -> Segments:
        """The batch of one step, which depends on (seed, step) alone; of several processes each gets its share."""
        mine = share_of(self.batch_size, self.rank, self.processes)
        rows = rows_of_step(step, len(self.states), self.batch_size, self.seed)[mine]
        k = np.random.default_rng([self.seed, 1, step]).integers(len(self.timesteps), size=self.batch_size)[mine]
        found = (self.states[rows, k], self.states[rows, k + 1], self.embeddings[rows])
        z, wanted, encoder_hidden_states = (upload(torch.from_numpy(array), self.device).float() for array in found)
        timesteps = upload(self.timesteps[k], self.device)
        a, a_next = (upload(alphas[k].view(-1, 1, 1, 1), self.device) for alphas in (self.a, self.a_next))
        return Segments(z, wanted, encoder_hidden_states, timesteps, a, a_next)


def noise_of(row: int, shape: tuple) -> np.ndarray:
    """The noise that a trajectory begins with."""
    return np.random.Generator(np.random.Philox(key=[4, row])).standard_normal(shape, dtype=np.float32)


def some_captions(dataset: CocoCaptions, count: int) -> list[str]:
    """`count` different captions at most, in an order of their own: the same for every seed."""
    distinct = list(dict.fromkeys(caption for captions in dataset.captions for caption in captions))
    order = np.random.default_rng(0).permutation(len(distinct))
    return [distinct[i] for i in order[:count]]


def main(s: Settings):
    require(len(s.teacher_steps) == s.passes, "--teacher-steps must name a number of steps for each of --passes")
    each = 2 if s.guidance > 1 else 1  # passes of a step of the teacher's
    whole = all(passes % each == 0 and passes <= 1000 * each for passes in s.teacher_passes)
    require(whole, f"--teacher-passes must be of 1 to 1,000 whole steps, which take {each} each at --guidance {s.guidance:g}")
    accelerator = start_accelerator(s.device, track=s.track, out=s.out, compile=s.compile)
    dtype = pick_dtype(s.dtype, accelerator.device)
    run = Run(s.out, s, s.resume, accelerator)
    torch.manual_seed(s.seed)

    # data and teacher
    data = draw_mini(ROOT / s.data) if s.mini else Path(from_root(s.data))
    train_set = CocoCaptions(data, s.train_split, s.resolution, part=(s.val_share, 1))
    val_set = CocoCaptions(data, s.val_split, s.resolution, limit=s.final_samples, part=(0, s.val_share))
    accelerator.print(f"data: {data}, captions in {val_set.format}")
    teacher = load_teacher(from_root(s.teacher), accelerator.device, dtype)
    check_hub(s.push_to_hub, accelerator, teacher, val_set)
    side = teacher.latent_side(s.resolution)

    # the student's start
    if s.start:
        student = load_unet(model_place(s.start), what="the student").requires_grad_(True)
        same = all(student.config[name] == teacher.unet.config[name] for name in ("in_channels", "cross_attention_dim"))
        require(same, f"{s.start} is no student of this teacher's")
        student.register_to_config(sample_size=side)
    else:
        config = student_config(teacher.unet, s.channels, s.layers, s.groups, s.mid_block)
        student = slice_unet(teacher.unet, config | {"sample_size": side})
    student.to(accelerator.device)
    run.create(train_set.fingerprint() + val_set.fingerprint(), teacher.fingerprint(), dtype)

    # what is computed once: the evaluation's frozen side, the teacher's trajectories
    cache = make_folder(ROOT / s.cache_folder, "--cache-folder")
    sampling = dict(sampler=s.sampler, steps=s.sample_steps, guidance=s.guidance, seed=s.seed, size_px=s.resolution,
                    batch=s.eval_batch)
    more_scores = caption_scores(teacher.name, val_set, accelerator.device) if s.mini else None
    evaluator = Evaluator(s.features, val_set, teacher, cache, accelerator, sampling, max_broken=s.max_broken,
                          workers=s.workers, more_scores=more_scores)
    accelerator.print(summary(student, teacher, evaluator))
    fitness = measure_fitness(teacher, evaluator)
    effect = "its trajectories go astray there"
    accelerator.print(fitness.describe(s.resolution, effect))
    run.log_once(**fitness._asdict())
    captions = some_captions(train_set, min(s.trajectories, s.steps * s.batch_size))  # the steps reach no more
    trajectories = Trajectories(
        teacher, captions, cache, accelerator, teacher_steps=s.teacher_steps, guidance=s.learned_guidance, side=side,
        batch_size=s.batch_size, seed=s.seed)
    run.log_once(store_seconds=trajectories.seconds)
    if s.eval_every:
        evaluator.teacher_images(s.eval_samples)
    evaluator.teacher_images(s.final_samples)
    teacher_rows = {}
    for passes in s.teacher_passes:
        shorter = dict(sampler="ddim-trailing", steps=passes // each)
        teacher_rows[f"teacher, {passes} passes"] = evaluator.teacher_scores(s.final_samples, **shorter)
    teacher.unet = None  # nothing asks it from here on: its memory is free

    dtype = fastest_kernels(run, student, dtype, auto=s.dtype == "auto", steps=s.steps, batch_size=s.batch_size,
                            tokens=teacher.tokenizer.model_max_length)
    if s.compile:
        student.compile()
    trainer = Trainer(accelerator, student, dtype=dtype, steps=s.steps, batch_size=s.batch_size, lr=s.lr, warmup=s.warmup,
                      weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, ema_decay=s.ema_decay)
    few = dict(sampler="ddim-trailing", steps=s.passes, guidance=1.0)  # how the student draws
    parameters = dict(num_inference_steps=s.passes, guidance_scale=1.0)  # the same in the pipeline's words
    first_step = trainer.restore(run.folder) if s.resume else 0
    run.begin("V-4", first_step)
    for step in range(first_step, s.steps):
        if due(step, s.eval_every) and step not in run.evaluated:
            run.record(step, evaluator.evaluate(trainer.ema_student, s.eval_samples, dtype, **few))

        batch = trajectories.draw(step)
        with trainer.autocast():
            noise_pred = predict_noise(trainer.model, batch.z, batch)  # (B, 4, h, w)
        landed = ddim_step(batch.z, noise_pred, batch.a, batch.a_next)
        loss = F.mse_loss(landed, batch.wanted) / trajectories.unit
        lr = trainer.lr
        trainer.step(loss)  # backward, clip, AdamW, OneCycleLR, EMA

        done = step + 1
        run.log_step(done, trainer, loss=loss, lr=lr)
        stopping = run.stop_requested(done)
        if stopping or due(done, s.save_every) or done == s.steps:
            run.save(trainer)
        if stopping:
            run.leave(done)

    evaluation = evaluator.evaluate(trainer.ema_student, s.final_samples, dtype, **few)
    run.record(s.steps, evaluation)
    usual = f"teacher, {each * s.sample_steps} passes"
    rows = {usual + f", {s.sampler}" * (usual in teacher_rows): evaluation.teacher_scores}
    for passes in sorted({*s.also_passes, s.passes}):
        drawn = evaluation
        if passes != s.passes:
            drawn = evaluator.evaluate(trainer.ema_student, s.final_samples, dtype, **few | {"steps": passes})
        rows[f"student, {passes} passes"] = drawn.scores
    run.log(step=s.steps, passes=teacher_rows | rows)
    if accelerator.is_main_process:
        for found in filter(None, (teacher_rows, rows)):
            print(f"\n{scores_table(found)}")
        finish(run.folder, "V-4", trainer.ema_student, teacher, evaluation, val_set,
               warning=fitness.warning(s.resolution, effect), sampler="ddim-trailing", inference=parameters,
               push_to_hub=s.push_to_hub)
    accelerator.end_training()


if __name__ == "__main__":
    limits = {name: (1, 1000) for name in ("passes", "teacher_steps", "also_passes")} | {"teacher_passes": (2, 2000)}
    start(main, parse(Settings, __doc__, MINI, limits=limits))
