"""A student's optimization on Accelerate: precision, AdamW, OneCycleLR, clipping, EMA, checkpoints; one process or many."""

import importlib.util
import os
import re
import shutil
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object

from common.files import full_disk_is_one_line, put_in_place
from common.precision import autocast, strides_for
from common.settings import first_line, require

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def start_accelerator(device: str, accumulate: int = 1, track: str = "none", out: str | None = None,
                      compile: bool = False) -> Accelerator:
    """Accelerate on `device`: auto (CUDA, then MPS, then the CPU), cuda, cuda:N, mps or cpu; `accelerate config` is not needed.

    It is told of no precision: `common.precision` and `Trainer.autocast` see to that on every device alike. (DeepSpeed
    lowers the weights by itself and must know.) `track` names the package that `Run.log` also logs to, `out` the run's
    folder. With `compile` something small is compiled, before hours of caching show that nothing can be. Raises SystemExit
    where the named device or package is not there, nothing compiles or the launch cannot work.
    """
    tracked = track == "none" or importlib.util.find_spec(track) is not None
    require(tracked, f"--track {track} needs its package: pip install {track}")
    known = re.fullmatch(r"auto|cuda(:\d+)?|mps|cpu", device)
    require(known, "--device must be auto, cuda, cuda:N, mps or cpu")
    there = (device in ("auto", "cpu") or device == "mps" and torch.backends.mps.is_available()
             or device.startswith("cuda") and int(device[5:] or 0) < torch.cuda.device_count())
    require(there, f"--device {device}: this torch finds no such device; choose --device cpu, or install torch for it")
    if device == "mps" or ":" in device:
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        require(alone, f"--device {device} is one device; several processes need --device cuda")
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
        if ":" in device:  # Accelerate leaves the first one current, whose memory and precision we would be told
            torch.cuda.set_device(device)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    try:
        accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision=None if deepspeed else "no", gradient_accumulation_steps=accumulate,
            step_scheduler_with_optimizer=False, log_with=None if track == "none" else track, project_dir=out,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])  # the others wait for the caches
    except (ImportError, ValueError) as error:
        raise SystemExit(f"error: Accelerate cannot start: {error}") from None
    same = accelerator.gradient_accumulation_steps == accumulate
    require(same, "the launcher's gradient accumulation is not --accumulate; leave it out there")
    kind, plugin = accelerator.distributed_type, accelerator.state.deepspeed_plugin
    if plugin:
        where = "(v3/configs/deepspeed.yaml)"
        require(plugin.zero_stage in (1, 2), f"with DeepSpeed the zero_stage must be 1 or 2 {where}")
        offloaded = {plugin.offload_optimizer_device, plugin.offload_param_device} - {None, "none"}
        require(not offloaded, f"with DeepSpeed nothing may be offloaded {where}")
    if kind == DistributedType.FSDP:
        fsdp = accelerator.state.fsdp_plugin
        require(fsdp.fsdp_version == 2, "with FSDP the fsdp_version must be 2 (v3/configs/fsdp.yaml)")
        fsdp.mixed_precision_policy = None  # autocast lowers the precision, as elsewhere
    require(kind != DistributedType.MEGATRON_LM, "Megatron-LM is not supported")
    why = ", as this torch finds no GPU" if device == "auto" and accelerator.device.type == "cpu" else ""
    accelerator.print(f"device: {accelerator.device}{why}")
    if compile:
        try:
            torch.compile(torch.sin)(torch.zeros(1, device=accelerator.device))
        except RuntimeError as error:
            raise SystemExit(f"error: --compile does not work here: {first_line(error)}") from None
    return accelerator


def predict_noise(unet, noisy: torch.Tensor, batch) -> torch.Tensor:
    """(B, 4, h, w) float32: what `unet` takes for the noise in `noisy`."""
    dtype = next(unet.parameters()).dtype
    encoder_hidden_states = batch.encoder_hidden_states.to(dtype)
    return unet(noisy.to(dtype), batch.timesteps, encoder_hidden_states, return_dict=False)[0].float()


