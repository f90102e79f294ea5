"""Layer-wise feature matching between two U-Nets: forward hooks, and 1 x 1 projections where their widths differ."""

import re

import torch
import torch.nn.functional as F

from common.teacher import spread


class ConvProjection(torch.nn.Conv2d):
    """1 x 1 convolution from the student's channels to the teacher's.

    It starts as the map that the student was sliced with: student channel j stands at teacher channel spread[j], and the
    teacher's other channels start at the nearest of those.
    """

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__(student_channels, teacher_channels, 1)
        kept = spread(teacher_channels, student_channels)
        nearest = (torch.arange(teacher_channels)[:, None] - kept[None]).abs().argmin(1)
        with torch.no_grad():
            self.weight.copy_(F.one_hot(nearest, student_channels)[:, :, None, None].float())
            self.bias.zero_()


def block_names(unet) -> list[str]:
    """A U-Net's blocks, as --feature-blocks takes them."""
    levels = range(len(unet.down_blocks))
    return [f"{k}_blocks.{i}" for k in ("down", "up") for i in levels] + ["mid_block"] * (unet.mid_block is not None)


class FeatureMatching(torch.nn.Module):
    """Catches the outputs of blocks of both networks with forward hooks and compares them.

    Raises SystemExit where a name matches no block, or a pair's outputs differ in height and width.
    """

    def __init__(self, student, teacher, blocks: tuple[str, ...], loss):
        super().__init__()
        self.loss_of, self.caught = loss, {}
        deeper = len(teacher.down_blocks) - len(student.down_blocks)  # up blocks are counted from the innermost level
        self.pairs = blocks
        for name in blocks:
            theirs = re.sub(r"^up_blocks\.(\d+)", lambda m: f"up_blocks.{int(m[1]) + deeper}", name)
            for side, unet, block in (("student", student, name), ("teacher", teacher, theirs)):
                if block not in dict(unet.named_modules()):
                    raise SystemExit(f"error: --feature-blocks: the {side} has no {block}; it has "
                                     f"{', '.join(block_names(unet))} and what lies in them")
                unet.get_submodule(block).register_forward_hook(self._catch(side, name))
        self.projections = None

    def _catch(self, side: str, name: str):
        def hook(_, __, output):
            self.caught[side, name] = output[0] if isinstance(output, tuple) else output
        return hook

    def build(self):
        """Make the projections between what the last pass of each network left."""
        self.projections = torch.nn.ModuleDict()
        for name in self.pairs:
            ours, theirs = self.caught["student", name], self.caught["teacher", name]
            if ours.shape[2:] != theirs.shape[2:]:
                raise SystemExit(f"error: --feature-blocks: {name} gives {tuple(ours.shape[2:])} in the student and "
                                 f"{tuple(theirs.shape[2:])} in the teacher; leave it out")
            self.projections[name.replace(".", "-")] = ConvProjection(ours.shape[1], theirs.shape[1]).to(ours.device)

    def forward(self) -> torch.Tensor:
        """The mean over the pairs of the loss of what the last passes left, in units of the teacher's root mean square.

        The unit is each picture's own, so that a batch split over several processes has the same loss.
        """
        losses = []
        for name in self.pairs:
            theirs = self.caught.pop(("teacher", name)).float()
            ours = self.projections[name.replace(".", "-")](self.caught.pop(("student", name))).float()
            scale = theirs.square().mean((1, 2, 3), keepdim=True).sqrt()
            losses.append(self.loss_of(ours / scale, theirs / scale))
        return torch.stack(losses).mean()


def match_features(world, blocks: tuple[str, ...], loss) -> FeatureMatching:
    """Hooks on the student and the teacher of a `World`, with projections sized by one pass of each over zeros."""
    matching = FeatureMatching(world.student, world.teacher.unet, blocks, loss)
    side = world.student.config.sample_size
    latents, timesteps = (torch.zeros(shape, device=world.device) for shape in ((2, 4, side, side), (2,)))
    hidden = world.pairs.empty.float().expand(2, -1, -1)
    with torch.no_grad(), world.autocast():
        world.student(latents, timesteps, hidden), world.teacher_pred(latents, timesteps, hidden)
    matching.build()
    return matching
