"""What a training step needs of a GPU's memory at each version's own settings, without a GPU.

    python bench/memory.py

Runs each script's own loop at SD-1.5's true size on fake tensors (shapes and storages, no data) and follows every
storage from its making to its end. The operators' dtypes are those of CUDA's autocast to bf16. Not in it: the CUDA
context (0.3 to 0.6 GB), the libraries' workspaces and what the allocator loses to fragments; a GPU has not confirmed it.
"""

import contextlib
import importlib.util
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "v3")]

import torch
import torch.nn.functional as F
from stand_in import sd15
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import inception_v3

from common.cache import Batch
from common.run import table
from common.sampling import decode
from common.settings import check, parse
from common.teacher import Teacher, student_config
from common.training import World

SCRIPTS = {"V-1": "v1/1.py", "V-2.1": "v2/2.1.py", "V-2.2, --store 0": "v2/2.2.py", "V-3": "v3/train_student_kd.py"}


@dataclass
class Settings:
    batch_size: int = 0  # pictures a step; 0: each script's own
    steps: int = 2  # training steps; the second has all of the optimizer's state


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, in the allocator's blocks of 512 bytes."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage):
        if storage._cdata not in self.alive:
            size = -(-storage.nbytes() // 512) * 512
            self.alive.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.end, storage._cdata, size)

    def end(self, address, size):
        self.alive.discard(address)
        self.now -= size


class CudaAutocast(TorchFunctionMode):
    """Gives the operators that CUDA's autocast runs in fp32, and the CPU's does not, fp32 inputs."""

    fp32 = {F.group_norm, F.layer_norm, F.softmax, F.mse_loss, F.smooth_l1_loss}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.fp32 and torch.is_autocast_enabled("cpu"):
            args = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args]
        return func(*args, **kwargs or {})


def measure(script: str, s: Settings) -> dict:
    """One version's row, in GiB. The student's states are its weights, gradients, AdamW's moments and the EMA."""
    spec = importlib.util.spec_from_file_location("version", ROOT / script)
    version = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(version)
    v = version.Settings()
    v.batch_size, v.tensorboard = s.batch_size or v.batch_size, False
    if hasattr(v, "store"):
        v.store = 0  # with one no teacher is in memory, as in V-2.1
    if hasattr(v, "mixed_precision"):
        v.mixed_precision, v.cpu = "bf16", True
    memory, row, device = Memory(), {}, torch.device("cpu")

    def prepare(_, __=None, config_of=None, *___):
        from diffusers import DDPMScheduler

        torch.set_default_dtype(torch.bfloat16)
        parts = sd15(lambda kind, *args, **config: kind(*args, **config).eval().requires_grad_(False))
        torch.set_default_dtype(torch.float32)
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
        inception = inception_v3(weights=None, init_weights=False).eval()  # the evaluator's
        teacher = Teacher("sd15", tokenizer=None, noise_scheduler=scheduler, **parts)
        config = config_of(teacher.unet) if config_of else student_config(
            teacher.unet, v.channels, v.layers, groups=v.groups, mid_block=v.mid_block)
        config["sample_size"] = side = v.resolution // teacher.vae_factor
        student = type(teacher.unet)(**config).train()

        def draw(*_, parts=1, **__):
            n = v.batch_size // parts
            return Batch(torch.randn(n, 4, side, side), torch.randn(n, 77, 768), torch.randn(n, 4, side, side),
                         torch.zeros(n, dtype=torch.long))

        def steps(learner, *_):
            yield from range(s.steps)
            parts = [part for part in (teacher.unet, teacher.vae, teacher.text_encoder, inception) if part is not None]
            row["frozen"] = sum(p.nbytes for part in parts for p in part.parameters())
            freed = sum(p.nbytes for p in student.parameters() if p.grad is None)  # V-3 lets gradients go after each step
            row["states"], row["training"] = memory.now - row["frozen"] + freed, memory.peak
            memory.peak = memory.now
            # what an evaluation holds at most: the weights beside their average, a sampler's step, decoding, Inception-v3
            with torch.no_grad(), learner.ema.applied(student):
                latents, n = torch.randn(v.eval_batch, 4, side, side), 2 * v.eval_batch
                student.eval()(torch.randn(n, 4, side, side), torch.zeros(n), torch.randn(n, 77, 768))
                decode(teacher.vae, latents)
                inception(torch.randn(50, 3, 299, 299))
            row["evaluation"] = memory.peak

        run = SimpleNamespace(steps=steps, report=lambda **_: None, log=lambda **_: None)
        pairs = SimpleNamespace(draw=draw, empty=torch.zeros(1, 77, 768))
        evaluator = SimpleNamespace(teacher_side=lambda _: None)
        return World(teacher, student, pairs, evaluator, run, device, torch.bfloat16)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module))  # all is there
        stack.enter_context(mock.patch.multiple(version, prepare=prepare, finish=lambda *_: None))
        if hasattr(version, "Accelerator"):  # it looks at the norm's value, which nothing here has
            def clip(_, parameters, longest):
                torch.nn.utils.clip_grad_norm_(parameters, longest)

            stack.enter_context(mock.patch.object(version.Accelerator, "clip_grad_norm_", clip))
        for mode in (FakeTensorMode(), memory, CudaAutocast()):
            stack.enter_context(mode)
        version.main(v)
    gb = {name: size / 2**30 for name, size in row.items()}
    return {"batch": v.batch_size, "frozen parts": gb["frozen"], "student's states": gb["states"],
            "activations": gb["training"] - gb["states"] - gb["frozen"], "peak in training": gb["training"],
            "in evaluation": gb["evaluation"]}


def main(s: Settings):
    check({"--batch-size must not be negative": s.batch_size >= 0, "--steps must be at least 2": s.steps >= 2})
    print("GiB, SD-1.5's size, bf16 autocast\n")
    print(table({name: measure(script, s) for name, script in SCRIPTS.items()}))


if __name__ == "__main__":
    main(parse(Settings, __doc__))
