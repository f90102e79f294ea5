"""V-3: distil a pruned student (`sd_small`, `sd_tiny`) on many GPUs and machines, with Accelerate.

    python v3/train_student_kd.py --mini                            # the embedded world, one process
    accelerate launch v3/train_student_kd.py --size sd_small --channels 320,640,1280,1280   # on what Accelerate was told
    accelerate launch v3/train_student_kd.py --shards data/shards   # WebDataset shards in place of COCO

The loss is BK-SDM's (arXiv 2305.15798): task_weight MSE(student, noise) + kd_weight MSE(student, teacher)
+ feature_weight mean_k |P_k f_k^student - f_k^teacher|^2 / rms(f_k^teacher)^2 over the blocks' outputs f_k, which
forward hooks catch; P_k is a 1 x 1 projection where the student's channels were sliced.
Step i draws its global batch from (seed, i), and each process takes its share of it: the number of processes changes
nothing but the speed.
"""

import contextlib
import copy
import importlib.util
import math
import shutil
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, gather_object, set_seed
from huggingface_hub import HfApi
from prepare_unet_small import SIZES, pruned_config

from common.cache import TeacherStore
from common.ema import EMA
from common.features import FeatureMatching, block_names, match_features
from common.settings import check, first_line, parse
from common.training import evaluate, finish, let_teacher_go, one_cycle, prepare


@dataclass
class Settings:
    mini: bool = False  # the embedded world: the teacher in checkpoints/mini-teacher and drawn scenes, all offline
    teacher: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a pipeline folder or a hub id
    data: str = "data/coco2017"  # a folder in COCO's format
    train_split: str = "train2017"  # <data>/<split>/ and annotations/captions_<split>.json
    val_split: str = "val2017"  # the split that evaluation takes its captions and pictures from
    shards: str = ""  # a folder or pattern of WebDataset .tar shards to train on in place of the train split
    resolution: int = 64  # pixels a side
    flip: bool = False  # mirror half of the pictures, whatever their captions say of left and right
    out: str = "checkpoints/v3"  # the run's folder
    resume: bool = False  # go on with the run in --out
    # the student
    size: str = "sd_tiny"  # sd_small (579 M of SD-1.5's 860 M) or sd_tiny (323 M), before --channels
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
    optimizer: str = "adamw"  # adamw, or adamw8bit where bitsandbytes is installed
    max_grad_norm: float = 1.0  # gradients longer than this are shortened to it
    task_weight: float = 1.0  # of the error against the noise
    kd_weight: float = 1.0  # of the error against the teacher's prediction
    feature_weight: float = 0.1  # of the blocks' outputs; 0: none
    store: int = 0  # draws of each picture whose teacher predictions are cached (with --feature-weight 0); 0: fresh draws
    feature_blocks: tuple[str, ...] = ()  # whose outputs are matched; none given: all that have the teacher's size
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    ema_decay: float = 0.999  # of the weights' moving average, which is what is evaluated and saved; 0: none
    mixed_precision: str = ""  # no, fp16 or bf16; empty: what `accelerate config` was told
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, slower
    compile: bool = False  # torch.compile the student
    # evaluation
    features: str = "inception"  # inception (FID, LPIPS) or effnet-lite0 (the embedded world's own names)
    sampler: str = "ddpm"  # ddpm or ddim
    sample_steps: int = 25  # of the sampler
    guidance: float = 5.0  # classifier-free guidance scale
    eval_every: int = 5_000  # steps between small evaluations; 0: none
    eval_samples: int = 500  # pictures of a small evaluation
    final_samples: int = 5_000  # pictures of the last one
    eval_batch: int = 100  # pictures sampled at a time, by each process
    # machine
    cpu: bool = False  # stay on the CPU where there is a GPU
    cache: bool = True  # keep latents and caption embeddings; --no-cache encodes them at every step
    cache_folder: str = "data/cache"  # where: it serves all runs, and holds the evaluations' frozen side too
    cache_gb: float = 20.0  # at most this much for caption embeddings; the rest are encoded on the fly
    workers: int = 0  # processes that decode pictures; 0: this one
    max_broken: float = 0.05  # share of the pictures that may be missing, without caption or undecodable
    max_bad_steps: int = 20  # steps in a row without finite gradients that end the run
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints that stay
    log_every: int = 20  # steps between lines of metrics.jsonl
    tensorboard: bool = True  # also log to <out>/tensorboard
    push_to_hub: str = ""  # a hub repository (user/name) to upload the student to in the end
    seed: int = 0  # of everything random


