"""The teacher: loading any Stable Diffusion 1.x folder or hub id, and slicing a student's start out of its U-Net."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import CLIPTextModel, CLIPTokenizer

from common.cache import full_disk_is_one_line
from common.settings import first_line


@dataclass
class Teacher:
    """The parts of a Stable Diffusion pipeline that distillation needs, frozen and in eval mode."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler  # the teacher's own noise schedule

    @property
    def vae_factor(self) -> int:
        """Pixels a latent: 8 for SD-1.5, 4 for the embedded teacher."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def _load(kind, name: str, subfolder: str, **options):
    """`kind.from_pretrained`, its failures as one line (SystemExit)."""
    folder = Path(name)
    if (folder.exists() or name.startswith((".", "/", "checkpoints"))) and not (folder / subfolder).is_dir():
        raise SystemExit(f"error: {name} is no diffusers pipeline folder (it has no {subfolder}/)")
    try:
        with full_disk_is_one_line(Path(HF_HUB_CACHE), "the download goes on where it stopped"):
            return kind.from_pretrained(name, subfolder=subfolder, **options)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"error: the teacher {name} could not be loaded ({first_line(error)}). Give --teacher a folder or a hub id that "
            "this machine reaches, or run the embedded world with --mini"
        ) from None


def load_unet(name: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The frozen U-Net of a folder or hub id. Raises SystemExit with one line where it is of another family than SD-1.x."""
    unet = _load(UNet2DConditionModel, name, "unet", dtype=dtype, use_safetensors=True)
    config = unet.config
    plain = (config.addition_embed_type is None and config.class_embed_type is None and not config.use_linear_projection
             and isinstance(config.attention_head_dim, int) and isinstance(config.layers_per_block, int)
             and set(config.down_block_types) <= {"CrossAttnDownBlock2D", "DownBlock2D"}
             and config.mid_block_type in (None, "UNetMidBlock2DCrossAttn"))
    if not plain:
        raise SystemExit(f"error: the U-Net of {name} is of another family than Stable Diffusion 1.x (SDXL, 2.x and others "
                         "cannot be sliced here)")
    return unet.eval().requires_grad_(False)


