"""Every version on a pretended GPU (tests/pretend_device.py), where device mistakes raise as on a real one."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TEACHER, lines
from pretend_device import POSSIBLE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not POSSIBLE, reason="needs a CPU build of torch 2.13 on Linux")]

VERSIONS = {
    "v1": ["v1/1.py", "--channels", "16,32,32,48", "--mid-block", "--feature-blocks", "mid_block,up_blocks.3", "--progressive",
           "--chains", "1000,50", "--stage-percent", "60,40"],
    "v2.1": ["v2/2.1.py", "--channels", "16,32"],
    "v2.2": ["v2/2.2.py", "--channels", "16,32", "--store", "0", "--no-cache", "--flip"],
    "v2.2 store": ["v2/2.2.py", "--channels", "16,32", "--store", "1"],
    "v3": ["v3/train_student_kd.py", "--channels", "32,48,64", "--feature-weight", "0.1", "--store", "0"],
    "v3 store": ["v3/train_student_kd.py", "--channels", "32,48,64"],
    "v4": ["v4/4.py", "--channels", "16,32", "--trajectories", "8", "--passes", "2", "--teacher-steps", "1,2",
           "--also-passes", "", "--teacher-passes", ""],
    "adapt": ["checkpoints/adapt_teacher.py", "--rank", "2"],
}


def on_a_device(kind, *arguments, program=None, environment=None):
    start = [sys.executable, *(["-c", program] if program else []), *([] if program else ["tests/pretend_device.py"]), kind]
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT / "tests")} | (environment or {}))


def command(name, small_set, folder, dtype):
    script, *own = VERSIONS[name]
    precision = ["--mixed-precision", "no" if dtype == "fp32" else dtype] if script.startswith("v3") else ["--dtype", dtype]
    return [script, "--mini", "--data", small_set, "--steps", "3", "--batch-size", "4", "--eval-every", "0",
            "--final-samples", "2", "--sample-steps", "1", "--save-every", "2", "--log-every", "1",
            "--cache-folder", folder / "cache", "--out", folder / "run", *precision, *own]


RUNS = [*((name, "cuda", "bf16") for name in VERSIONS), ("v2.2 store", "mps", "fp32"), ("adapt", "mps", "fp32")]


@pytest.mark.parametrize("name, kind, dtype", RUNS)
def test_a_run_from_caching_to_saving(small_set, tmp_path, name, kind, dtype):
    arguments = command(name, small_set, tmp_path, dtype)
    done = on_a_device(kind, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    logged = [x for x in lines(tmp_path / ("run-run" if name == "adapt" else "run")) if "loss" in x]
    assert [x["step"] for x in logged] == [1, 2, 3] and all(("gpu_gib" in x) == (kind == "cuda") for x in logged)
    if name in ("v1", "v3", "v3 store"):  # V-1 has the most to restore; V-3's loop is the other one
        for file in (tmp_path / "run" / "checkpoint-00000003").iterdir():
            file.unlink()
        done = on_a_device(kind, *arguments, "--resume")
        assert done.returncode == 0 and "going on at step 2" in done.stdout, done.stderr[-2000:]


def test_the_launchers_silence_is_the_devices_best(small_set, tmp_path):
    """`accelerate launch` says "no" where it was told nothing, which must not mean fp32 on a GPU."""
    arguments = [part for part in command("v3", small_set, tmp_path, "") if part not in ("--mixed-precision", "")]
    done = on_a_device("cuda", *arguments, environment={"ACCELERATE_MIXED_PRECISION": "no"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "inputs.json").read_text("utf-8"))["dtype"] == "torch.bfloat16"


def test_drawing(tmp_path):
    kind = "cuda"
    done = on_a_device(kind, "v3/inference.py", "--model", TEACHER, "--prompt", "a cat", "--steps", "2", "--grid", "--compare",
                       TEACHER, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "grid.png").is_file() and f"on {kind}" in done.stdout


WAITS_OF_STEPS = """
import os, runpy, sys
from pretend_device import pretend
kind, *sys.argv = sys.argv[1:]
sys.path[:1] = [os.path.dirname(sys.argv[0]), "."]
with pretend(kind) as gpu:
    from common.run import Run
    log_step, waits = Run.log_step, []

    def noted(run, done, *of, **values):
        waits.append(dict(gpu.syncs))
        log_step(run, done, *of, **values)
        gpu.reset()

    Run.log_step = noted
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print("waits", waits[3:-1])
"""


@pytest.mark.parametrize("name, dtype", [("v2.2 store", "bf16"), ("v1", "fp16"), ("v4", "bf16")])
def test_a_training_step_never_waits_for_the_gpu(small_set, tmp_path, name, dtype):
    """Between log lines: no value is read, and what goes to the GPU goes from pinned memory."""
    more = ["--steps", "8", "--log-every", "100", "--save-every", "100"]
    done = on_a_device("cuda", *command(name, small_set, tmp_path, dtype), *more, program=WAITS_OF_STEPS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"waits {[{}] * 4}" in done.stdout, done.stdout[-500:]
