"""Layer-wise feature matching between two U-Nets: forward hooks, and 1 x 1 projections where their widths differ."""

import torch
import torch.nn.functional as F

from common.settings import require
from common.slicing import even_channels, name_in_teacher


class ConvProjection(torch.nn.Conv2d):
    """1 x 1 convolution from the student's channels to the teacher's.

    It starts as the map that the student was sliced with: student channel j stands at the teacher's channel
    even_channels[j], and the teacher's other channels start at the nearest of those.
    """

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__(student_channels, teacher_channels, 1)
        kept = even_channels(teacher_channels, student_channels)
        distance = (torch.arange(teacher_channels)[:, None] - kept[None]).abs()
        nearest = distance.argmin(1)
        with torch.no_grad():
            self.weight.copy_(F.one_hot(nearest, student_channels)[:, :, None, None].float())
            self.bias.zero_()


class FeatureHooks:
    """Forward hooks that keep the outputs of some `blocks` of a U-Net from its last pass, until `take` hands them out.

    `names`: the keys in what `take` returns; by default the blocks' own names. Raises SystemExit where one is not there.
    """

    def __init__(self, unet, blocks: tuple[str, ...], names: tuple[str, ...] | None = None):
        self.kept, modules = {}, dict(unet.named_modules())
        for block, name in zip(blocks, names or blocks):
            require(block in modules, f"--feature-blocks: this U-Net has no {block}; it has {', '.join(block_names(unet))} and "
                    "what lies in them")
            modules[block].register_forward_hook(self._keep(name))

    def _keep(self, name: str):
        def hook(_, __, output):
            self.kept[name] = output[0] if isinstance(output, tuple) else output  # (B, channels, h, w)
        return hook

    def take(self) -> dict[str, torch.Tensor]:
        """{block: (B, channels, h, w)} of the last pass."""
        features, self.kept = self.kept, {}
        return features


def block_names(unet) -> list[str]:
    """A U-Net's blocks, as --feature-blocks takes them."""
    levels = range(len(unet.down_blocks))
    names = [f"{kind}_blocks.{i}" for kind in ("down", "up") for i in levels]
    return names + ["mid_block"] * (unet.mid_block is not None)


def hook_both(student, teacher, blocks: tuple[str, ...]) -> tuple[FeatureHooks, FeatureHooks]:
    """Hooks on the student's `blocks` and on those of the teacher that they were sliced from."""
    in_teacher = [name_in_teacher(f"{name}.", teacher.config, student.config).rstrip(".") for name in blocks]
    return FeatureHooks(student, blocks), FeatureHooks(teacher, in_teacher, blocks)


class FeatureMatching(torch.nn.Module):
    """Compares both sides' features; holds the projections, which are trained with the student and dropped in the end."""

    def __init__(self, student_features: dict[str, torch.Tensor], teacher_features: dict[str, torch.Tensor], loss):
        """The features of any pass tell how wide the projections must be.

        Raises SystemExit where a block's outputs differ in height and width.
        """
        super().__init__()
        self.loss, self.projections = loss, torch.nn.ModuleDict()
        require(student_features, "--feature-blocks names no block; --feature-weight 0 matches none")
        for name, ours in student_features.items():
            theirs = teacher_features[name]
            require(ours.ndim == theirs.ndim == 4, f"--feature-blocks: {name} gives no (channels, height, width); leave it out")
            sizes = tuple(ours.shape[2:]), tuple(theirs.shape[2:])
            require(sizes[0] == sizes[1], f"--feature-blocks: {name} gives {sizes[0]} in the student and {sizes[1]} in the "
                    "teacher; leave it out")
            projection = ConvProjection(ours.shape[1], theirs.shape[1])
            self.projections[name.replace(".", "-")] = projection.to(ours.device)

    def forward(self, student_features: dict[str, torch.Tensor], teacher_features: dict[str, torch.Tensor],
                weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Mean feature loss over the matched blocks, each picture's times its `weight` (B, 1, 1, 1).

        Errors of channel c are divided by s_c, s_c^2 = (sum_hw f_c^2 + mean_chw f^2) / (h w + 1): the channel's mean square in
        the teacher f, with one position more at the picture's mean, since a channel that is all but off would count the most
        otherwise. Every picture has units of its own, so that a batch split over several processes has the same loss.
        """
        losses = []
        for name, ours in student_features.items():
            projected = self.projections[name.replace(".", "-")](ours).float()
            theirs = teacher_features[name].float()
            square, positions = theirs.square(), theirs[0, 0].numel()
            mean_square = square.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
            rms = ((square.sum((2, 3), keepdim=True) + mean_square) / (positions + 1)).sqrt()  # (B, channels, 1, 1)
            losses.append((weight * self.loss(projected / rms, theirs / rms, reduction="none")).mean())
        return torch.stack(losses).mean()


class StudentWithFeatures(torch.nn.Module):
    """The student and the projections as one module, so that one wrapper (DDP, FSDP, DeepSpeed) sees every gradient.

    Raises SystemExit where a block is missing on one side or differs in size.
    """

    def __init__(self, student, teacher, blocks: tuple[str, ...], loss, encoder_hidden_states: torch.Tensor):
        """One pass of both networks over zeros shows how many channels each block has; the `encoder_hidden_states`
        (1, tokens, width) of any caption will do."""
        super().__init__()
        self.student = student
        self.student_hooks, self.teacher_hooks = hook_both(student, teacher, blocks)
        side = student.config.sample_size
        parameter, device = next(teacher.parameters()), encoder_hidden_states.device
        encoder_hidden_states = encoder_hidden_states.expand(2, -1, -1)  # of one picture a GroupNorm may see a single value
        zeros, start = torch.zeros(2, 4, side, side, device=device), torch.zeros(2, device=device)
        with torch.no_grad():
            student(zeros, start, encoder_hidden_states)
            teacher(zeros.to(parameter.dtype), start, encoder_hidden_states.to(parameter.dtype))
        self.matching = FeatureMatching(self.student_hooks.take(), self.teacher_hooks.take(), loss)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, encoder_hidden_states: torch.Tensor,
                teacher_features: dict[str, torch.Tensor],
                weight: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise prediction (B, 4, h, w) float32 and the feature loss, of which each picture's part has its `weight`."""
        dtype = self.student.dtype  # DeepSpeed's weights are in bf16 or fp16, and it switches autocast off
        noise_pred = self.student(noisy.to(dtype), timesteps, encoder_hidden_states.to(dtype), return_dict=False)[0]
        return noise_pred.float(), self.matching(self.student_hooks.take(), teacher_features, weight)