def load_teacher(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Teacher:
    """Load `name`, a folder or a hub id. Raises SystemExit with one line where that cannot be done."""
    unet = load_unet(name, dtype)
    vae = _load(AutoencoderKL, name, "vae", dtype=dtype, use_safetensors=True)
    text_encoder = _load(CLIPTextModel, name, "text_encoder", dtype=dtype, use_safetensors=True)
    tokenizer = _load(CLIPTokenizer, name, "tokenizer")
    scheduler = _load(DDPMScheduler, name, "scheduler", clip_sample=False, steps_offset=1)  # as SD's pipeline insists
    if scheduler.config.prediction_type != "epsilon":
        raise SystemExit(f"error: {name} predicts {scheduler.config.prediction_type}; only epsilon teachers (SD-1.x) work")
    for model in (unet, vae, text_encoder):
        model.eval().requires_grad_(False).to(device)
    return Teacher(name, unet, vae, text_encoder, tokenizer, scheduler)


def student_config(teacher: UNet2DConditionModel, channels: tuple[int, ...], layers: int, groups: int = 0,
                   mid_block: bool = True) -> dict:
    """The teacher's U-Net config with other widths, as many levels as `channels` has, and `layers` a block.

    Fewer levels keep the outer ones; a student that stops above the teacher's innermost, attention-free level has
    cross-attention in all of its own; without `mid_block` it has none. 0 GroupNorm `groups` keep the teacher's number.
    Raises SystemExit where it cannot be a slice.
    """
    config = {k: v for k, v in teacher.config.items() if not k.startswith("_")}
    wide, levels = teacher.config.block_out_channels, len(channels)
    groups, heads = groups or config["norm_num_groups"], config["attention_head_dim"]
    for problem, found in {
        f"{levels} levels; the teacher has {len(wide)}": levels > len(wide),
        f"channels {channels} are wider than the teacher's {wide}": any(s > t for s, t in zip(channels, wide)),
        f"channels {channels} do not all divide into {groups} groups and {heads} heads":
            any(c % groups or c % heads for c in channels),
        f"{layers} layers a block; the teacher has {config['layers_per_block']}":
            not 1 <= layers <= config["layers_per_block"],
    }.items():
        if found:
            raise SystemExit(f"error: this student is no slice of the teacher: {problem}")
    config |= {
        "block_out_channels": tuple(channels), "layers_per_block": layers, "norm_num_groups": groups,
        "mid_block_type": config["mid_block_type"] if mid_block else None,
        "down_block_types": config["down_block_types"][:levels],
        "up_block_types": config["up_block_types"][len(wide) - levels :],
    }
    return config


def spread(wide: int, narrow: int) -> torch.Tensor:
    """(narrow,) evenly spaced indices into range(wide).

    Even spacing takes equally many channels of every GroupNorm group, of every attention head and of both halves of a
    GEGLU projection, and the same channels of a level wherever they appear, as long as those divide both widths.
    """
    return ((torch.arange(narrow, dtype=torch.float64) + 0.5) * wide / narrow).long()


@torch.no_grad()
def slice_unet(teacher: UNet2DConditionModel, config: dict) -> UNet2DConditionModel:
    """A student with `config` (see `student_config`) that starts from the teacher's weights.

    Every kept weight is a teacher weight times sqrt(teacher fan-in / student fan-in), so that a sum over fewer
    channels keeps its variance (weight subcloning, arXiv 2312.09299). Queries and keys also get the fourth root of
    the ratio of their head sizes each, which keeps the scale of q.k / sqrt(d). With the teacher's own config the
    student is the teacher, bit for bit.
    """
    student = UNet2DConditionModel(**config)
    t_conf, s_conf = teacher.config, student.config
    t_wide, s_wide = t_conf.block_out_channels, s_conf.block_out_channels
    drop = len(t_wide) - len(s_wide)  # the student's up block u is the teacher's up block u + drop
    last_t, last_s = t_conf.layers_per_block, s_conf.layers_per_block

    def teacher_name(name: str) -> str:
        match = re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name)
        if match:  # the last layer's skip connection comes from another level, so last stays last
            layer = int(match[3])
            return f"up_blocks.{int(match[1]) + drop}.{match[2]}.{last_t if layer == last_s else layer}.{match[4]}"
        return re.sub(r"^up_blocks\.(\d+)", lambda m: f"up_blocks.{int(m[1]) + drop}", name)

    def up_inputs(conf, level: int, layer: int) -> tuple[int, int]:
        """Channels that resnet `layer` of the up block at `level` gets from below and from its skip connection."""
        wide = conf.block_out_channels
        below = wide[min(level + 1, len(wide) - 1)] if layer == 0 else wide[level]
        return below, wide[max(level - 1, 0)] if layer == conf.layers_per_block else wide[level]

    def indices(name: str, dim: int, t: int, s: int) -> torch.Tensor:
        if t == s:
            return torch.arange(t)
        match = re.match(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(norm1|conv1|conv_shortcut)\.", name)
        if match and (dim == 1 or match[3] == "norm1"):  # [hidden from below, skip], each sliced for itself
            level, layer = len(s_wide) - 1 - int(match[1]), int(match[2])
            t_below, t_skip = up_inputs(t_conf, level, last_t if layer == last_s else layer)
            s_below, s_skip = up_inputs(s_conf, level, layer)
            return torch.cat([spread(t_below, s_below), t_below + spread(t_skip, s_skip)])
        if name == "time_embedding.linear_1.weight" and dim == 1:  # [cosines, sines]: the nearest frequencies
            half = (torch.arange(s // 2, dtype=torch.float64) * t / s).round().long()
            return torch.cat([half, t // 2 + half])
        return spread(t, s)

    source, sliced = teacher.state_dict(), {}
    for name, target in student.state_dict().items():
        whole = source[teacher_name(name)]
        weight = whole.float()
        for dim, (t, s) in enumerate(zip(weight.shape, target.shape)):
            weight = weight.index_select(dim, indices(name, dim, t, s).to(weight.device))
        if target.ndim > 1:
            weight = weight * (whole.shape[1] / target.shape[1]) ** 0.5
        if re.search(r"attn\d\.to_(q|k)\.weight", name):
            weight = weight * (whole.shape[0] / target.shape[0]) ** 0.25
        sliced[name] = weight.cpu()
    student.load_state_dict(sliced)
    return student
