"""Adapt a teacher to the resolution of its students, before they learn from it.

    python checkpoints/adapt_teacher.py --mini     # the embedded teacher, which learned at 32 px, to 16 px
    python checkpoints/adapt_teacher.py            # SD-1.5, which learned at 512 px, to 64 px: checkpoints/sd15-64px

Then `python v2/2.2.py --teacher checkpoints/sd15-64px` learns from it like from any other.

The loss is the plain one, MSE(teacher(x_t), noise), on cached latents and caption embeddings, with a tenth of the captions
dropped. What depends on the resolution are convolutions and norms (ResAdapter, arXiv 2403.02084): low-rank adapters (LoRA,
arXiv 2106.09685) are trained on the resnets' and samplers' convolutions and on attention, the norms whole, all else stays.
In the end the adapters are merged, in fp32, and a stock pipeline folder is saved. `--full` trains every weight instead.
"""

import copy
import dataclasses
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from common.cache import TrainingPairs
from common.coco import CocoCaptions
from common.files import from_root, make_folder
from common.fitness import measure_fitness
from common.metrics import Evaluator
from common.mini import caption_scores
from common.precision import fastest_kernels, pick_dtype
from common.report import SHOWN, card_of, model_card, save_student, scores_table
from common.run import Run
from common.settings import first_line, parse, require, start
from common.teacher import load_teacher, load_unet
from common.trainer import SHARDED, Trainer, due, predict_noise, start_accelerator
from data.draw_mini import draw_mini


@dataclass
class Settings:
    mini: bool = False  # the embedded world: the teacher in checkpoints/mini-teacher and drawn scenes, all offline
    teacher: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a pipeline folder or a hub id
    data: str = "data/coco2017"  # a folder in COCO's format, or own pictures with .txt, metadata.jsonl or .csv captions
    train_split: str = "train2017"  # <data>/<split>/ and annotations/captions_<split>.json
    val_split: str = "val2017"  # the split that evaluation takes its captions and pictures from
    val_share: float = 0.05  # share of own pictures, which have no splits, that is held out for evaluation
    resolution: int = 64  # pixels a side that the teacher is adapted to
    flip: bool = False  # mirror half of the pictures, whatever their captions say of left and right
    out: str = "checkpoints/sd15-64px"  # the adapted teacher's folder; log, sheets and checkpoints: <out>-run
    resume: bool = False  # go on with the run in <out>-run
    half: bool = False  # save the adapted U-Net in fp16
    again: bool = False  # adapt a teacher that has been adapted to this resolution already
    # what is trained
    rank: int = 16  # of the low-rank adapters
    full: bool = False  # train every weight, in fp32: at SD-1.5's size that takes 17 GB and activations
    gradient_checkpointing: bool = False  # compute activations twice rather than keep them
    # training
    steps: int = 4_000  # optimizer steps
    batch_size: int = 64  # pictures a step
    lr: float = 2e-4  # OneCycleLR's highest learning rate
    warmup: float = 0.1  # share of the steps in which it rises
    weight_decay: float = 0.01  # AdamW's
    max_grad_norm: float = 1.0  # gradients longer than this are shortened to it
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    ema_decay: float = 0.999  # of the trained weights' moving average, which is what is evaluated and saved; 0: none
    # evaluation
    features: Literal["inception", "effnet-lite0"] = "inception"  # inception: FID, LPIPS; effnet-lite0: the embedded world's
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # ddpm or ddim
    sample_steps: int = 25  # of the sampler
    guidance: float = 5.0  # classifier-free guidance scale
    eval_every: int = 2_000  # steps between small evaluations; 0: none
    eval_samples: int = 500  # pictures of a small evaluation
    final_samples: int = 5_000  # pictures of the last one
    eval_batch: int = 100  # pictures sampled at a time
    # machine
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of the frozen weights and of autocast
    cache: bool = True  # keep latents and caption embeddings; --no-cache encodes them at every step
    cache_folder: str = "data/cache"  # seen from the repository: it serves all runs, and holds the evaluations' frozen side too
    cache_gb: float = 20.0  # at most this much for caption embeddings; the rest are encoded on the fly
    workers: int = 2  # processes that decode pictures for the cache; 0: this one
    max_broken: float = 0.05  # share of the pictures that may be missing, without caption or undecodable
    max_bad_steps: int = 20  # steps in a row without finite gradients that end the run
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between lines of metrics.jsonl
    track: Literal["none", "tensorboard", "trackio", "wandb"] = "none"  # where losses, scores and sheets are logged too
    seed: int = 0  # of everything random


