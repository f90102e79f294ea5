"""The teacher: loading and checking any Stable Diffusion 1.x folder or hub id."""

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import CLIPTextModel, CLIPTokenizer

from common.files import fingerprint, full_disk_is_one_line
from common.precision import kept_dtype, strides_for
from common.settings import first_line, require

CURE_FOR_PICKLES = ("Pickles can run code; of an author whom you trust, StableDiffusionPipeline.from_pretrained(NAME, "
                    "use_safetensors=False).save_pretrained(FOLDER) makes a folder that works")
CURE = "Give a folder or a hub id that this machine reaches, or stay in the embedded world: --mini, checkpoints/mini-teacher"

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "noise_scheduler")


@dataclass
class Teacher:
    """The parts of a Stable Diffusion pipeline that distillation needs, frozen and in eval mode."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler  # the teacher's own noise schedule
    fingerprints: dict = field(default_factory=dict)  # of the parts, once they were asked for

    def __post_init__(self):
        self.parameters = sum(p.numel() for p in self.unet.parameters())  # of the U-Net, which may be let go

    @property
    def vae_factor(self) -> int:
        """Pixels a latent: 8 for SD-1.5, 4 for the embedded teacher."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_side(self, resolution: int) -> int:
        """Height and width of the latents of images of `resolution` pixels. Raises SystemExit where there are none.

        The U-Net takes latents of any size: diffusers scales up to the size of the skip connection. Its pipeline takes
        multiples of 8 pixels, the autoencoder of its own factor.
        """
        factor = math.lcm(8, self.vae_factor)
        require(resolution % factor == 0, f"--resolution must be a multiple of {factor}")
        return resolution // self.vae_factor

    def pipeline(self, unet=None, scheduler=None):
        """Diffusers' stock pipeline of these parts, silent, with its own or another `unet` and `scheduler`."""
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=unet or self.unet,
            scheduler=scheduler or self.noise_scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def folder(self) -> Path:
        """Where its files lie: its folder, or the hub client's cache of it."""
        if Path(self.name).is_dir():
            return Path(self.name)
        for file in ("model_index.json", "README.md"):  # which loading the parts leaves out
            with contextlib.suppress(OSError):  # not there, or no network
                hf_hub_download(self.name, file)
        return Path(try_to_load_from_cache(self.name, "unet/config.json")).parents[1]

    def fingerprint(self, *parts: str) -> str:
        """A hash of everything of the named parts (of all) that changes a number: weights, config, vocabulary."""
        for part in parts or PARTS:
            if part not in self.fingerprints:
                value = getattr(self, part)
                if part == "tokenizer":
                    content = json.loads(value.backend_tokenizer.to_str())
                    content |= {"padding": None, "truncation": None}  # the last call's, no part of the tokenizer
                    self.fingerprints[part] = fingerprint(sorted(content.items()), value.model_max_length)
                elif part == "noise_scheduler":
                    self.fingerprints[part] = fingerprint(own_config(value.config))
                else:
                    self.fingerprints[part] = fingerprint(value, own_config(value.config))
        return fingerprint(*(self.fingerprints[part] for part in parts or PARTS))


def own_config(config) -> list:
    """The values that differ from the library's defaults, so that a new version with one more default keeps the hash."""
    if hasattr(config, "to_diff_dict"):  # transformers'
        values, passing = config.to_diff_dict(), {"transformers_version", "architectures", "dtype", "torch_dtype"}
    else:  # diffusers'
        values, passing = config, set(config.get("_use_default_values", ()))
    return sorted((k, repr(v)) for k, v in values.items() if not k.startswith("_") and k not in passing)


def from_pretrained(kind, name: str, options: dict):
    """What `kind.from_pretrained` gives; of a hub id without the plain files, the fp16 ones."""
    try:
        return kind.from_pretrained(name, **options)
    except OSError as error:
        missing = "does not appear to have a file named" in str(error)  # both libraries say so, and not by a type
        if Path(name).exists() or not missing:
            raise
        try:
            return kind.from_pretrained(name, **options, variant="fp16")
        except OSError:
            raise error from None


