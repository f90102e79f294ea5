"""Train the embedded teacher, `checkpoints/mini-teacher`: a 16 M-parameter Stable Diffusion at 32 px.

    python checkpoints/train_mini_teacher.py            # goes on where it stopped

Five stages, the long ones saved every few hundred steps under `checkpoints/mini-teacher-training/` and resumed:
the autoencoder (f = 4, so that 32 px become the 8 x 8 x 4 latents that SD-1.5 sees at 64 px), then U-Net and text
encoder together on the frozen latents, the same once more with most of each batch from the scenes of two objects
(the hard ones), the fp16 folder that stock diffusers loads, and the small classifier that reads the drawn categories
(for the caption accuracy). `--start FOLDER` refines an existing teacher: only its U-Net and text encoder are trained on.
`checkpoints/mini-teacher/README.md` has the measured time, the loss curve and the scores.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: F401  (before diffusers: see there)

# isort: split
import numpy as np
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.mini import CategoryReader, caption_accuracy, drawn_objects, object_crops
from common.sampling import reconstruct
from data.draw_mini import draw_mini

PIXELS = 32
MAX_TOKENS = 24  # the longest drawn caption has 20 words
NOISE_SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@dataclass
class Settings:
    out: str = "checkpoints/mini-teacher"  # the pipeline folder to write
    work: str = "checkpoints/mini-teacher-training"  # where the stages keep their checkpoints and log
    start: str = ""  # a teacher to refine in place of the first two stages
    vae_steps: int = 5_500  # autoencoder steps
    vae_batch: int = 32
    vae_lr: float = 1.5e-3
    unet_steps: int = 5_200  # U-Net and text encoder steps
    unet_batch: int = 128
    unet_lr: float = 1.5e-3
    refine_steps: int = 6_000  # more steps of the same, from those weights
    refine_lr: float = 1e-3
    refine_share: float = 2 / 3  # share of each refining batch with two objects (a third of the set)
    caption_dropout: float = 0.1  # share of empty captions, for classifier-free guidance
    reader_steps: int = 2_000  # steps of 128 crops of the category reader
    save_every: int = 500
    seed: int = 0


def fit(name, model, loss_of_batch, examples, *, steps, batch, lr, settings):
    """Train `model` (any module tree, in place) on `loss_of_batch(indices)` and leave its EMA weights in it.

    Weights are bf16 with an fp32 master copy: on CPUs with bf16 matrix units 1.7 x faster than autocast, which casts
    the weights anew at every call. No torch.compile: in bf16 on the CPU its gradients were measured to be wrong (torch
    2.13: those of most layers vanish). Step i draws its batch and its noise from (seed, i) alone, so a resumed run
    repeats the unbroken one.
    """
    work = Path(settings.work)
    work.mkdir(parents=True, exist_ok=True)
    master = [p.detach().clone().float() for p in model.parameters()]
    model.to(torch.bfloat16)
    weights = list(model.parameters())
    ema = [p.clone() for p in master]
    optimizer = torch.optim.AdamW(master, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, path = 0, work / f"{name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state["step"]
        for kept, saved in ((master, state["master"]), (ema, state["ema"])):
            torch._foreach_copy_(kept, saved)
        optimizer.load_state_dict(state["optimizer"])
        print(f"{name}: goes on at step {start:,}")
    with torch.no_grad():
        torch._foreach_copy_(weights, master)

    began, running = time.time(), None
    with tqdm(total=steps, initial=start, desc=name, unit="step", mininterval=5) as bar:
        for step in range(start, steps):
            epoch, place = divmod(step * batch, examples - examples % batch)
            if step == start or place == 0:
                order = torch.randperm(examples, generator=torch.Generator().manual_seed(settings.seed + epoch))
            torch.manual_seed(settings.seed * 1_000_003 + step)
            loss = loss_of_batch(order[place : place + batch])
            loss.backward()
            for p, w in zip(master, weights):
                p.grad, w.grad = w.grad.float(), None
            torch.nn.utils.clip_grad_norm_(master, 1.0)
            warmup = min(1.0, (step + 1) / 200)
            optimizer.param_groups[0]["lr"] = lr * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(weights, master)
                torch._foreach_lerp_(ema, master, 1 - min(0.999, (1 + step) / (10 + step)))
            running = loss.item() if running is None else running + 0.02 * (loss.item() - running)
            bar.update()
            if (step + 1) % 50 == 0:
                bar.set_postfix(loss=f"{running:.4f}")
                line = {"stage": name, "step": step + 1, "loss": round(running, 5), "seconds": round(time.time() - began)}
                with open(work / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
            if (step + 1) % settings.save_every == 0 or step + 1 == steps:
                state = {"step": step + 1, "master": master, "ema": ema, "optimizer": optimizer.state_dict()}
                torch.save(state, path.with_suffix(".tmp"))
                os.replace(path.with_suffix(".tmp"), path)
    model.float().eval().requires_grad_(False)
    torch._foreach_copy_(list(model.parameters()), ema)


def load_split(root: Path, split: str) -> tuple[torch.Tensor, list[list[str]]]:
    """(N, 3, 32, 32) uint8 pictures and the five captions of each."""
    content = json.loads((root / "annotations" / f"captions_{split}.json").read_text())
    captions = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    pictures = np.stack([np.asarray(Image.open(root / split / i["file_name"])) for i in content["images"]])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), list(captions.values())


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned from the captions; any other text falls back to bytes."""
    bpe = CLIPTokenizer().backend_tokenizer  # CLIP's own normaliser and pre-tokeniser around an empty vocabulary
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=alphabet,
                                      show_progress=False))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def train_vae(pictures: torch.Tensor, settings: Settings) -> AutoencoderKL:
    """Autoencoder with loss L1 + 4 MSE + 1e-4 KL (a mean over latents), pixels in -1..1."""
    torch.manual_seed(settings.seed)
    vae = AutoencoderKL(
        sample_size=PIXELS, block_out_channels=(32, 64, 128), layers_per_block=1, latent_channels=4, norm_num_groups=16,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        mid_block_add_attention=False).to(memory_format=torch.channels_last)

    def reconstruct(x):
        posterior = vae.encode(x).latent_dist
        kl = posterior.mean.float().square() + posterior.logvar.float().exp() - 1 - posterior.logvar.float()
        return vae.decode(posterior.sample()).sample.float(), 0.5 * kl.mean()

    def loss_of_batch(indices):
        x = pictures[indices].float() / 127.5 - 1
        decoded, kl = reconstruct(x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last))
        return F.l1_loss(decoded, x) + 4 * F.mse_loss(decoded, x) + 1e-4 * kl

    fit("vae", vae, loss_of_batch, len(pictures), steps=settings.vae_steps, batch=settings.vae_batch,
               lr=settings.vae_lr, settings=settings)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 4, 8, 8) posterior means, not yet scaled."""
    chunks = [vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in tqdm(pictures.split(256), desc="latents")]
    return torch.cat(chunks)


def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Peak signal-to-noise ratio over all pixels of all pictures, in dB."""
    with torch.no_grad():
        errors = [((vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x) / 2).square().mean()
                  for x in (p.float() / 127.5 - 1 for p in pictures.split(250))]
    return -10 * torch.stack(errors).mean().log10().item()


