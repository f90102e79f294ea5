"""What a training step needs of a GPU's memory at each version's own settings, without a GPU.

    python bench/memory.py

Runs each script's own `main` at SD-1.5's true size on fake tensors (shapes and storages, no data) and follows every
storage from its making to its end. The operators' dtypes are those of CUDA's autocast to bf16. Not in it: the CUDA
context (0.3 to 0.6 GB), the libraries' workspaces (an H200 measured 0.13 to 0.19 GiB more) and what the allocator loses to
fragments.
A step that read a number from the device, and so waited for it, would stop this: a fake tensor has none.
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
from common.precision import autocast
from common.report import table
from common.sampling import decode_latents
from common.settings import parse, start
from common.teacher import DDPMScheduler, Teacher, UNet2DConditionModel

ROWS = {  # name: script and settings
    "V-1": ("v1/1.py", {}),
    "V-2.1": ("v2/2.1.py", {}),
    "V-2.2": ("v2/2.2.py", {}),
    "V-2.2, --store 0": ("v2/2.2.py", {"store": 0}),
    "V-3": ("v3/train_student_kd.py", {}),
    "V-3, --store 0 --feature-weight 0.1": ("v3/train_student_kd.py", {"store": 0, "feature_weight": 0.1}),
    "V-4": ("v4/4.py", {}),
    "adapting the teacher": ("checkpoints/adapt_teacher.py", {}),
}


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


def load(script: str):
    """A version's script as a module."""
    spec = importlib.util.spec_from_file_location("version", ROOT / script)
    version = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(version)
    return version