def before_guidance(unet, noise_pred: torch.Tensor, noisy: torch.Tensor, batch, empty: torch.Tensor,
                    guidance: float) -> torch.Tensor:
    """(B, 4, h, w): what `unet`'s guided prediction `noise_pred` was made from, eps_empty + (eps - eps_empty) / guidance, where
    eps_empty is its own for the `empty` caption's states (1, tokens, width), held fixed (arXiv 2501.15420)."""
    without_captions = batch._replace(encoder_hidden_states=empty.expand_as(batch.encoder_hidden_states))
    with torch.no_grad():
        pred_empty = predict_noise(unet, noisy, without_captions)
    return pred_empty + (noise_pred - pred_empty) / guidance


def due(done: int, every: int) -> bool:
    """Whether `done` steps, at least one, are a multiple of `every`; never where that is 0."""
    return every > 0 and done > 0 and done % every == 0


def one_cycle(optimizer, lr: float, warmup: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Up to `lr` in the warm-up, a share of the steps and at least one, and down again on a cosine, for at least half a step.
    AdamW's beta1 moves too, between 0.85 and 0.95 against the learning rate, as in Smith & Topin (arXiv 1708.07120)."""
    warmup = min(max(warmup, 2 / steps), 1 - 0.5 / steps)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=warmup)


