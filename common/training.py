"""What the versions' training shares: data and teacher, the student's optimization, evaluation, the closing table."""

import contextlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cache import TrainingPairs, full_disk_is_one_line, write_atomically
from common.coco import CocoCaptions
from common.ema import EMA
from common.metrics import FEATURES, Evaluator, load_reader
from common.run import Run, make_folder, model_card, pick_device, pick_dtype, save_student, table
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
    pairs: TrainingPairs  # (or what draws like one) latents and caption embeddings of the training split
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


def prepare(s, more_checks: dict[str, bool] | None = None, config_of=None, accelerator=None,
            pairs_of=None) -> World:
    """Check the settings `s`, load data and teacher, make the student's start and the caches.

    `config_of(teacher's U-Net)` gives the student's config; without it, that is the slice which `s` describes. With an
    Accelerate `accelerator`, its device and precision hold, and one process fills the caches before the others read.
    `pairs_of(teacher)` gives the training pairs in place of the train split, which is then neither read nor cached.

    Raises SystemExit with one line where something is missing or cannot work, before anything heavy starts.
    """
    check({
        "--steps, --batch-size, --eval-samples and --final-samples must be at least 2":
            min(s.steps, s.batch_size, s.eval_samples, s.final_samples) >= 2,
        "--lr and --max-grad-norm must be positive": s.lr > 0 and s.max_grad_norm > 0,
        "--warmup and --ema-decay must lie between 0 and 1": 0 < s.warmup < 1 and 0 <= s.ema_decay < 1,
        "--weight-decay, --cache-gb, --workers, --eval-every, --groups and --seed must not be negative":
            min(s.weight_decay, s.cache_gb, s.workers, s.eval_every, s.groups, s.seed) >= 0,
        "--channels must be positive": min(s.channels, default=1) > 0,
        "--max-broken must lie in 0..1": 0 <= s.max_broken <= 1,
        "--sample-steps must lie in 1..1000": 1 <= s.sample_steps <= 1000,
        "--save-every, --log-every, --eval-batch and --max-bad-steps must be at least 1":
            min(s.save_every, s.log_every, s.eval_batch, s.max_bad_steps) >= 1,
        f"--sampler must be one of {', '.join(SAMPLERS)}": s.sampler in SAMPLERS,
        f"--features must be one of {', '.join(FEATURES)}": s.features in FEATURES,
        "--dtype must be auto, fp32, fp16 or bf16": accelerator or s.dtype in ("auto", "fp32", "fp16", "bf16"),
        **(more_checks or {}),
    })
    main = accelerator is None or accelerator.is_main_process
    run = Run(s.out, s, s.resume, main)
    if accelerator is None:
        device = pick_device(s.device)
        dtype = pick_dtype(s.dtype, device)
    else:
        device = accelerator.device
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    torch.manual_seed(s.seed)
    with accelerator.local_main_process_first() if accelerator else contextlib.nullcontext():
        data, name = Path(s.data), s.teacher
        if s.mini:
            data = draw_mini(ROOT / s.data)
            name = str(ROOT / s.teacher) if (ROOT / s.teacher).is_dir() else s.teacher
        train_set = None if pairs_of else CocoCaptions(data, s.train_split, s.resolution)
        val_set = CocoCaptions(data, s.val_split, s.resolution, limit=s.final_samples)
        teacher = load_teacher(name, device, dtype if device.type == "cuda" else torch.float32)
        factor, too_few = 8 * teacher.vae_factor, "--batch-size {} is more than the {} training pictures"
        check({f"--resolution must be a multiple of {factor}": s.resolution > 0 and s.resolution % factor == 0,
               too_few.format(s.batch_size, train_set and len(train_set)): pairs_of or s.batch_size <= len(train_set)})
        config = config_of(teacher.unet) if config_of else student_config(
            teacher.unet, s.channels, s.layers, groups=s.groups, mid_block=s.mid_block)
        config["sample_size"] = s.resolution // teacher.vae_factor
        student = type(teacher.unet)(**config) if s.random_start else slice_unet(teacher.unet, config)
        for model in (student.to(device).train(), teacher.unet):
            model.to(memory_format=torch.channels_last)
        run.start()
        cache = ROOT / s.cache_folder
        make_folder(cache, "--cache-folder")
        how = dict(sampler=s.sampler, steps=s.sample_steps, guidance=s.guidance, seed=s.seed, size_px=s.resolution,
                   batch=s.eval_batch)
        evaluator = Evaluator(s.features, val_set, teacher, cache, device, how, load_reader(Path(name)) if s.mini else None,
                              accelerator)
        pairs = pairs_of(teacher) if pairs_of else TrainingPairs(
            train_set, teacher, cache if s.cache else None, caption_gb=s.cache_gb, device=device, workers=s.workers,
            flip=s.flip)
    if train_set:
        train_set.check_share(s.max_broken)
        check({too_few.format(s.batch_size, len(pairs)): s.batch_size <= len(pairs)})
    if main:
        if train_set:
            left_out = ", ".join(f"{n} {why}" for why, n in train_set.skipped.items() if n)
            print(f"{len(pairs):,} training pictures" + (f" (left out: {left_out}, such as {train_set.examples[0]})"
                                                         if left_out else ""))
        ours, theirs = (sum(p.numel() for p in unet.parameters()) for unet in (student, teacher.unet))
        print(f"student: {ours / 1e6:.2f} M parameters, {ours / theirs:.1%} of the teacher's U-Net")
    return World(teacher, student, pairs, evaluator, run, device, dtype)


