"""Pictures from a U-Net: batched, both halves of guidance in one call, caption embeddings made once."""

import time

import torch
from diffusers import DDIMScheduler, DDPMScheduler

SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}


@torch.no_grad()
def encode_captions(text_encoder, tokenizer, captions: list[str], batch: int = 256) -> torch.Tensor:
    """(N, tokens, width) hidden states of the text encoder, as Stable Diffusion's U-Net takes them."""
    device, chunks = text_encoder.device, []
    for i in range(0, len(captions), batch):
        ids = tokenizer(captions[i : i + batch], padding="max_length", truncation=True, return_tensors="pt",
                        max_length=tokenizer.model_max_length).input_ids
        chunks.append(text_encoder(ids.to(device))[0])
    return torch.cat(chunks)


def encode_pictures(vae, batch: torch.Tensor) -> torch.Tensor:
    """Scaled latents (n, 4, h, w) of (n, 3, H, W) uint8: the posterior's mean, so that an epoch repeats."""
    x = batch.to(vae.device, vae.dtype) / 127.5 - 1
    return vae.encode(x).latent_dist.mean * vae.config.scaling_factor


def at_once(height: int, width: int) -> int:
    """Pictures that the autoencoder takes at a time: 250 at 64 px, and no more pixels than that at any size."""
    return max(1, min(250, 250 * 64 * 64 // (height * width)))


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) uint8 pictures of scaled latents (N, 4, h, w)."""
    pictures, factor = [], 2 ** (len(vae.config.block_out_channels) - 1)
    for chunk in latents.split(at_once(*(factor * side for side in latents.shape[2:]))):
        picture = vae.decode(chunk.to(vae.dtype) / vae.config.scaling_factor).sample
        pictures.append((picture.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(pictures)


@torch.no_grad()
def reconstruct(vae, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) uint8 pictures through the autoencoder and back, on the CPU."""
    return torch.cat([decode(vae, encode_pictures(vae, part)).cpu() for part in pictures.split(at_once(*pictures.shape[2:]))])


@torch.no_grad()
def sample(unet, teacher, captions: list[str], *, sampler="ddpm", steps=25, guidance=5.0, seed=0, size_px=64,
           batch=64) -> tuple[torch.Tensor, float]:
    """Draw one picture a caption: ((N, 3, size_px, size_px) uint8 on the CPU, seconds a picture).

    Noise comes from one CPU generator seeded with `seed + index of the batch`: the same captions and batch give two
    U-Nets the same initial noise and the same noise on the way, whatever the device. One batch equals
    `StableDiffusionPipeline(..., generator=torch.Generator().manual_seed(seed))`.
    Under the caller's autocast every network runs in its precision, the scheduler's arithmetic stays in float32.
    Guidance (Ho & Salimans): eps = eps_empty + guidance (eps_caption - eps_empty).
    """
    device, dtype = next(unet.parameters()).device, next(unet.parameters()).dtype
    empty = encode_captions(teacher.text_encoder, teacher.tokenizer, [""]).to(dtype)
    side = size_px // teacher.vae_factor
    pictures, began = [], time.perf_counter()
    for number, i in enumerate(range(0, len(captions), batch)):
        part = captions[i : i + batch]
        n = len(part)
        hidden = encode_captions(teacher.text_encoder, teacher.tokenizer, part).to(dtype)
        both = torch.cat([empty.expand(n, -1, -1), hidden])
        scheduler = SAMPLERS[sampler].from_config(teacher.noise_scheduler.config)
        scheduler.set_timesteps(steps, device=device)
        generator = torch.Generator().manual_seed(seed + number)
        latents = torch.randn((n, 4, side, side), generator=generator).to(device) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            pred = unet(scheduler.scale_model_input(torch.cat([latents] * 2), t).to(dtype), t, both,
                        return_dict=False)[0].float()
            pred_empty, pred_caption = pred.chunk(2)
            pred = pred_empty + guidance * (pred_caption - pred_empty)
            latents = scheduler.step(pred, t, latents, generator=generator, return_dict=False)[0]
        pictures.append(decode(teacher.vae, latents).cpu())
    return torch.cat(pictures), (time.perf_counter() - began) / len(captions)
