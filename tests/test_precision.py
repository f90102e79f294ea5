"""What only a GPU's default precision reaches, on the CPU: every version in bf16 and fp16, from caching to drawing."""

import pytest
import torch
from conftest import ROOT, TEACHER, lines, run
from pretend_device import PRODUCTS, of_type
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

VERSIONS = {
    "v1": ("v1/1.py", "--channels", "16,32,32,48", "--mid-block", "--feature-blocks", "down_blocks.0,mid_block,up_blocks.3"),
    "v1 progressive": ("v1/1.py", "--channels", "16,32,32,48", "--feature-weight", "0", "--progressive", "--chains",
                       "1000,50,25", "--stage-percent", "40,30,30"),
    "v2.1": ("v2/2.1.py", "--channels", "64"),
    "v2.2": ("v2/2.2.py", "--channels", "64", "--store", "0"),
    "v2.2 store": ("v2/2.2.py", "--channels", "64", "--store", "2"),
    "v2.2 no cache": ("v2/2.2.py", "--channels", "64", "--store", "0", "--no-cache"),
    "v3": ("v3/train_student_kd.py", "--channels", "32,48,64", "--feature-weight", "0.1", "--store", "0"),
    "v3 shards": ("v3/train_student_kd.py", "--channels", "32,48,64", "--feature-weight", "0.1", "--store", "0"),
    "v3 store": ("v3/train_student_kd.py", "--channels", "32,48,64"),
    "v4": ("v4/4.py", "--channels", "64", "--trajectories", "12", "--teacher-steps", "1,1", "--passes", "2",
           "--also-passes", "1"),
}
# Losses are means of squared errors near 1 at first. bf16 has 8 bits of precision: 0.4 % a rounding; measured: 1.9 % at most,
# and for V-1's progressive targets, the difference of two predictions, 4e-3. fp16 has 11 bits; measured: 0.4 %.
BOUNDS = {"bf16": (0.03, 4e-3), "fp16": (0.01, 2e-3)}


class DeviceProducts(TorchDispatchMode):
    """Products in bf16 and fp16 as a GPU makes them: summed in fp32 and rounded once. The own kernels of a CPU without such
    units take ten times as long."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        low = next((a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype in (torch.bfloat16, torch.float16)), None)
        if low is None or func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs or {})
        return of_type(func(*of_type(args, torch.float32), **kwargs or {}), low)


def command(name, small_set, shards, cache, out, dtype):
    script, *own = VERSIONS[name]
    precision = ["--mixed-precision", "no" if dtype == "fp32" else dtype] if script.startswith("v3") else ["--dtype", dtype]
    if name == "v3 shards":
        own += ["--shards", shards]
    return [script, "--mini", "--data", small_set, "--steps", "4", "--batch-size", "6", "--lr", "1e-3", "--eval-every", "2",
            "--eval-samples", "2", "--final-samples", "4", "--sample-steps", "1", "--save-every", "2", "--log-every", "1",
            "--cache-folder", cache, "--out", out, "--device", "cpu", *precision, *own]


@pytest.fixture(scope="module")
def shards(small_set, tmp_path_factory):
    pytest.importorskip("webdataset", reason="pip install -r v3/requirements.txt")
    out = tmp_path_factory.mktemp("shards")
    done = run("v3/data.py", "--data", small_set, "--split", "train", "--shard-size", "12", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", VERSIONS)
def test_every_version_runs_in_the_precision_of_a_gpu(small_set, tmp_path, cache, request, name):
    if name.startswith("v3"):
        pytest.importorskip("tensorboard", reason="pip install -r v3/requirements.txt")
    shards = request.getfixturevalue("shards") if name == "v3 shards" else None
    losses = {}
    for dtype in ("fp32", "bf16", "fp16"):
        out = tmp_path / dtype
        arguments = command(name, small_set, shards, cache, out, dtype)
        with DeviceProducts():
            done = run(*arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        logged = lines(out)
        losses[dtype] = [x for x in logged if "loss" in x]
        assert [x["step"] for x in losses[dtype]] == [1, 2, 3, 4] and losses[dtype][-1]["skipped_steps"] == 0
        assert [x["step"] for x in logged if "evaluation" in x] == [2, 4]
        # the frozen parts are saved as they came, whatever they ran in
        for part in ("vae", "text_encoder", "tokenizer"):
            for file in (TEACHER / part).iterdir():
                assert (out / "student" / part / file.name).read_bytes() == file.read_bytes()
        weights = out / "student" / "unet" / "diffusion_pytorch_model.safetensors"
        unbroken = load_file(weights)
        assert {value.dtype for value in unbroken.values()} == {torch.float32}
        if dtype != "bf16":
            continue
        # resumed from the checkpoint before the last, it ends there again
        for file in (out / "checkpoint-00000004").iterdir():
            file.unlink()
        weights.unlink()
        with DeviceProducts():
            done = run(*arguments, "--resume")
        assert done.returncode == 0 and "going on at step 2" in done.stdout, done.stderr[-2000:]
        again = load_file(weights)
        assert all(torch.equal(value, again[key]) for key, value in unbroken.items())
    for dtype, (relative, absolute) in BOUNDS.items():
        for want, found in zip(losses["fp32"], losses[dtype], strict=True):
            for key in (key for key in want if key.endswith("loss")):
                assert abs(want[key] - found[key]) <= relative * want[key] + absolute, (dtype, key, want, found)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_drawing_in_the_precision_of_a_gpu(tmp_path, dtype):
    done = run("v3/inference.py", "--model", TEACHER, "--prompt", "a cat on the grass", "--steps", "2", "--device", "cpu",
               "--dtype", dtype, "--out", tmp_path, "--compare", TEACHER, "--grid")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "00000.png").is_file() and (tmp_path / "grid.png").is_file()


def test_the_scripts_stand_where_the_test_looks():
    assert all((ROOT / script).is_file() for script, *_ in VERSIONS.values())
