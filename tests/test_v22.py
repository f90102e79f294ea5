"""V-2.2: its schedules, and whole runs of the script as a user starts it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

SCRIPT = ROOT / "v2" / "2.2.py"


def command(small_set, out, *more):
    return [sys.executable, str(SCRIPT), "--teacher", str(ROOT / "checkpoints" / "mini-teacher"), "--data", str(small_set),
            "--train-split", "train", "--val-split", "val", "--resolution", "32", "--channels", "16,32,32,48",
            "--steps", "24", "--batch-size", "8", "--lr", "1e-3", "--features", "effnet-lite0", "--eval-every", "16",
            "--eval-samples", "4", "--final-samples", "8", "--sample-steps", "3", "--save-every", "5", "--log-every", "1",
            "--device", "cpu", "--out", str(out), *more]


def run(*arguments):
    return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)


def last_step(out):
    path = out / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1])["step"] if path.is_file() and path.read_text() else 0


@pytest.fixture(scope="module")
def unbroken(small_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run(*command(small_set, out))
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_alpha_and_dropout_against_closed_forms(unbroken):
    spec = importlib.util.spec_from_file_location("v22", SCRIPT)
    v22 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(v22)
    assert v22.linear(1.0, 0.5, 0, 11) == 1.0 and v22.linear(1.0, 0.5, 10, 11) == 0.5
    assert v22.linear(1.0, 0.5, 5, 11) == 0.75
    lines = [json.loads(x) for x in (unbroken[0] / "metrics.jsonl").read_text().splitlines()]
    train = [x for x in lines if "loss" in x]
    assert [x["step"] for x in train] == list(range(1, 25))
    for i, x in enumerate(train):
        assert abs(x["alpha"] - (1 - 0.5 * i / 23)) < 1e-5
        assert abs(x["dropout"] - (0.05 + 0.15 * i / 23)) < 1e-5
        want = x["alpha"] * x["kd_loss"] + (1 - x["alpha"]) * x["noise_loss"]
        assert abs(x["loss"] - want) < 1e-5 * max(1, want)


def test_outputs_are_complete_and_stock(unbroken):
    out, printed = unbroken
    assert "FD(effnet-lite0)" in printed and "teacher" in printed and "FID" not in printed
    assert (out / "curves.png").is_file() and (out / "samples" / "step_000024.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(out / "student", safety_checker=None)
    assert pipeline.unet.config.sample_size == 8
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "evaluation" in x] == [16, 24]


def test_a_killed_and_resumed_run_ends_as_the_unbroken_one(small_set, unbroken, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(small_set, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and last_step(out) < 12:
        time.sleep(0.05)
    assert process.poll() is None
    process.kill()
    process.wait()
    again = run(*command(small_set, out))
    assert again.returncode == 1 and "--resume" in again.stderr and "Traceback" not in again.stderr
    done = run(*command(small_set, out, "--resume"))
    assert done.returncode == 0 and "going on at step" in done.stdout, done.stderr[-2000:]
    name = "student/unet/diffusion_pytorch_model.safetensors"
    want, found = load_file(unbroken[0] / name), load_file(out / name)
    assert all(torch.equal(want[k], found[k]) for k in want)
    steps = [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in x]
    assert steps == list(range(1, 25))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a child process")
def test_ctrl_c_saves_and_says_how_to_go_on(small_set, tmp_path):
    out = tmp_path / "stopped"
    process = subprocess.Popen(command(small_set, out, "--steps", "5000"), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and last_step(out) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in printed and "Traceback" not in errors
    assert any(out.glob("state-*.pt"))


@pytest.mark.parametrize("arguments, message", [
    (["--lr", "-1"], "--lr"), (["--batch-size", "0"], "--batch-size"), (["--alpha-start", "1.5"], "--alpha-start"),
    (["--data", "nowhere"], "--mini"), (["--channels", "128,128,128,160"], "wider"), (["--resolution", "36"], "multiple"),
])
def test_a_users_mistake_is_one_clear_line(small_set, tmp_path, arguments, message):
    done = run(*command(small_set, tmp_path / "x", *arguments))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_help_shows_every_setting_with_its_default():
    done = run(sys.executable, str(SCRIPT), "--help")
    text = " ".join(done.stdout.split())
    assert "weight of the KD term at the first step (default 1.0)" in text
    assert "160,288,320; with --mini 16,32,32,48" in text