class Measurement:
    """Stands in for what a script calls before and around its training steps, and fills `row` with bytes meanwhile.

    The teacher has its true size and random weights; data set, caches, run folder and saved student are not there.
    """

    def __init__(self, settings):
        self.settings, self.memory, self.row = settings, Memory(), {}

    def names(self) -> dict:
        """What is put in the place of a script's names, where it has them."""
        return dict(
            load_teacher=self.load_teacher, slice_unet=lambda teacher, config: UNet2DConditionModel(**config),
            Run=lambda *_: self.run(), CocoCaptions=mock.MagicMock(), Evaluator=lambda *_, **__: self.evaluator(),
            TrainingPairs=lambda *_, **__: self.pairs(), TeacherStore=lambda *_: self.pairs(stored=True),
            measure_fitness=lambda *_: mock.Mock(_asdict=dict, knowledge=lambda of, *_: torch.ones(len(of.betas))),
            chain_timesteps=lambda _, length: range(1, length + 1),  # V-1 reads them once, before it trains
            make_folder=lambda folder, _: folder, summary=mock.Mock(), finish=mock.Mock(),
            Trajectories=lambda *_, **__: self.trajectories(), some_captions=mock.Mock(), scores_table=mock.Mock(),  # V-4's
            # the teacher's adaptation
            adapted_to=lambda _: 0, undo_rounding=mock.Mock(), merge=lambda *_: self.merged(), save_student=mock.Mock(),
            model_card=mock.Mock())

    def merged(self):
        return UNet2DConditionModel(**self.teacher.unet_config).eval().requires_grad_(False)

    def load_teacher(self, name: str, device, dtype: torch.dtype) -> Teacher:
        torch.set_default_dtype(dtype)
        parts = sd15(lambda kind, *args, **config: kind(*args, **config).eval().requires_grad_(False))
        torch.set_default_dtype(torch.float32)
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
        self.teacher = Teacher(name, tokenizer=SimpleNamespace(model_max_length=77), noise_scheduler=scheduler, **parts)
        self.teacher.fingerprint = lambda *_: ""  # what has no values has none
        self.teacher.unet_config = {k: v for k, v in self.teacher.unet.config.items() if not k.startswith("_")}
        self.side = self.teacher.latent_side(self.settings.resolution)
        return self.teacher

    def pairs(self, stored: bool = False):
        def draw(*_, parts=1, **__):
            n = self.settings.batch_size // parts
            shape = (n, 4, self.side, self.side)
            tensors = [torch.randn(shape), torch.randn(n, 77, 768), torch.randn(shape), torch.zeros(n, dtype=torch.long)]
            if stored:
                tensors.append(torch.randn(shape))  # the teacher's predictions
            self.batch_bytes = sum(tensor.nbytes for tensor in tensors)
            return Batch(*tensors)
        return SimpleNamespace(draw=draw, describe=str, empty=torch.zeros(1, 77, 768), seconds=0.0)

    def trajectories(self):
        def draw(_):
            n, shape = self.settings.batch_size, (self.settings.batch_size, 4, self.side, self.side)
            batch = SimpleNamespace(
                z=torch.randn(shape), wanted=torch.randn(shape), encoder_hidden_states=torch.randn(n, 77, 768),
                timesteps=torch.zeros(n, dtype=torch.long), a=torch.ones(n, 1, 1, 1), a_next=torch.ones(n, 1, 1, 1))
            self.batch_bytes = sum(tensor.nbytes for tensor in vars(batch).values())
            return batch
        return SimpleNamespace(draw=draw, unit=1.0, scheduler=None, seconds=0.0)

    def run(self):
        run = mock.MagicMock(begun=False, evaluated=set(), begin=self.begin_training, log_step=self.after_step)
        run.stop_requested.return_value = False
        return run

    def begin_training(self, *_, **__):
        self.memory.peak = self.memory.now

    def after_step(self, _, trainer, **__):
        parts = [self.teacher.unet, self.teacher.vae, self.teacher.text_encoder, self.inception]
        frozen = sum(p.nbytes for part in parts if part for p in part.parameters() if not p.requires_grad)
        gradients = sum(p.nbytes for p in trainer.model.parameters())  # they are let go after each step
        self.row["frozen"] = frozen
        self.row["states"] = self.memory.now - self.batch_bytes - frozen + gradients
        self.row["training"] = self.memory.peak

    def evaluator(self):
        self.inception = inception_v3(weights=None, init_weights=False).eval().requires_grad_(False)
        evaluator = mock.MagicMock()
        evaluator.evaluate.side_effect = self.evaluate
        return evaluator

    @torch.no_grad()
    def evaluate(self, unet, _, dtype, **__):
        """What an evaluation holds at most: a sampler's step, decoding, Inception-v3."""
        self.memory.peak = self.memory.now
        count = self.settings.eval_batch
        twice = 2 * count  # both halves of guidance
        latents = torch.randn(count, 4, self.side, self.side)
        with autocast(latents.device, dtype):
            unet(torch.randn(twice, 4, self.side, self.side), torch.zeros(twice), torch.randn(twice, 77, 768))
            decode_latents(self.teacher.vae, latents)
        self.inception(torch.randn(50, 3, 299, 299))
        self.row["evaluation"] = self.memory.peak
        return mock.MagicMock()


def measure(script: str, s: Settings, **changes) -> dict:
    """One version's row, in GiB, with `changes` to its settings. The student's states are its weights, gradients, AdamW's
    moments and the EMA; what the peak holds beyond them and the frozen parts stands under activations, of which many are gone
    once all gradients are there."""
    version = load(script)
    own = version.Settings()
    changed = dict(steps=s.steps, batch_size=s.batch_size or own.batch_size, device="cpu", dtype="bf16", mixed_precision="bf16",
                   **changes)
    for name, value in changed.items():
        if hasattr(own, name):
            setattr(own, name, value)
    measurement = Measurement(own)
    names = {name: value for name, value in measurement.names().items() if hasattr(version, name)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module))  # all is there
        stack.enter_context(mock.patch.multiple(version, **names))
        stack.enter_context(contextlib.redirect_stdout(None))
        for mode in (FakeTensorMode(), measurement.memory, CudaAutocast()):
            stack.enter_context(mode)
        version.main(own)
    gib = {name: size / 2**30 for name, size in measurement.row.items()}
    return {"batch": own.batch_size, "frozen parts": gib["frozen"], "student's states": gib["states"],
            "activations": gib["training"] - gib["states"] - gib["frozen"], "peak in training": gib["training"],
            "in evaluation": gib["evaluation"]}


def main(s: Settings):
    print("GiB, SD-1.5's size, bf16 autocast\n")
    print(table({name: measure(script, s, **changes) for name, (script, changes) in ROWS.items()}))


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, limits={"batch_size": (0, None)}))
