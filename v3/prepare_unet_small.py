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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: F401  (before diffusers: see there)

# isort: split
from diffusers import UNet2DConditionModel

from common.settings import check, parse
from common.teacher import load_unet, slice_unet, student_config

SIZES = ("sd_small", "sd_tiny")


@dataclass
class Settings:
    teacher: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a pipeline folder or a hub id
    size: str = "sd_tiny"  # sd_small or sd_tiny
    channels: tuple[int, ...] = ()  # width of each level that is left; empty: the teacher's
    out: str = "checkpoints/sd_tiny"  # the U-Net folder to write
    fp16: bool = False  # write half precision


def pruned_config(teacher: UNet2DConditionModel, size: str, channels: tuple[int, ...] = (), groups: int = 0) -> dict:
    """The config of a pruned student. Raises SystemExit where `channels` and GroupNorm `groups` do not fit the teacher."""
    wide = teacher.config.block_out_channels
    kept = wide if size == "sd_small" else wide[:-1]
    check({f"--channels must give {size} {len(kept)} widths, at most {','.join(map(str, kept))}":
               len(channels) in (0, len(kept))})
    return student_config(teacher, tuple(channels) or kept, layers=1, groups=groups, mid_block=size == "sd_small")


def main(s: Settings):
    check({f"--size must be one of {', '.join(SIZES)}": s.size in SIZES,
           f"{s.out} holds something already; choose another --out":
               not Path(s.out).exists() or Path(s.out).is_dir() and not any(Path(s.out).iterdir())})
    teacher = load_unet(s.teacher)
    student = slice_unet(teacher, pruned_config(teacher, s.size, s.channels))
    (student.half() if s.fp16 else student).save_pretrained(s.out)
    ours, theirs = (sum(p.numel() for p in unet.parameters()) for unet in (student, teacher))
    print(f"{s.size}: {ours:,} parameters, {ours / theirs:.1%} of the teacher's {theirs:,}, in {s.out}")


if __name__ == "__main__":
    main(parse(Settings, __doc__))