def gathered(value: torch.Tensor) -> torch.Tensor:
    """The whole of what FSDP may have sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class Trainer:
    """The student with everything that training changes. What is evaluated and saved is `ema_student`, a U-Net whose weights
    are the exponential moving average of the trained ones.

    `model` is the module that is trained, if that is more than the student; its forward pass is `trainer.model(...)`.
    `ema_student` must be given where the student is no U-Net: another module of its kind.
    `also_saved`: modules that the optimizer does not train but whose weights change; every checkpoint holds them.
    """

    def __init__(self, accelerator: Accelerator, student, model=None, *, dtype: torch.dtype, steps: int, batch_size: int,
                 lr: float, warmup: float, weight_decay: float, max_grad_norm: float, ema_decay: float,
                 optimizer: str = "adamw", keep: int = 2, ema_student=None,
                 also_saved: dict[str, torch.nn.Module] | None = None):
        self.accelerator, self.student, self.dtype, self.keep = accelerator, student, dtype, keep
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.done_steps = 0
        self.skipped = torch.zeros(2, device=accelerator.device)  # steps without finite gradients: in all, in a row
        self.ema_student = ema_student or type(student).from_config(student.config)
        self.ema_student.to(accelerator.device).eval().requires_grad_(False)
        sharded = accelerator.distributed_type in SHARDED
        # FSDP and DeepSpeed demand plain strides
        strides = torch.contiguous_format if sharded else strides_for(accelerator.device, dtype)
        self.ema_student.to(memory_format=strides).load_state_dict(student.state_dict())
        self.also_saved = {"ema_student": self.ema_student, **(also_saved or {})}

        model = (student if model is None else model).train()
        model.to(memory_format=strides)
        if plugin := accelerator.state.deepspeed_plugin:  # it clips and steps inside of `backward`
            shares = accelerator.num_processes * accelerator.gradient_accumulation_steps
            plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": batch_size // shares,
                                        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
                                        "gradient_clipping": max_grad_norm}
        self.fused = optimizer == "adamw" and not sharded and accelerator.device.type != "mps"
        adamw = make_adamw(optimizer, model, lr, weight_decay, self.fused)
        self.scheduler = one_cycle(adamw, lr, warmup, steps)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=dtype == torch.float16 and not plugin)
        self.model, self.optimizer = accelerator.prepare(model, adamw)

    @property
    def lr(self) -> float:
        return self.scheduler.get_last_lr()[0]

    def autocast(self):
        return autocast(self.accelerator.device, self.dtype)

    def step(self, loss: torch.Tensor):
        """Add the gradients of `loss`; after the last pass of a batch: clip, AdamW, OneCycleLR, EMA.

        A step without finite gradients is left out and counted. Nothing here waits for the device, but where the optimizer is
        not fused (MPS, FSDP, 8 bits).
        """
        self.accelerator.backward(self.scaler.scale(loss))
        if not self.accelerator.sync_gradients:
            return
        adamw = self.optimizer.optimizer  # Accelerate's wrapper would ask the scaler for its scale, and wait
        self.scaler.unscale_(adamw)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        norm = torch.as_tensor(0.0 if norm is None else gathered(norm), device=self.skipped.device)  # DeepSpeed has a number
        bad = (~torch.isfinite(norm)).float()
        self.skipped = torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad])
        if self.scaler.is_enabled():
            self.scaler.step(adamw)
            self.scaler.update()
        elif self.fused:  # the fused kernel looks at found_inf itself
            adamw.found_inf = bad
            adamw.step()
        elif not bad:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self._average()
        self.done_steps += 1

    @torch.no_grad()
    def _average(self):
        """ema <- d ema + (1 - d) weight, with d = min(ema_decay, (1 + step) / (10 + step)) so that the start is forgotten."""
        decay = min(self.ema_decay, (1 + self.done_steps) / (10 + self.done_steps))
        weights = [gathered(p.detach()).float() for p in self.student.parameters()]
        torch._foreach_lerp_(list(self.ema_student.parameters()), weights, 1 - decay)

    def bad_steps(self) -> tuple[int, int]:
        """How many steps were left out, in all and in a row until now."""
        in_all, in_a_row = self.skipped.tolist()
        return int(in_all), int(in_a_row)

    def save(self, folder: Path):
        """`checkpoint-<step>/`: written beside its place and then renamed, so what has the name is whole."""
        final, partial = folder / f"checkpoint-{self.done_steps:08d}", folder / "checkpoint.partial"
        with full_disk_is_one_line(folder, "with --resume; the last checkpoint is kept", remove=partial):
            self.accelerator.save_state(str(partial))
            if self.accelerator.is_main_process:
                ours = {"done_steps": self.done_steps, "skipped": self.skipped, "scaler": self.scaler.state_dict(),
                        "scheduler": self.scheduler.state_dict()}
                modules = {name: module.state_dict() for name, module in self.also_saved.items()}
                torch.save(ours | modules, partial / "trainer.pt")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            put_in_place(partial, final)
            for old in sorted(folder.glob("checkpoint-????????"))[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)  # or at the next step that saves, if a file of it is open
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> int:
        """Load the newest checkpoint that is whole and return its step; 0 where there is none.

        Raises SystemExit where none loads, or where the processes find different ones.
        """
        self.done_steps, found = 0, sorted(folder.glob("checkpoint-????????"), reverse=True)
        loaded = next((path for path in found if self._load(path)), None)
        require(loaded or not found, f"no checkpoint in {folder} can be loaded; resume with as many processes, of the same "
                "kind, as wrote it, or begin anew in another --out")
        same = len(set(gather_object([self.done_steps]))) == 1
        require(same, "the processes find different checkpoints; --out must be a disk that all machines share")
        if loaded:
            self.accelerator.print(f"going on at step {self.done_steps:,}")
        return self.done_steps

    def _load(self, checkpoint: Path) -> bool:
        try:
            state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
            self.accelerator.load_state(str(checkpoint))
            self._fit_optimizer()
            for name, module in self.also_saved.items():
                module.load_state_dict(state[name])
            self.scheduler.load_state_dict(state["scheduler"])
            if state["scaler"]:  # empty where the run was not in fp16 until now
                self.scaler.load_state_dict(state["scaler"])
            self.skipped.copy_(state["skipped"])
        except Exception as error:  # whatever a damaged file makes the loaders raise
            self.accelerator.print(f"{checkpoint.name} is broken ({first_line(error)}); trying the one before it")
            return False
        self.done_steps = state["done_steps"]
        return True

    def _fit_optimizer(self):
        """Give AdamW's state this run's kernel and strides: a checkpoint brings those of the device that wrote it, and a fused
        kernel takes moments element by element as they lie in memory."""
        adamw = self.optimizer.optimizer
        if self.accelerator.distributed_type in SHARDED or not isinstance(adamw, torch.optim.AdamW):
            return
        for group in adamw.param_groups:
            group["fused"] = self.fused
            for parameter in group["params"]:
                if state := adamw.state.get(parameter):  # none of a weight that has had no gradient yet
                    state["step"] = state["step"].to(parameter.device if self.fused else "cpu")
                    for moment in ("exp_avg", "exp_avg_sq"):
                        state[moment] = torch.empty_like(parameter).copy_(state[moment])


def make_adamw(name: str, model, lr: float, weight_decay: float, fused: bool):
    """AdamW, or its 8-bit kin. Raises SystemExit where that is not installed."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise SystemExit("error: --optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes") from None
    return AdamW8bit(model.parameters(), lr=lr, weight_decay=weight_decay)