MINI = dict(
    teacher="checkpoints/mini-teacher", data="data/mini", train_split="train", val_split="val", resolution=32,
    out="checkpoints/v3-mini", channels=(64, 64, 16), steps=1_000, lr=2e-3, ema_decay=0.99,
    features="effnet-lite0", guidance=3.0, eval_every=500, eval_samples=100, final_samples=1_000, cache_gb=0.5,
    save_every=250,
)


class Distillation(torch.nn.Module):
    """Student and projections as one module, so that one wrapper (DDP, FSDP, DeepSpeed) sees every gradient."""

    def __init__(self, student: torch.nn.Module, matching: FeatureMatching | None):
        super().__init__()
        self.student, self.matching = student, matching

    def forward(self, noisy, timesteps, hidden, noise, teacher_pred) -> torch.Tensor:
        """(3,) task, KD and feature loss. The teacher's pass comes before: its hooks have caught its features."""
        dtype = self.student.dtype  # DeepSpeed's weights are in bf16 or fp16, and it switches autocast off
        noise_pred = self.student(noisy.to(dtype), timesteps, hidden.to(dtype), return_dict=False)[0].float()
        feature_loss = self.matching() if self.matching else noise_pred.new_zeros(())
        return torch.stack([F.mse_loss(noise_pred, noise), F.mse_loss(noise_pred, teacher_pred), feature_loss])