def load_part(kind, name: str, part: str, what: str = "the teacher", check=None, **options):
    """The model in `<name>/<part>`, or in `name` itself. Every weight must be in its file; where only an fp16 file exists, it
    is used. A hub id's config is handed to `check(name, config)` before its weights, which may be gigabytes, are downloaded.

    Raises SystemExit with one line.
    """
    options |= dict(subfolder=part, use_safetensors=True, output_loading_info=True)
    folder = Path(name)
    if folder.exists() or name.startswith((".", "/", "checkpoints")):
        require(folder.exists(), f"{what}: {name} is not there")
        lacking = f"diffusers pipeline folder (it has no {part}/)" if part else "folder"
        require((folder / part).is_dir(), f"{name} is no {lacking}")
        plain = [f for f in (folder / part).glob("*.safetensors*") if ".fp16." not in f.name]
        if not plain and any((folder / part).glob("*.fp16.safetensors*")):
            options["variant"] = "fp16"
    try:
        with full_disk_is_one_line(Path(HF_HUB_CACHE), "the download goes on where it stopped"):
            if check and not folder.exists():
                with torch.device("meta"):
                    check(name, kind.from_config(kind.load_config(name, subfolder=part)).config)
            model, found = from_pretrained(kind, name, options)
    except Exception as error:  # what a damaged file raises depends on the library that reads it
        pickles = any((folder / part).glob("*.bin"))
        cure = CURE_FOR_PICKLES if pickles else CURE
        where = f"{part}: " if part else ""
        raise SystemExit(f"error: {what} {name} could not be loaded: {where}{first_line(error)}. {cure}") from None
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    unexpected = sorted(found["unexpected_keys"])
    if missing:
        other = f", and {len(unexpected)} that it does not know, such as {unexpected[0]}" if unexpected else ""
        raise SystemExit(f"error: the file of {name}'s {part} lacks {len(missing)} of its weights, such as "
                         f"{missing[0]}{other}; it was written by another program or is of another model")
    return model.eval().requires_grad_(False)


def load_unet(name: str, dtype: torch.dtype = torch.float32, what: str = "the teacher") -> UNet2DConditionModel:
    """The frozen U-Net of a folder or hub id. Raises SystemExit with one line where it is of another family than SD-1.x."""
    unet = load_part(UNet2DConditionModel, name, "unet", what, require_plain, dtype=dtype)
    require_plain(name, unet.config)
    return unet


def require_plain(name: str, config):
    """Raises SystemExit with one line where this U-Net's config is of another family than SD-1.x."""
    plain = (config.addition_embed_type is None and config.class_embed_type is None and not config.use_linear_projection
             and isinstance(config.attention_head_dim, int) and isinstance(config.layers_per_block, int)
             and set(config.down_block_types) <= {"CrossAttnDownBlock2D", "DownBlock2D"}
             and config.mid_block_type in (None, "UNetMidBlock2DCrossAttn")
             and config.time_cond_proj_dim is None)  # LCM's guidance scale, which nothing here hands it
    require(plain, f"the U-Net of {name} is of another family than Stable Diffusion 1.x (SDXL, 2.x and others cannot be sliced "
                   "here)")


def load_teacher(name: str, device: torch.device, dtype: torch.dtype = torch.float32, what: str = "the teacher") -> Teacher:
    """Load `name`, a folder or a hub id, in the precision `dtype`. Raises SystemExit with one line where that cannot be done
    or where it cannot be a Stable Diffusion 1.x teacher."""
    unet = load_unet(name, dtype, what)
    vae = load_part(AutoencoderKL, name, "vae", what, dtype=dtype)
    text_encoder = load_part(CLIPTextModel, name, "text_encoder", what, dtype=dtype)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
        # Stable Diffusion's pipeline insists on these two
        scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", clip_sample=False, steps_offset=1)
    except Exception as error:
        raise SystemExit(f"error: {what} {name} could not be loaded ({first_line(error)})") from None
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    require_sd1(name, unet, vae, text_encoder, tokenizer, scheduler)
    for model in (unet, vae, text_encoder):
        model.to(device)
    strides = strides_for(device, dtype if dtype != torch.float32 else kept_dtype(unet))
    unet.to(memory_format=strides)
    vae.to(memory_format=strides)
    return Teacher(name, unet, vae, text_encoder, tokenizer, scheduler)


def require_sd1(name: str, unet, vae, text_encoder, tokenizer, scheduler):
    """Raises SystemExit with one line unless the parts fit each other as Stable Diffusion 1.x's do."""
    latent_channels, width = vae.config.latent_channels, text_encoder.config.hidden_size
    for side in ("in_channels", "out_channels"):
        found = unet.config[side]
        require(found == latent_channels, f"the U-Net of {name} has {side} {found}, its autoencoder {latent_channels} latent "
                "channels; inpainting and other such models are no teachers")
    found = unet.config.cross_attention_dim
    require(found == width, f"the U-Net of {name} takes captions {found} wide, its text encoder gives {width}")
    kind = scheduler.config.prediction_type
    require(kind == "epsilon", f"{name} predicts {kind}; only epsilon teachers (SD-1.x) work")
    require(scheduler.alphas_cumprod[-1] > 0, f"the noise schedule of {name} ends at noise alone (rescale_betas_zero_snr), "
            "from which an epsilon teacher cannot tell a picture")
    embeddings = text_encoder.get_input_embeddings().num_embeddings  # some are padded to a multiple of 64
    fits = embeddings - 64 < len(tokenizer) <= embeddings
    require(fits, f"the tokenizer of {name} knows {len(tokenizer):,} tokens, its text encoder {embeddings:,}; files of "
            "tokenizer/ are missing or of another model")
    cat, dog = tokenizer(["a cat", "a dog"]).input_ids
    require(cat != dog, f"the tokenizer of {name} gives every caption the same tokens; files of tokenizer/ are missing")