def let_teacher_go(world: World, s):
    """Free the teacher's U-Net, once the evaluations have what they compare with, from the cache or made now."""
    for count in sorted({s.eval_samples, s.final_samples} if s.eval_every else {s.final_samples}):
        world.evaluator.teacher_side(count)
    world.teacher.unet = None


def one_cycle(optimizer, s) -> torch.optim.lr_scheduler.OneCycleLR:
    """Up to `s.lr` in the warm-up, at least one step, and down again on a cosine, for at least half a step."""
    warmup = min(max(s.warmup, 2 / s.steps), 1 - 0.5 / s.steps)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, total_steps=s.steps, pct_start=warmup)


class Learner:
    """The student with everything that training changes: AdamW, OneCycleLR, the loss scaler, the EMA, and `extra`, a
    module that is checkpointed with it but not kept: its parameters that require gradients are trained too."""

    def __init__(self, world: World, s, extra: torch.nn.Module | None = None):
        self.student, self.max_grad_norm = world.student, s.max_grad_norm
        self.extra = extra if extra is not None else torch.nn.Module()
        self.trained = [*self.student.parameters(), *(p for p in self.extra.parameters() if p.requires_grad)]
        self.optimizer = torch.optim.AdamW(self.trained, lr=s.lr, weight_decay=s.weight_decay,
                                           fused=world.device.type != "mps")
        self.scheduler = one_cycle(self.optimizer, s)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        self.ema = EMA(self.student, s.ema_decay)
        self.batch_size, self.kept = s.batch_size, ("student", "extra", "ema", "optimizer", "scheduler", "scaler")
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

    def agree(self, signal_number: int, step: int) -> int:
        """The signal to stop for, if any; where several processes train, they must find the same one."""
        return signal_number

    def save(self, folder: Path, step: int):
        """Write `state-<step>.pt`; the checkpoint before it stays, any older one goes."""
        parts = {name: getattr(self, name).state_dict() for name in self.kept}
        buffer = io.BytesIO()
        torch.save({"step": step, "skipped": self.skipped, **parts}, buffer)
        write_atomically(folder / f"state-{step:08d}.pt", buffer.getvalue())
        for old in sorted(folder.glob("state-????????.pt"))[:-2]:
            old.unlink()

    def restore(self, folder: Path) -> int:
        """Load the newest checkpoint that is whole and return its step; 0 if there is none."""
        for path in sorted(folder.glob("state-????????.pt"), reverse=True):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
                print(f"{path.name} is broken ({type(error).__name__}); trying the one before it")
                path.unlink()
                continue
            for name in self.kept:
                getattr(self, name).load_state_dict(state[name])
            self.skipped.copy_(state["skipped"])
            print(f"going on at step {state['step']:,}")
            return state["step"]
        return 0


def evaluate(world: World, learner: Learner, step: int, count: int) -> dict:
    """The scores of the student's EMA on `count` pictures; logs them, writes the sheet of samples and the curves."""
    wanted, _ = world.evaluator.teacher_side(count)
    with learner.ema.applied(learner.student):
        drawn, row = world.evaluator.student_side(learner.student.eval(), count)
    learner.student.train()
    if world.run.main:
        world.run.log(step=step, evaluation=row)
        world.run.sheet(step, {"teacher": wanted, "student": drawn}, world.evaluator.captions)
        world.run.curves()
    return row


def finish(world: World, learner: Learner, s, title: str):
    """The last evaluation; saves the student as a stock pipeline and prints the closing table."""
    with full_disk_is_one_line(world.run.folder, "with --resume; the trained weights are kept"):
        row = evaluate(world, learner, s.steps, s.final_samples)
        _, teacher_row = world.evaluator.teacher_side(row["samples"])
        if not world.run.main:
            return
        how = f"{row['samples']:,} samples, {s.sample_steps} {s.sampler.upper()} steps, guidance {s.guidance:g}"
        folder = world.run.folder / "student"
        card = model_card(f"{title}: {row['parameters'] / 1e6:.2f} M student", s, row, teacher_row, how)
        with learner.ema.applied(learner.student):
            save_student(learner.student.eval(), world.teacher, folder, card)
        print(f"\nThe student lies in {folder}, samples and curves beside it. {how}:\n")
        print(table({"teacher": teacher_row, "student": row}))