MINI = dict(
    teacher="checkpoints/mini-teacher", data="data/mini", train_split="train", val_split="val", resolution=16,
    out="checkpoints/mini-teacher-16px", rank=12, steps=400, lr=2e-3, ema_decay=0.99,
    features="effnet-lite0", guidance=3.0, eval_every=200, eval_samples=100, final_samples=1_000, cache_gb=0.5, workers=0,
    save_every=100,
)

TARGETS = ["conv1", "conv2", "conv_shortcut", "conv", "to_q", "to_k", "to_v", "to_out.0"]  # the layers that get adapters


class Adapted(torch.nn.Module):
    """What of a U-Net is trained, as a module of its own: checkpoints, optimizer and EMA hold nothing else."""

    def __init__(self, unet):
        super().__init__()
        trained = {name.replace(".", "-"): p for name, p in unet.named_parameters() if p.requires_grad}
        self.trained = torch.nn.ParameterDict(trained)
        self.around = [unet]  # in a list, so that it is no submodule

    @property
    def unet(self):
        return self.around[0]

    @property
    def config(self):
        return self.unet.config

    def set_attn_processor(self, processor):
        self.unet.set_attn_processor(processor)

    def forward(self, *args, **kwargs):
        return self.unet(*args, **kwargs)


def require_adapters():
    """Raises SystemExit where peft is not installed or cannot work, which it says when it makes an adapter."""
    try:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(1, 1)))
    except ImportError as error:  # Colab's torchao is too old for it
        raise SystemExit(f"error: adapters cannot be made ({first_line(error)}): pip install peft, pip install -U torchao or "
                         "pip uninstall torchao, or train every weight with --full") from None


