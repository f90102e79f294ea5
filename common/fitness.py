"""What a teacher knows at the resolution at which it is asked, noise level by noise level, before anything learns from it.

A teacher is of little use far from the resolution that it was trained at: Stable Diffusion 1.5 learned at 512 px. Its squared
error on the noise, beside that of a guess that knows no picture, shows it in seconds.
"""

import json
from typing import NamedTuple

import numpy as np
import torch

from common.cache import Batch, cache_key
from common.files import full_disk_is_one_line, read_kept, write_atomically
from common.sampling import encode_captions, encode_images
from common.trainer import predict_noise

LEVELS = 8  # noise levels: the middles of as many equal parts of the schedule
PICTURES = 64  # validation pictures, each asked about at every level
UNFIT = 0.7  # of the yardstick: fit teachers of the embedded world reach 0.63 at their worst level (docs/results.md)


class Fitness(NamedTuple):
    timesteps: list[int]
    error: list[float]  # the teacher's mean squared error on the noise at each timestep
    yardstick: list[float]  # that of the best guess without a teacher

    @property
    def ratio(self) -> list[float]:
        return [error / best for error, best in zip(self.error, self.yardstick)]

    def knowledge(self, noise_scheduler, weigh: bool = True) -> torch.Tensor:
        """(timesteps,) of the whole schedule: 1 - error / yardstick, and 0 where the teacher is unfit; linear between the
        measured ones. All ones where nothing is to `weigh`."""
        ratio = np.array(self.ratio) if weigh else np.zeros(len(self.error))
        known = np.where(ratio < UNFIT, 1 - ratio, 0)  # what an unfit teacher knows pulls a student away all the same
        every = np.arange(noise_scheduler.config.num_train_timesteps)
        return torch.from_numpy(np.interp(every, self.timesteps, known)).float()

    def unfit(self) -> list[int]:
        """The timesteps at which the teacher is not clearly better than the yardstick."""
        return [t for t, ratio in zip(self.timesteps, self.ratio) if not ratio < UNFIT]

    def table(self) -> str:
        """Four lines: timestep, the teacher's error, the yardstick, their ratio."""
        rows = {"timestep": [f"{t}" for t in self.timesteps], "teacher's error": [f"{x:.3f}" for x in self.error],
                "best blind guess": [f"{x:.3f}" for x in self.yardstick],
                "ratio": [f"{x:.2f}" if x < 100 else f"{x:.0f}" for x in self.ratio]}
        return "\n".join(name.ljust(18) + "".join(value.rjust(7) for value in values) for name, values in rows.items())

    def warning(self, resolution: int, effect: str, cure: str = "") -> str:
        """For a teacher that does not know its job at `resolution` px what that does, and the `cure`: to adapt it, unless
        another is given. "" for one that does."""
        if not self.unfit():
            return ""
        where = ", ".join(map(str, self.unfit()))
        cure = cure or (f"Adapt it first: python checkpoints/adapt_teacher.py --resolution {resolution} --out FOLDER, with "
                        "this run's --mini, --teacher and --data")
        return (f"warning: at {resolution} px this teacher knows hardly more than a blind guess at timesteps {where}; "
                f"{effect}. {cure}")

    def describe(self, resolution: int, effect: str, cure: str = "") -> str:
        """The table, and the warning where one is due."""
        return "\n".join(filter(None, [self.table(), self.warning(resolution, effect, cure)]))


def blind_error(alphas_cumprod: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """(levels,) mean squared error of the best guess of the noise that knows only the latents' means and variances.

    For x_t = sqrt(a) x_0 + sqrt(1 - a) noise with independent Gaussians x_0 ~ N(m, s^2), (x_t, noise) are jointly Gaussian:
    E[noise | x_t] = sqrt(1 - a) (x_t - sqrt(a) m) / (a s^2 + 1 - a), which misses by Var[noise | x_t] =
    a s^2 / (a s^2 + 1 - a); for s = 1 that is a. `variance` (channels,) holds s^2; the channels' errors are averaged.
    """
    a = alphas_cumprod[:, None]  # (levels, 1)
    signal = a * variance
    return (signal / (signal + 1 - a)).mean(1)


@torch.no_grad()
def measure_fitness(teacher, evaluator) -> Fitness:
    """The teacher's error on the first validation pictures of an `Evaluator` with their captions: computed once, kept in its
    folder.

    A generator of the CPU's draws the noise, so every device, process and resumed run sees the same.
    """
    dataset = evaluator.dataset
    indices = evaluator.usable[:PICTURES]
    key = cache_key("fitness", teacher, dataset.fingerprint(), LEVELS, len(indices))
    path = evaluator.folder / f"teacher-fitness-{key}.json"
    if kept := read_kept(path):
        return Fitness(**kept)
    alphas_cumprod = teacher.noise_scheduler.alphas_cumprod.cpu()  # `add_noise` may have moved it to the device
    width = len(alphas_cumprod) / LEVELS
    timesteps = [int(width * (k + 0.5)) for k in range(LEVELS)]
    captions = [dataset.captions[i][0] for i in indices]
    latents = encode_images(teacher.vae, torch.stack([dataset[i] for i in indices])).float()  # (n, 4, h, w)
    encoder_hidden_states = encode_captions(teacher.text_encoder, teacher.tokenizer, captions).float()
    generator, errors = torch.Generator().manual_seed(0), []
    for t in timesteps:
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        batch = Batch(latents, encoder_hidden_states, noise, torch.full((len(latents),), t, device=latents.device))
        noisy = teacher.noise_scheduler.add_noise(latents, noise, batch.timesteps)
        errors.append((predict_noise(teacher.unet, noisy, batch) - noise).square().mean())
    variance = latents.var((0, 2, 3)).cpu()  # (4,)
    fitness = Fitness(timesteps, torch.stack(errors).tolist(), blind_error(alphas_cumprod[timesteps], variance).tolist())
    with full_disk_is_one_line(path.parent, "what is cached is kept"):
        write_atomically(path, json.dumps(fitness._asdict()).encode())
    return fitness
