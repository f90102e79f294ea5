"""What the versions' training shares: data and teacher, the student's optimization, evaluation, the closing table."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common.cache import TrainingPairs
from common.coco import CocoCaptions
from common.ema import EMA
from common.metrics import FEATURES, Evaluator, load_reader
from common.run import Run, pick_device, pick_dtype, save_student, table
from common.sampling import SAMPLERS
from common.settings import check
from common.teacher import Teacher, load_teacher, slice_unet, student_config
from data.draw_mini import draw_mini

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class World:
    """What a version trains on. Everything but the student is frozen."""

    teacher: Teacher
    student: torch.nn.Module  # a UNet2DConditionModel with random weights or the teacher's slice
    pairs: TrainingPairs  # latents and caption embeddings of the training split
    evaluator: Evaluator
    run: Run  # the output folder
    device: torch.device
    dtype: torch.dtype  # of autocast

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def teacher_pred(self, noisy: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) float32: the noise that the teacher sees in `noisy`."""
        unet = self.teacher.unet
        return unet(noisy.to(unet.dtype), timesteps, hidden.to(unet.dtype), return_dict=False)[0].float()


def prepare(s, more_checks: dict[str, bool] | None = None) -> World:
    """Check the settings `s`, load data and teacher, make the student's start and the caches.

    Raises SystemExit with one line where something is missing or cannot work, before anything heavy starts.
    """
    check({
        "--steps, --batch-size, --eval-samples and --final-samples must be at least 2":
            min(s.steps, s.batch_size, s.eval_samples, s.final_samples) >= 2,
        "--lr and --max-grad-norm must be positive": s.lr > 0 and s.max_grad_norm > 0,
        "--warmup and --ema-decay must lie between 0 and 1": 0 < s.warmup < 1 and 0 <= s.ema_decay < 1,
        "--weight-decay, --cache-gb, --workers and --eval-every must not be negative":
            min(s.weight_decay, s.cache_gb, s.workers, s.eval_every) >= 0,
        "--sample-steps must lie in 1..1000": 1 <= s.sample_steps <= 1000,
        "--save-every, --log-every, --eval-batch, --layers and --max-bad-steps must be at least 1":
            min(s.save_every, s.log_every, s.eval_batch, s.layers, s.max_bad_steps) >= 1,
        f"--sampler must be one of {', '.join(SAMPLERS)}": s.sampler in SAMPLERS,
        f"--features must be one of {', '.join(FEATURES)}": s.features in FEATURES,
        "--dtype must be auto, fp32, fp16 or bf16": s.dtype in ("auto", "fp32", "fp16", "bf16"),
        **(more_checks or {}),
    })
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    run = Run(s.out, s, s.resume)
    torch.manual_seed(s.seed)
    data, name = Path(s.data), s.teacher
    if s.mini:
        data = draw_mini(ROOT / s.data)
        name = str(ROOT / s.teacher) if (ROOT / s.teacher).is_dir() else s.teacher
    train_set = CocoCaptions(data, s.train_split, s.resolution)
    val_set = CocoCaptions(data, s.val_split, s.resolution, limit=s.final_samples)
    teacher = load_teacher(name, device, dtype if device.type == "cuda" else torch.float32)
    check({
        f"--resolution must be a multiple of {8 * teacher.vae_factor}": s.resolution % (8 * teacher.vae_factor) == 0,
        f"--batch-size {s.batch_size} is more than the {len(train_set)} training pictures": s.batch_size <= len(train_set),
    })
    config = student_config(teacher.unet, s.channels, s.layers, groups=s.groups)
    student = type(teacher.unet)(**config) if s.random_start else slice_unet(teacher.unet, config)
    for model in (student.to(device).train(), teacher.unet):
        model.to(memory_format=torch.channels_last)
    run.start()
    cache = ROOT / "data" / "cache"
    pairs = TrainingPairs(train_set, teacher, cache if s.cache else None, caption_gb=s.cache_gb, device=device,
                          workers=s.workers)
    left_out = ", ".join(f"{n} {why}" for why, n in train_set.skipped.items() if n)
    print(f"{len(pairs):,} training pictures" + (f" (left out: {left_out})" if left_out else ""))
    check({f"--batch-size {s.batch_size} is more than the {len(pairs)} training pictures": s.batch_size <= len(pairs)})
    how = dict(sampler=s.sampler, steps=s.sample_steps, guidance=s.guidance, seed=s.seed, size_px=s.resolution,
               batch=s.eval_batch)
    evaluator = Evaluator(s.features, val_set, teacher, cache, device, how, load_reader(Path(name)) if s.mini else None)
    ours, theirs = (sum(p.numel() for p in unet.parameters()) for unet in (student, teacher.unet))
    print(f"student: {ours / 1e6:.2f} M parameters, {ours / theirs:.1%} of the teacher's U-Net")
    return World(teacher, student, pairs, evaluator, run, device, dtype)


