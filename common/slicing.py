"""A student's start: a slice of the teacher's U-Net, with fewer levels, layers and channels."""

import re

import torch
from diffusers import UNet2DConditionModel

from common.settings import require


def student_config(teacher: UNet2DConditionModel, channels: tuple[int, ...], layers: int, groups: int = 0,
                   mid_block: bool = True) -> dict:
    """The teacher's U-Net config with other widths, as many levels as `channels` has, and `layers` a block.

    Fewer levels keep the outer ones; a student that stops above the teacher's innermost, attention-free level has
    cross-attention in all of its own; without `mid_block` it has none. 0 GroupNorm `groups` keep the teacher's number.
    Raises SystemExit where it cannot be a slice.
    """
    config = {k: v for k, v in teacher.config.items() if not k.startswith("_")}
    wide, levels, most_layers = config["block_out_channels"], len(channels), config["layers_per_block"]
    groups, heads = groups or config["norm_num_groups"], config["attention_head_dim"]
    no_slice = "this student is no slice of the teacher: "
    require(1 <= levels <= len(wide), f"{no_slice}{levels} levels; the teacher has {len(wide)}")
    for narrow, whole in zip(channels, wide):
        require(narrow <= whole, f"{no_slice}channels {channels} are wider than the teacher's {wide}")
        divides = narrow % groups == 0 and narrow % heads == 0
        require(divides, f"{no_slice}channels {channels} do not all divide into {groups} groups and {heads} heads")
    require(1 <= layers <= most_layers, f"{no_slice}{layers} layers a block; the teacher has {most_layers}")
    return config | {
        "block_out_channels": tuple(channels), "layers_per_block": layers, "norm_num_groups": groups,
        "mid_block_type": config["mid_block_type"] if mid_block else None,
        "down_block_types": config["down_block_types"][:levels],
        "up_block_types": config["up_block_types"][len(wide) - levels :],
    }


def even_channels(wide: int, narrow: int) -> torch.Tensor:
    """(narrow,) evenly spaced indices into range(wide): the teacher's channels that a narrower student keeps.

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
    source, sliced = teacher.state_dict(), {}
    for name, target in student.state_dict().items():
        whole = source[name_in_teacher(name, teacher.config, student.config)]
        weight = whole.float()
        for dim, (wide, narrow) in enumerate(zip(whole.shape, target.shape)):
            if wide != narrow:
                kept = kept_channels(name, dim, wide, narrow, teacher.config, student.config)
                weight = weight.index_select(dim, kept.to(weight.device))
        if target.ndim > 1:
            weight = weight * (whole.shape[1] / target.shape[1]) ** 0.5
        if re.search(r"attn\d\.to_(q|k)\.weight", name):
            weight = weight * (whole.shape[0] / target.shape[0]) ** 0.25
        sliced[name] = weight.cpu()
    student.load_state_dict(sliced)
    return student


def name_in_teacher(name: str, teacher_config, student_config) -> str:
    """The teacher's weight that the student's weight `name` is cut from. Up blocks count from the innermost level, and their
    last layer, whose skip connection comes from another level, stays the last."""
    deeper = len(teacher_config.block_out_channels) - len(student_config.block_out_channels)
    last = student_config.layers_per_block
    match = re.match(r"up_blocks\.(\d+)\.(.*)", name)
    if not match:
        return name
    block, rest = int(match[1]) + deeper, match[2]
    in_last_layer = re.match(rf"(resnets|attentions)\.{last}\.(.*)", rest)
    if in_last_layer:
        rest = f"{in_last_layer[1]}.{teacher_config.layers_per_block}.{in_last_layer[2]}"
    return f"up_blocks.{block}.{rest}"


def up_resnet_inputs(config, level: int, is_first: bool, is_last: bool) -> tuple[int, int]:
    """Channels that a resnet of the up block at `level` gets from below and from its skip connection."""
    wide = config.block_out_channels
    from_below = wide[min(level + 1, len(wide) - 1)] if is_first else wide[level]
    from_skip = wide[max(level - 1, 0)] if is_last else wide[level]
    return from_below, from_skip


def kept_channels(name: str, dim: int, wide: int, narrow: int, teacher_config, student_config) -> torch.Tensor:
    """(narrow,) which of the `wide` indices along `dim` of the weight `name` the student keeps."""
    match = re.match(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(norm1|conv1|conv_shortcut)\.", name)
    if match and (dim == 1 or match[3] == "norm1"):  # [from below, skip], each sliced for itself
        level = len(student_config.block_out_channels) - 1 - int(match[1])
        layer = int(match[2])
        place = level, layer == 0, layer == student_config.layers_per_block
        wide_below, wide_skip = up_resnet_inputs(teacher_config, *place)
        narrow_below, narrow_skip = up_resnet_inputs(student_config, *place)
        from_below = even_channels(wide_below, narrow_below)
        from_skip = even_channels(wide_skip, narrow_skip)
        return torch.cat([from_below, wide_below + from_skip])
    if name == "time_embedding.linear_1.weight" and dim == 1:  # [cosines, sines]: the nearest frequencies
        half = (torch.arange(narrow // 2, dtype=torch.float64) * wide / narrow).round().long()
        return torch.cat([half, wide // 2 + half])
    return even_channels(wide, narrow)
