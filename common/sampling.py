"""Images from a U-Net: batched, both halves of guidance in one call, caption embeddings made once."""

import inspect
import time
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from common.settings import require

SAMPLERS = {  # "trailing" spacing starts at the last timestep, which few steps cannot do without (arXiv 2305.08891)
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "ddim-trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}
SCHEDULE = {*inspect.signature(DDPMScheduler).parameters, "set_alpha_to_one", "_use_default_values"}  # keys of a config


def make_scheduler(sampler: str, noise_scheduler, **more):
    """A sampler on the teacher's noise schedule, with `more` options. Those of the sampler in its folder (Karras sigmas, a
    stochastic solver), which diffusers keeps beside the schedule, are left out."""
    kind, options = SAMPLERS[sampler]
    schedule = {key: value for key, value in noise_scheduler.config.items() if key in SCHEDULE}
    return kind.from_config(schedule, **options, **more)


def require_no_extra_step(scheduler, option: str):
    """Raises SystemExit where the stock pipeline, which makes every step of `scheduler`, would visit timestep -1."""
    require(-1 not in scheduler.timesteps, f"{option}: diffusers' trailing spacing adds a step at timestep -1, which spoils "
            "the picture; choose another number")


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device. On CUDA through pinned memory, as a plain copy would make every step wait for the last."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@torch.no_grad()
def encode_captions(text_encoder, tokenizer, captions: list[str], batch: int = 256) -> torch.Tensor:
    """(N, tokens, width) hidden states of the text encoder, as Stable Diffusion's U-Net takes them."""
    device, chunks = text_encoder.device, []
    for i in range(0, len(captions), batch):
        tokens = tokenizer(captions[i : i + batch], padding="max_length", truncation=True, return_tensors="pt",
                           max_length=tokenizer.model_max_length)
        chunks.append(text_encoder(upload(tokens.input_ids, device))[0])
    return torch.cat(chunks)


def images_at_once(height_px: int, width_px: int) -> int:
    """Images that the autoencoder takes at a time: 250 at 64 px, and no more pixels than that at any size."""
    return max(1, min(250, 250 * 64 * 64 // (height_px * width_px)))


def encode_images(vae, images: torch.Tensor) -> torch.Tensor:
    """Scaled latents (n, 4, h, w) of (n, 3, H, W) uint8: the posterior's mean, so that an epoch repeats."""
    latents = []
    for chunk in images.split(images_at_once(*images.shape[2:])):
        pixels = upload(chunk, vae.device).to(vae.dtype) / 127.5 - 1
        latents.append(vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(latents)


@torch.no_grad()
def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) uint8 images of scaled latents (N, 4, h, w)."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = latents.shape[2:]
    images = []
    for chunk in latents.split(images_at_once(factor * height, factor * width)):
        decoded = vae.decode(chunk.to(vae.dtype) / vae.config.scaling_factor).sample
        levels = (decoded.float() * 127.5 + 127.5).round().clamp(0, 255)
        images.append(levels.to(torch.uint8))
    return torch.cat(images)


@torch.no_grad()
def reconstruct(vae, images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) uint8 images through the autoencoder and back, on the CPU."""
    return decode_latents(vae, encode_images(vae, images)).cpu()


def guide(noise_pred: torch.Tensor, guidance: float) -> torch.Tensor:
    """(N, 4, h, w): the guided prediction (Ho & Salimans, arXiv 2207.12598), eps_empty + guidance (eps_caption - eps_empty), of
    the predictions (2 N, 4, h, w) for no captions and for captions."""
    pred_empty, pred_caption = noise_pred.chunk(2)
    return pred_empty + guidance * (pred_caption - pred_empty)


def ddim_step(z: torch.Tensor, noise_pred: torch.Tensor, a: torch.Tensor, a_next: torch.Tensor) -> torch.Tensor:
    """DDIM's deterministic step (arXiv 2010.02502, eq. 12, eta = 0) between two cumulative alphas."""
    x0 = (z - (1 - a).sqrt() * noise_pred) / a.sqrt()
    return a_next.sqrt() * x0 + (1 - a_next).sqrt() * noise_pred


def caption_layers(unet) -> list[torch.nn.Module]:
    """The layers that make keys and values of the captions for the cross-attention."""
    return [layer for name, layer in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]


def first_output(layer: torch.nn.Module, kept: dict, x: torch.Tensor) -> torch.Tensor:
    if layer not in kept:
        kept[layer] = type(layer).forward(layer, x)
    return kept[layer]


@contextmanager
def computed_once(layers: list[torch.nn.Module], kept: dict):
    """Within it each of the `layers` gives what it gave at its first call, which `kept` holds."""
    for layer in layers:
        layer.forward = partial(first_output, layer, kept)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def denoise(unet, scheduler, latents: torch.Tensor, encoded: torch.Tensor, guidance: float, generator):
    """Yields the latents (N, 4, h, w) after each step of `scheduler`, whose timesteps are set.

    `encoded`: the captions (N, tokens, width); for guidance above 1 (see `guide`) as many empty ones before them. At 1, as in
    diffusers' pipeline, the captions' prediction stands alone. The captions' keys and values, the same at every step, are
    computed at the first one.
    """
    of_captions, kept = caption_layers(unet), {}
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(latents.repeat(len(encoded) // len(latents), 1, 1, 1), t).to(encoded.dtype)
        with computed_once(of_captions, kept):  # not around the loop: another path of this U-Net may go on in between
            noise_pred = unet(inputs, t, encoded, return_dict=False)[0].float()
        if guidance > 1:
            noise_pred = guide(noise_pred, guidance)
        latents = scheduler.step(noise_pred, t, latents, generator=generator, return_dict=False)[0]
        yield latents


@torch.no_grad()
def sample(unet, teacher, captions: list[str], *, sampler="ddpm", steps=25, guidance=5.0, seed=0, size_px=64,
           batch=64) -> tuple[torch.Tensor, float]:
    """Draw one image a caption: ((N, 3, size_px, size_px) uint8 on the CPU, seconds an image).

    Noise comes from one CPU generator seeded with `seed + index of the batch`: the same captions and batch give two
    U-Nets the same initial noise and the same noise on the way, whatever the device. One batch equals
    `StableDiffusionPipeline(..., generator=torch.Generator().manual_seed(seed))`.
    Under the caller's autocast every network runs in its precision, the scheduler's arithmetic stays in float32.
    """
    parameter = next(unet.parameters())
    device, dtype = parameter.device, parameter.dtype
    empty = encode_captions(teacher.text_encoder, teacher.tokenizer, [""]).to(dtype)
    side = size_px // teacher.vae_factor
    images, began = [], time.perf_counter()
    for number, i in enumerate(range(0, len(captions), batch)):
        part = captions[i : i + batch]
        n = len(part)
        encoded = encode_captions(teacher.text_encoder, teacher.tokenizer, part).to(dtype)
        if guidance > 1:
            encoded = torch.cat([empty.expand(n, -1, -1), encoded])  # (2 n, tokens, width)
        scheduler = make_scheduler(sampler, teacher.noise_scheduler)
        scheduler.set_timesteps(steps, device=device)
        generator = torch.Generator().manual_seed(seed + number)
        noise = torch.randn((n, 4, side, side), generator=generator).to(device) * scheduler.init_noise_sigma
        # of 61 and other steps diffusers' trailing spacing makes one more, at timestep -1
        *_, latents = islice(denoise(unet, scheduler, noise, encoded, guidance, generator), steps)
        images.append(decode_latents(teacher.vae, latents).cpu())
    return torch.cat(images), (time.perf_counter() - began) / len(captions)
