"""Kill a short run again and again, resume it, and compare its student with the unbroken run's, bit for bit.

    python tests/kill_runs.py --kills 50

Kills (SIGKILL) come at random moments: while the run caches, trains, evaluates or saves. Every finished run starts over,
cache and all, until there have been enough of them.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from conftest import make_small_set
from safetensors.torch import load_file
from tqdm import tqdm

from common.run import read_log
from common.settings import parse


@dataclass
class Settings:
    script: str = "v2/2.2.py"  # the version to kill
    kills: int = 50  # how often
    seed: int = 0  # of the moments


def main(s: Settings):
    rng = random.Random(s.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_small_set(folder / "set")

        def command(name, *more):
            return [sys.executable, str(ROOT / s.script), "--teacher", str(ROOT / "checkpoints" / "mini-teacher"), "--data",
                    str(folder / "set"), "--train-split", "train", "--val-split", "val", "--resolution", "32", "--channels",
                    "32,48,48", "--features", "effnet-lite0", "--device", "cpu",
                    "--steps", "40", "--batch-size", "16", "--eval-every", "15",
                    "--eval-samples", "4", "--final-samples", "8", "--sample-steps", "2", "--save-every", "4", "--log-every",
                    "1", "--cache-folder", str(folder / "cache"), "--out", str(folder / name), *more]

        began = time.perf_counter()
        subprocess.run(command("unbroken"), check=True, capture_output=True)
        whole_s = time.perf_counter() - began
        weights = "student/unet/diffusion_pytorch_model.safetensors"
        want = load_file(folder / "unbroken" / weights)
        kills, finished, moments = 0, 0, {}
        bar = tqdm(total=s.kills, desc="kills")
        while kills < s.kills or (folder / "run").exists():
            resume = ["--resume"] if (folder / "run" / "settings.json").is_file() else []
            process = subprocess.Popen(command("run", *resume), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            try:
                # enough kills done: the last run may end
                printed, _ = process.communicate(timeout=rng.uniform(0.2, 0.7) * whole_s if kills < s.kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                printed, _ = process.communicate()
                kills += 1
                bar.update()
                lines = read_log(folder / "run")
                step = lines[-1]["step"] if lines else 0
                moments[step] = moments.get(step, 0) + 1
                continue
            assert process.returncode == 0, printed
            found = load_file(folder / "run" / weights)
            assert all(torch.equal(want[k], found[k]) for k in want), "a resumed run ended elsewhere"
            finished += 1
            shutil.rmtree(folder / "run")
            shutil.rmtree(folder / "cache")
        bar.close()
        print(f"{kills} kills, last logged steps {dict(sorted(moments.items()))}; {finished} runs finished, all equal to the "
              "unbroken one bit for bit")


if __name__ == "__main__":
    main(parse(Settings, __doc__))
