"""Precision and kernels: of the frozen weights, and of autocast around what is trained and drawn."""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from common.files import read_text
from common.settings import require

DTYPES = {"fp32": torch.float32, "no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ATTENTION = {"fused": AttnProcessor2_0, "plain": AttnProcessor}  # torch's kernel; two products with a softmax in between


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of a run's frozen weights, and of autocast where `fastest_kernels` finds none that is faster.

    `auto`: bf16 on CUDA devices that have it, else fp16 there; fp32 on MPS and CPUs.
    """
    if name != "auto":
        require(name in DTYPES, f"the precision {name} is not supported; take fp16, bf16 or none")
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device: torch.device, dtype: torch.dtype):
    """Torch's, to `dtype`; none for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def strides_for(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Of a U-Net's weights: channels last, but for bf16 on CPUs, whose GroupNorm takes twice as long with them, and for MPS,
    where a convolution's backward pass takes thirty times as long (pytorch issue 193349)."""
    slow = device.type == "mps" or device.type == "cpu" and dtype == torch.bfloat16
    return torch.contiguous_format if slow else torch.channels_last


def multiplies_bf16(device: torch.device) -> bool:
    """Whether this is a CPU with units for bf16; on others it takes many times as long as fp32."""
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(units.get("avx512_bf16") or units.get("amx_bf16"))


def kept_dtype(network) -> torch.dtype:
    """The precision of autocast around a frozen network whose output is kept for training: bf16 for fp32 weights on a CPU that
    multiplies it, at an error (about 1 %) far below a student's; else none."""
    return torch.bfloat16 if network.dtype == torch.float32 and multiplies_bf16(network.device) else torch.float32


def drawing_dtype(name: str, device: torch.device, place: str) -> torch.dtype:
    """The precision to draw a student in, whose folder is `place`: for `auto` on a CPU what its run chose, so that its figures
    are the run's own."""
    settings = Path(place).parent / "settings.json"
    if name == "auto" and multiplies_bf16(device) and settings.is_file():
        return DTYPES[json.loads(read_text(settings)).get("kernels", {"dtype": "fp32"})["dtype"]]
    return pick_dtype(name, device)


def leaves_gradients_unwritten(unet) -> bool:
    """Whether torch on a CPU (2.13, by oneDNN) leaves parts of a bf16 gradient as the memory was, noise or NaN: it does for the
    weight of a strided convolution over a single position, the last downsampler's where the latents have shrunk to one."""
    return unet.config.sample_size <= 2 ** (len(unet.config.block_out_channels) - 2)


def fastest_kernels(run, student, dtype: torch.dtype, *, auto: bool, steps: int, batch_size: int, tokens: int) -> torch.dtype:
    """The precision of autocast around the `student`: `dtype`, or, with `auto` on a CPU that multiplies bf16, the fastest.

    Passes forward and backward are timed there in fp32 and bf16, with torch's attention kernel and without it (its backward
    pass is slow in bf16 on CPUs). The fastest whose loss is within 1 % of fp32's is set up, printed and noted in the run's
    settings.json, so that a resumed run follows it; fp32 stays unless another saves 5 %. A run of fewer than 100 steps
    would not earn the timing back and takes `dtype`.

    Raises SystemExit where that is bf16 and the gradients would be wrong.
    """
    wrong = run.accelerator.device.type == "cpu" and leaves_gradients_unwritten(student)
    require(not wrong or dtype != torch.bfloat16, "in bf16 a CPU gets wrong gradients of latents this small; take fp32")
    if not auto or steps < 100 or run.accelerator.device.type != "cpu":
        return dtype
    choice = [run.kernels]  # a resumed run's, on whatever CPU it goes on
    if run.main and not run.kernels and multiplies_bf16(run.accelerator.device):
        choice = [time_kernels(student, batch_size, tokens)]
    broadcast_object_list(choice)
    if not choice[0]:
        return dtype
    run.note_kernels(choice[0])
    return use_kernels(student, run.kernels)


def use_kernels(student, kernels: dict) -> torch.dtype:
    """Give the student the attention that `time_kernels` chose, and return the precision."""
    student.set_attn_processor(ATTENTION[kernels["attention"]]())
    return DTYPES[kernels["dtype"]]


def time_kernels(student, batch_size: int, tokens: int) -> dict:
    """{"dtype": .., "attention": .., "seconds": those of a pass with each combination}: the fastest one of `student`'s."""
    config, side = student.config, student.config.sample_size
    generator = torch.Generator().manual_seed(0)
    noisy, noise = torch.randn(2, batch_size, config.in_channels, side, side, generator=generator)
    encoder_hidden_states = torch.randn(batch_size, tokens, config.cross_attention_dim, generator=generator)
    timesteps = torch.randint(1000, (batch_size,), generator=generator)
    kinds = ["fused", "plain"] if side <= 16 else ["fused"]  # plain attention's memory grows with the side's fourth power
    dtypes = ["fp32"] if leaves_gradients_unwritten(student) else ["fp32", "bf16"]
    usual, seconds, losses = ("fp32", "fused"), {}, {}
    for turn in range(3):
        for place in [(dtype, kind) for dtype in dtypes for kind in kinds]:
            dtype, kind = place
            student.set_attn_processor(ATTENTION[kind]())
            student.to(memory_format=strides_for(noisy.device, DTYPES[dtype]))
            began = time.perf_counter()
            with autocast(noisy.device, DTYPES[dtype]):
                noise_pred = student(noisy, timesteps, encoder_hidden_states, return_dict=False)[0]
            loss = F.mse_loss(noise_pred.float(), noise)
            loss.backward()
            if turn:  # the first one warms up
                seconds[place] = min(time.perf_counter() - began, seconds.get(place, float("inf")))
            losses[place] = loss.item()
            student.zero_grad()
    near = [place for place in seconds if abs(losses[place] - losses[usual]) <= 0.01 * losses[usual]]
    best = min(near, key=seconds.get)
    if seconds[best] > 0.95 * seconds[usual]:
        best = usual
    return {"dtype": best[0], "attention": best[1], "seconds": {f"{d}, {k}": round(t, 4) for (d, k), t in seconds.items()}}