class Learner:
    """The student with everything that training changes: AdamW, OneCycleLR, the loss scaler, the EMA, and `extra`, a
    module that is checkpointed with it but not kept: its parameters that require gradients are trained too."""

    def __init__(self, world: World, s, extra: torch.nn.Module | None = None):
        self.student, self.max_grad_norm = world.student, s.max_grad_norm
        self.extra = extra if extra is not None else torch.nn.Module()
        self.trained = [*self.student.parameters(), *(p for p in self.extra.parameters() if p.requires_grad)]
        self.optimizer = torch.optim.AdamW(self.trained, lr=s.lr, weight_decay=s.weight_decay,
                                           fused=world.device.type != "mps")
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, s.lr, total_steps=s.steps, pct_start=s.warmup)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        self.ema = EMA(self.student, s.ema_decay)
        self.skipped = torch.zeros(2, device=world.device)  # steps without finite gradients: in all, in a row

    @property
    def lr(self) -> float:
        return self.scheduler.get_last_lr()[0]

    def step(self, loss: torch.Tensor, step: int):
        """One optimizer step on `loss`, left out and counted where a gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        bad = (~torch.isfinite(norm)).float()
        self.skipped = torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad])
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults["fused"]:  # the fused kernel looks at found_inf itself: nothing waits for the device
            self.optimizer.found_inf = bad
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.scheduler.step()
        self.ema.update(self.student, step)

    def bad_steps(self) -> tuple[int, int]:
        """How many steps were left out, in all and in a row until now."""
        in_all, in_a_row = self.skipped.tolist()
        return int(in_all), int(in_a_row)

    def state_dict(self) -> dict:
        return {"student": self.student.state_dict(), "extra": self.extra.state_dict(), "ema": self.ema.shadow,
                "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict):
        for part in ("student", "extra", "optimizer", "scheduler", "scaler"):
            getattr(self, part).load_state_dict(state[part])
        for average, saved in zip(self.ema.shadow, state["ema"]):
            average.copy_(saved)
        self.skipped.copy_(state["skipped"])


def evaluate(world: World, learner: Learner, step: int, count: int) -> dict:
    """The scores of the student's EMA on `count` pictures; logs them, writes the sheet of samples and the curves."""
    wanted, _ = world.evaluator.teacher_side(count)
    learner.ema.swap(learner.student)
    drawn, row = world.evaluator.student_side(learner.student.eval(), count)
    learner.ema.swap(learner.student.train())
    world.run.log(step=step, evaluation=row)
    world.run.sheet(step, {"teacher": wanted, "student": drawn}, world.evaluator.captions)
    world.run.curves()
    return row


def finish(world: World, learner: Learner, s):
    """The last evaluation; saves the student as a stock pipeline and prints the closing table."""
    row = evaluate(world, learner, s.steps, s.final_samples)
    _, teacher_row = world.evaluator.teacher_side(row["samples"])
    learner.ema.swap(learner.student)
    folder = world.run.folder / "student"
    save_student(learner.student.eval(), world.teacher, folder)
    print(f"\nThe student lies in {folder}, samples and curves beside it. {s.sample_steps} {s.sampler.upper()} steps at "
          f"guidance {s.guidance:g}:\n")
    print(table({"teacher": teacher_row, "student": row}))
