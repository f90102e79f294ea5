"""Prune a Stable Diffusion 1.x U-Net to `sd_small` or `sd_tiny` (BK-SDM, arXiv 2305.15798), as a stock diffusers folder.

    python v3/prepare_unet_small.py --size sd_tiny --out checkpoints/sd_tiny
    python v3/prepare_unet_small.py --size sd_tiny --channels 320,480,192 --out checkpoints/sd_tiny_65m

sd_small has one layer a block: down blocks keep layer 0, up blocks layers 0 and 2. sd_tiny also drops the innermost
level and the mid block. It is the config that changes, and weights are copied by name, so what is saved loads with
`UNet2DConditionModel.from_pretrained` and nothing else. `--channels` slices the levels narrower as well.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.files import from_root, full_disk_is_one_line, make_readable
from common.settings import parse, require, start
from common.slicing import slice_unet, student_config
from common.teacher import UNet2DConditionModel, load_unet


@dataclass
class Settings:
    teacher: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a pipeline folder or a hub id
    size: Literal["sd_small", "sd_tiny"] = "sd_tiny"  # what to prune to
    channels: tuple[int, ...] = ()  # width of each level that is left; empty: the teacher's
    out: str = "checkpoints/sd_tiny"  # the U-Net folder to write
    fp16: bool = False  # write half precision


def pruned_config(teacher: UNet2DConditionModel, size: str, channels: tuple[int, ...] = (), groups: int = 0) -> dict:
    """The config of a pruned student. Raises SystemExit where `channels` and GroupNorm `groups` do not fit the teacher."""
    wide = teacher.config.block_out_channels
    kept = wide if size == "sd_small" else wide[:-1]
    widths = ",".join(map(str, kept))
    require(len(channels) in (0, len(kept)), f"--channels must give {size} {len(kept)} widths, at most {widths}")
    return student_config(teacher, tuple(channels) or kept, layers=1, groups=groups, mid_block=size == "sd_small")


def main(s: Settings):
    out = Path(s.out)
    empty = not out.exists() or out.is_dir() and not any(out.iterdir())
    require(empty, f"{s.out} holds something already; choose another --out")
    teacher = load_unet(from_root(s.teacher))
    student = slice_unet(teacher, pruned_config(teacher, s.size, s.channels))
    student = student.half() if s.fp16 else student
    with full_disk_is_one_line(out.absolute().parent, "what was written is removed", remove=out):
        student.save_pretrained(out)
        make_readable(out)
    ours, theirs = (sum(p.numel() for p in unet.parameters()) for unet in (student, teacher))
    print(f"{s.size}: {ours:,} parameters, {ours / theirs:.1%} of the teacher's {theirs:,}, in {s.out}")


if __name__ == "__main__":
    start(main, parse(Settings, __doc__))