def gathered(value):
    """The whole of what FSDP may have sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class AcceleratedLearner:
    """What `Run.steps` and `evaluate` need of a learner, over Accelerate; checkpoints are `accelerator.save_state`'s."""

    def __init__(self, accelerator: Accelerator, model: Distillation, world, s: Settings):
        self.accelerator, self.student, self.batch_size, self.keep = accelerator, model.student, s.batch_size, s.keep
        self.max_grad_norm, self.sharded = s.max_grad_norm, None
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            # the average, the evaluations and the saved student take whole weights in fp32
            self.sharded, self.student = model.student, copy.deepcopy(model.student).requires_grad_(False)
            model.to(memory_format=torch.contiguous_format)  # as both demand
        if accelerator.distributed_type == DistributedType.FSDP:
            accelerator.state.fsdp_plugin.mixed_precision_policy = None  # autocast lowers the precision, as elsewhere
        if s.optimizer == "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit as Optimizer
            except ImportError:
                raise SystemExit("error: --optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes") from None
        else:
            Optimizer = torch.optim.AdamW
        if deepspeed := accelerator.state.deepspeed_plugin:  # it clips and steps inside `backward`
            deepspeed.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": s.batch_size // (accelerator.num_processes * s.accumulate),
                "gradient_accumulation_steps": s.accumulate,
                "gradient_clipping": s.max_grad_norm}
        optimizer = Optimizer(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
        self.scheduler = one_cycle(optimizer, s)
        self.ema = EMA(self.student, s.ema_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.scheduler, self.ema, self)
        self.skipped = [0, 0]  # steps without finite gradients: in all, in a row

    @property
    def lr(self) -> float:
        return self.scheduler.get_last_lr()[0]

    @torch.no_grad()
    def gather_weights(self):
        """Where FSDP or DeepSpeed trains other tensors than the whole student's: bring that up to date."""
        if self.sharded is not None:
            for whole, share in zip(self.student.parameters(), self.sharded.parameters()):
                whole.copy_(gathered(share))

    def backward(self, loss: torch.Tensor, step: int):
        """Add the gradients of one pass; after the last one of a batch, step. Accelerate averages over the passes."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            fine = norm is None or math.isfinite(gathered(norm))
            self.skipped = [self.skipped[0] + (not fine), 0 if fine else self.skipped[1] + 1]
            if fine or self.accelerator.scaler is not None:  # the fp16 scaler skips such a step by itself
                self.optimizer.step()
            self.scheduler.step()
            self.gather_weights()
            self.ema.update(self.student, step)
            self.optimizer.zero_grad()

    def bad_steps(self) -> tuple[int, int]:
        return tuple(self.skipped)

    def state_dict(self) -> dict:  # what the checkpoints keep beyond the parts that Accelerate knows
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict):
        self.skipped = state["skipped"]

    def agree(self, signal_number: int, step: int) -> int:
        """The processes compare notes at every tenth step only."""
        if self.accelerator.num_processes == 1:
            return signal_number
        if step % 10:
            return 0
        seen = torch.tensor([signal_number], device=self.accelerator.device)
        return int(self.accelerator.gather(seen).max())

    def save(self, folder: Path, step: int):
        """`checkpoint-<step>/`: written beside its place and then renamed, so what has the name is whole."""
        final, partial = folder / f"checkpoint-{step:08d}", folder / "checkpoint.partial"
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in sorted(folder.glob("checkpoint-????????"))[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> int:
        """The step of the newest checkpoint that loads, 0 without any. Raises SystemExit where none loads, or the processes
        find different ones."""
        step = self.load_newest(folder)
        if len(set(gather_object([step]))) > 1:
            raise SystemExit("error: the processes find different checkpoints; --out must be a disk that all machines share")
        return step

    def load_newest(self, folder: Path) -> int:
        found = False
        for path in sorted(folder.glob("checkpoint-????????"), reverse=True):
            try:
                self.accelerator.load_state(str(path))
            except Exception as error:  # whatever a damaged file makes the loaders raise
                self.accelerator.print(f"{path.name} cannot be loaded ({first_line(error)}); trying the one before it")
                found = True
                continue
            self.gather_weights()
            step = int(path.name.split("-")[1])
            self.accelerator.print(f"going on at step {step:,}")
            return step
        check({f"no checkpoint in {folder} can be loaded; resume with as many processes, of the same kind, as wrote it, or "
               "begin anew in another --out": not found})
        return 0


@contextlib.contextmanager
def a_hub_error_is_one_line(repository: str, comfort: str = ""):
    try:
        yield
    except Exception as error:  # what the client raises changes with the library that it speaks HTTP through
        raise SystemExit(f"error: --push-to-hub {repository} failed ({first_line(error)}){comfort}") from None


def main(s: Settings):
    check({f"--size must be one of {', '.join(SIZES)}": s.size in SIZES,
           "--mixed-precision must be no, fp16 or bf16": s.mixed_precision in ("", "no", "fp16", "bf16"),
           "--optimizer must be adamw or adamw8bit": s.optimizer in ("adamw", "adamw8bit"),
           "--tensorboard needs its package: pip install -r v3/requirements.txt, or --no-tensorboard":
               not s.tensorboard or importlib.util.find_spec("tensorboard") is not None,
           "--shards needs webdataset: pip install -r v3/requirements.txt":
               not s.shards or importlib.util.find_spec("webdataset") is not None,
           "--keep and --accumulate must be at least 1": min(s.keep, s.accumulate) >= 1,
           "--store must not be negative": s.store >= 0,
           "--store needs the cache: leave out --no-cache": s.cache or not s.store,
           "--store holds no features and no shards; it needs --feature-weight 0 and --data":
               not s.store or not (s.feature_weight or s.shards)})
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=s.accumulate, mixed_precision=s.mixed_precision or None, cpu=s.cpu,
            log_with="tensorboard" if s.tensorboard else None, step_scheduler_with_optimizer=False,
            project_config=ProjectConfiguration(project_dir=s.out, logging_dir=s.out),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])  # the others wait for the caches
    except (ImportError, ValueError) as error:
        raise SystemExit(f"error: Accelerate cannot start: {error}") from None
    deepspeed, fsdp = accelerator.state.deepspeed_plugin, getattr(accelerator.state, "fsdp_plugin", None)
    check({"with DeepSpeed the zero_stage must be 1 or 2 (v3/configs/deepspeed.yaml)":
               not deepspeed or deepspeed.zero_stage in (1, 2),
           "with DeepSpeed nothing may be offloaded (v3/configs/deepspeed.yaml)": not deepspeed or all(
               device in (None, "none") for device in (deepspeed.offload_optimizer_device, deepspeed.offload_param_device)),
           "--optimizer adamw8bit does not work with FSDP": not fsdp or s.optimizer == "adamw",
           "with FSDP the fsdp_version must be 2 (v3/configs/fsdp.yaml)": not fsdp or fsdp.fsdp_version == 2,
           "Megatron-LM is not supported": accelerator.distributed_type != DistributedType.MEGATRON_LM})

    def shard_pairs(teacher):
        from coco_dataset import ShardPairs

        return ShardPairs(s.shards, teacher, size_px=s.resolution, seed=s.seed, rank=accelerator.process_index,
                          processes=accelerator.num_processes, workers=s.workers, device=accelerator.device, flip=s.flip)

    if s.push_to_hub and accelerator.is_main_process:  # a missing login shows now, not after the training
        with a_hub_error_is_one_line(s.push_to_hub):
            HfApi().whoami()
    shares = accelerator.num_processes * s.accumulate
    set_seed(s.seed)
    world = prepare(s, {
        f"--batch-size must be a multiple of {shares}, processes x --accumulate": s.batch_size % shares == 0,
        "--caption-dropout must lie in 0..1": 0 <= s.caption_dropout <= 1,
        "--task-weight, --kd-weight and --feature-weight must not be negative, nor all be 0":
            min(s.task_weight, s.kd_weight, s.feature_weight) >= 0 < s.task_weight + s.kd_weight + s.feature_weight,
    }, lambda unet: pruned_config(unet, s.size, s.channels, s.groups), accelerator, shard_pairs if s.shards else None)
    noise_scheduler = world.teacher.noise_scheduler
    if s.gradient_checkpointing:
        world.student.enable_gradient_checkpointing()
    if s.compile:
        world.student.compile()
    innermost = f"down_blocks.{len(world.student.down_blocks) - 1}"  # sd_tiny's does not halve its output, the teacher's does
    blocks = s.feature_blocks or tuple(b for b in block_names(world.student) if s.size == "sd_small" or b != innermost)
    matching = match_features(world, blocks, F.mse_loss) if s.feature_weight else None
    learner = AcceleratedLearner(accelerator, Distillation(world.student, matching), world, s)
    if s.tensorboard:
        accelerator.init_trackers("tensorboard")
    store = None
    if s.store:
        store = TeacherStore(world.pairs, world.teacher_pred, [s.caption_dropout] * s.store)
        let_teacher_go(world, s)
    weights = torch.tensor([s.task_weight, s.kd_weight, s.feature_weight], device=accelerator.device)

    def small_evaluation(step: int, count: int) -> dict:
        row = evaluate(world, learner, step, count)
        accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=step)
        return row

    for step in world.run.steps(learner, s, "V-3", small_evaluation):
        total, lr = torch.zeros(3, device=accelerator.device), learner.lr
        for share in range(s.accumulate):
            with accelerator.accumulate(learner.model):
                part = accelerator.process_index * s.accumulate + share
                if store:
                    (latents, hidden, noise, timesteps), teacher_pred = store.draw(
                        step, s.steps, s.batch_size, s.seed, part=part, parts=shares)
                else:
                    latents, hidden, noise, timesteps = world.pairs.draw(
                        step, s.batch_size, s.caption_dropout, s.seed, part=part, parts=shares)
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                with world.autocast():
                    if not store:
                        teacher_pred = world.teacher_pred(noisy, timesteps, hidden)
                    losses = learner.model(noisy, timesteps, hidden, noise, teacher_pred)
                learner.backward((weights * losses).sum(), step)
                total += losses.detach() / s.accumulate
        due = (step + 1) % s.log_every == 0 or step + 1 == s.steps
        if due:
            total = accelerator.reduce(total, "mean")
        values = dict(zip(("task_loss", "kd_loss", "feature_loss"), total), loss=(weights * total).sum(), lr=lr)
        world.run.report(**values)
        if due:
            accelerator.log({name: float(value) for name, value in values.items()}, step=step + 1)

    finish(world, learner, s, "V-3")
    accelerator.end_training()
    if s.push_to_hub and accelerator.is_main_process:
        with a_hub_error_is_one_line(s.push_to_hub, "; the student itself is saved"):
            HfApi().create_repo(s.push_to_hub, exist_ok=True)
            HfApi().upload_folder(repo_id=s.push_to_hub, folder_path=world.run.folder / "student")


if __name__ == "__main__":
    main(parse(Settings, __doc__, MINI))