def new_unet(tokenizer: CLIPTokenizer, seed: int) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """U-Net (SD-1.5's topology) and text encoder with random weights."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 96, 128, 160), layers_per_block=2, cross_attention_dim=128,
        attention_head_dim=4, norm_num_groups=16)
    eos = tokenizer.eos_token_id
    return unet, CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, projection_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos, pad_token_id=eos))


def train_unet(name, unet, text_encoder, tokenizer, latents, captions, scenes, *, steps, lr, settings):
    """Train U-Net and text encoder (in place) on noise prediction; `scenes` (M,) indices of pictures, repeats allowed."""
    unet.set_attn_processor(AttnProcessor())  # on CPUs faster than the fused kernel's backward at 64 positions
    text_encoder.set_attn_implementation("eager")
    tokens = torch.tensor(tokenizer([c for five in captions for c in five], padding="max_length", truncation=True,
                                    max_length=MAX_TOKENS).input_ids).view(len(captions), 5, MAX_TOKENS)
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=MAX_TOKENS).input_ids)
    alphas_cumprod = DDIMScheduler(**NOISE_SCHEDULE).alphas_cumprod

    def loss_of_batch(indices):
        indices, n = scenes[indices], len(indices)
        ids = tokens[indices, torch.randint(5, (n,))]
        ids = torch.where(torch.rand(n, 1) < settings.caption_dropout, empty, ids)
        timesteps, noise = torch.randint(1000, (n,)), torch.randn(n, 4, 8, 8)
        a = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * latents[indices] + (1 - a).sqrt() * noise).to(torch.bfloat16)
        noise_pred = unet(noisy, timesteps, text_encoder(ids).last_hidden_state, return_dict=False)[0]
        return F.mse_loss(noise_pred.float(), noise)

    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).requires_grad_(True).train()
    fit(name, both, loss_of_batch, len(scenes), steps=steps, batch=settings.unet_batch, lr=lr, settings=settings)
    unet.set_default_attn_processor()


def train_reader(vae: AutoencoderKL, data: Path, pictures: torch.Tensor, val_pictures: torch.Tensor, settings: Settings):
    """The classifier of drawn categories, on the set's pictures and their reconstructions; prints its accuracy."""
    sets = {"train": pictures[:12_000], "val": val_pictures}
    rebuilt = {k: reconstruct(vae, p) for k, p in sets.items()}
    objects = {}
    for split in sets:
        ids = [i["id"] for i in json.loads((data / "annotations" / f"captions_{split}.json").read_text())["images"]]
        objects[split], names = drawn_objects(data / "annotations" / f"instances_{split}.json", ids)
    n = len(rebuilt["train"])
    crops, labels, _ = object_crops(torch.cat([pictures, rebuilt["train"]]), objects["train"] + objects["train"][:n])
    torch.manual_seed(settings.seed)
    reader = CategoryReader(len(names)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.05)
    steps = settings.reader_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="category reader"):
        pick = torch.randint(len(crops), (128,))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(reader(crops[pick]).float(), labels[pick], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    reader.eval()
    for kind, tested in (("pictures", val_pictures), ("reconstructions", rebuilt["val"])):
        one, both, in_place = caption_accuracy(reader, tested, objects["val"])
        print(f"category reader on validation {kind}: {one:.2%} of one object, {both:.2%} both of two, {in_place:.2%} in place")
    save_file({k: v.contiguous() for k, v in reader.state_dict().items()},
              Path(settings.out) / "category_reader.safetensors")


def main(settings: Settings):
    work = Path(settings.work)
    work.mkdir(parents=True, exist_ok=True)
    begun = {name: value for name, value in asdict(settings).items() if name not in ("out", "save_every")}
    path = work / "settings.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else begun
    if any(before.get(name) != value for name, value in begun.items()):
        raise SystemExit(f"error: {work} holds the stages of a training with other settings; choose another --work")
    path.write_text(json.dumps(begun, indent=2), "utf-8")
    data = draw_mini()
    pictures, captions = load_split(data, "train")
    val_pictures, _ = load_split(data, "val")
    if settings.start:
        start = StableDiffusionPipeline.from_pretrained(settings.start, safety_checker=None)
        vae, tokenizer, unet, text_encoder = start.vae, start.tokenizer, start.unet, start.text_encoder
        latents = encode(vae, pictures)
    else:
        vae = train_vae(pictures, settings)
        latents = encode(vae, pictures)
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        tokenizer = train_tokenizer([c for five in captions for c in five], work / "tokenizer")
        unet, text_encoder = new_unet(tokenizer, settings.seed)
    print(f"autoencoder: {psnr(vae, val_pictures):.2f} dB PSNR on {len(val_pictures):,} validation images")
    given = unet, text_encoder, tokenizer, latents * vae.config.scaling_factor, captions
    if not settings.start:
        train_unet("unet", *given, torch.arange(len(captions)), steps=settings.unet_steps, lr=settings.unet_lr,
                   settings=settings)
    ids = [i["id"] for i in json.loads((data / "annotations" / "captions_train.json").read_text())["images"]]
    objects, _ = drawn_objects(data / "annotations" / "instances_train.json", ids)
    two = torch.tensor([len(of_scene) == 2 for of_scene in objects])
    one, two = torch.nonzero(~two)[:, 0], torch.nonzero(two)[:, 0]
    repeats = round(settings.refine_share / (1 - settings.refine_share) * len(one) / len(two))
    train_unet("refine", *given, torch.cat([one, two.repeat(repeats)]), steps=settings.refine_steps,
               lr=settings.refine_lr, settings=settings)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(**NOISE_SCHEDULE, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.to(dtype=torch.float16).save_pretrained(settings.out)
    pipeline.to(dtype=torch.float32)
    # diffusers loads fp16 files as fp32 unless told otherwise, transformers as the config says: let both say fp32
    text_encoder.config.dtype = torch.float32
    text_encoder.config.save_pretrained(Path(settings.out) / "text_encoder")
    if not settings.start:  # the reader depends on the pictures and the autoencoder only
        train_reader(vae, data, pictures, val_pictures, settings)
    print(f"The teacher lies in {settings.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", default=field.default, type=field.type)
    os.chdir(ROOT)
    main(Settings(**vars(parser.parse_args())))