def make_trainable(unet, rank: int, full: bool):
    """Choose the weights of `unet` that are trained and turn them to fp32: all, or norms and new adapters."""
    if not full:
        from peft import LoraConfig

        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(full or "lora" in name or "norm" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@torch.no_grad()
def undo_rounding(unet, name: str):
    """Give the weights of the `unet` that are trained their values in the files of `name`, which its precision has rounded."""
    exact = dict(load_unet(name).named_parameters())
    for key, parameter in unet.named_parameters():
        if parameter.requires_grad and key in exact:  # adapters are not
            parameter.copy_(exact[key])


def average_beside(unet) -> Adapted:
    """A second U-Net for the moving average, which shares the frozen weights."""
    copies = {id(p): torch.nn.Parameter(p.detach().clone()) if p.requires_grad else p for p in unet.parameters()}
    return Adapted(copy.deepcopy(unet, copies))


def merge(name: str, rank: int, full: bool, trained: Adapted):
    """The teacher's U-Net in fp32, loaded anew, with what was trained merged into it."""
    unet = load_unet(name)
    make_trainable(unet, rank, full)
    parameters = dict(unet.named_parameters())
    with torch.no_grad():
        for key, value in trained.trained.items():
            parameters[key.replace("-", ".")].copy_(value)
    if not full:
        unet.fuse_lora()
        unet.unload_lora()
    return unet.eval().requires_grad_(False)


def adapted_to(teacher) -> int:
    """The resolution that the teacher's card says it was adapted to; 0 where it says nothing or cannot be read."""
    tags = card_of(str(teacher.folder())).get("tags") or []
    found = [tag for tag in map(str, tags) if tag.startswith("adapted-to-")]
    return int(found[0].removeprefix("adapted-to-").removesuffix("px")) if found else 0


def main(s: Settings):
    out = Path(s.out)
    accelerator = start_accelerator(s.device, track=s.track, out=f"{out}-run")
    whole = accelerator.distributed_type not in SHARDED
    require(whole, "FSDP and DeepSpeed cannot adapt a teacher; on several GPUs take accelerate launch --multi_gpu")
    if not s.full:
        require_adapters()
    dtype = pick_dtype(s.dtype, accelerator.device)
    run = Run(f"{out}-run", s, s.resume, accelerator)
    require(run.begun or not out.exists(), f"{out} is there already; choose another --out, or remove it")

    # data and teacher
    data = draw_mini(ROOT / s.data) if s.mini else Path(from_root(s.data))
    train_set = CocoCaptions(data, s.train_split, s.resolution, part=(s.val_share, 1), reach=s.steps * s.batch_size)
    val_set = CocoCaptions(data, s.val_split, s.resolution, limit=s.final_samples, part=(0, s.val_share))
    accelerator.print(f"data: {data}, captions in {val_set.format}")
    name = from_root(s.teacher)
    teacher = load_teacher(name, accelerator.device, dtype)
    noise_scheduler, side = teacher.noise_scheduler, teacher.latent_side(s.resolution)
    known = adapted_to(teacher)
    require(known != s.resolution or s.again, f"{s.teacher} has been adapted to {known} px already, as its card says; "
            "--again adapts it once more")
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
    fitness = measure_fitness(teacher, evaluator)
    accelerator.print(f"{pairs.describe()}\n{evaluator.describe()}\n{fitness.table()}")
    run.log_once(**fitness._asdict())
    if s.eval_every:
        evaluator.teacher_images(s.eval_samples)
    scores_before = evaluator.teacher_scores(s.final_samples)

    torch.manual_seed(s.seed)  # of the adapters' start, whatever was cached before
    make_trainable(teacher.unet, s.rank, s.full)
    if dtype != torch.float32:
        undo_rounding(teacher.unet, name)
    if not s.full:  # beside frozen weights in channels_last torch 2.13's backward pass of an adapter crashes on CPUs
        teacher.unet.to(memory_format=torch.contiguous_format)
    average, adapted = average_beside(teacher.unet), Adapted(teacher.unet)
    count = sum(p.numel() for p in adapted.parameters())
    accelerator.print(f"trained: {count / 1e6:.2f} M weights, {count / teacher.parameters:.1%} of the teacher's U-Net")
    if s.gradient_checkpointing:
        teacher.unet.enable_gradient_checkpointing()
    teacher.unet.register_to_config(sample_size=side)
    dtype = fastest_kernels(run, adapted, dtype, auto=s.dtype == "auto", steps=s.steps, batch_size=s.batch_size,
                            tokens=teacher.tokenizer.model_max_length)
    trainer = Trainer(accelerator, adapted, ema_student=average, dtype=dtype, steps=s.steps, batch_size=s.batch_size, lr=s.lr,
                      warmup=s.warmup, weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, ema_decay=s.ema_decay)
    first_step = trainer.restore(run.folder) if s.resume else 0
    run.begin("adapting", first_step)
    for step in range(first_step, s.steps):
        if due(step, s.eval_every) and step not in run.evaluated:
            run.record(step, evaluator.evaluate(average.unet, s.eval_samples, dtype))

        batch = pairs.draw(step, s.caption_dropout)
        noisy = noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)  # sqrt(a_t) x_0 + sqrt(1 - a_t) noise
        with trainer.autocast():
            noise_pred = predict_noise(trainer.model, noisy, batch)  # (B, 4, h, w)
        loss = F.mse_loss(noise_pred, batch.noise)
        lr = trainer.lr
        trainer.step(loss)  # backward, clip, AdamW, OneCycleLR, EMA

        done = step + 1
        run.log_step(done, trainer, loss=loss, lr=lr)
        stopping = run.stop_requested(done)
        if stopping or due(done, s.save_every) or done == s.steps:
            run.save(trainer)
        if stopping:
            run.leave(done)

    evaluation = evaluator.evaluate(average.unet, s.final_samples, dtype)
    with trainer.autocast():
        fitness = measure_fitness(dataclasses.replace(teacher, unet=average.unet, fingerprints={}), evaluator)
    evaluation.scores["parameters"] = teacher.parameters  # once the adapters are merged
    run.record(s.steps, evaluation)
    run.log(step=s.steps, **fitness._asdict())
    if accelerator.is_main_process:
        unet = merge(name, s.rank, s.full, average)
        unet.register_to_config(sample_size=side)  # what the pipeline draws by itself
        title = f"{Path(s.teacher).name}, adapted to {s.resolution} px"
        card = model_card(title, teacher.name, val_set, evaluation.scores, scores_before, evaluation.how, kind="teacher",
                          tag=f"adapted-to-{s.resolution}px", captions=evaluation.captions[:SHOWN])
        save_student(unet.half() if s.half else unet, teacher, out, card, images=evaluation.images)
        reader = Path(name) / "category_reader.safetensors"  # the embedded world's
        if reader.is_file():
            shutil.copy(reader, out)
        print(f"\nThe adapted teacher lies in {out}, samples and curves in {run.folder}. {evaluation.how}:\n")
        print(scores_table({"before": scores_before, "after": evaluation.scores}))
        more = "Give it more of them: --steps and another --out"
        print(f"\n{fitness.describe(s.resolution, 'it was adapted for too few steps', more)}")
    accelerator.end_training()


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, MINI))
