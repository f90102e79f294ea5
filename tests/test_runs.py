"""V-1, V-2.1 and V-2.2 as a user starts them: what a run leaves, kills and resumes, mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, lines, script
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from common.run import comparable
from common.settings import parse
from common.training import Learner, one_cycle

SCRIPTS = {"v1": ROOT / "v1" / "1.py", "v2.1": ROOT / "v2" / "2.1.py", "v2.2": ROOT / "v2" / "2.2.py",
           "v2.2 store": ROOT / "v2" / "2.2.py"}
OWN = {"v1": ["--mid-block", "--feature-blocks", "down_blocks.0,mid_block,up_blocks.3", "--progressive", "--chains",
              "1000,50,25", "--stage-percent", "40,30,30"],
       "v2.1": [], "v2.2": ["--store", "0"], "v2.2 store": ["--store", "3"]}


def command(name, small_set, out, *more):
    return [sys.executable, str(SCRIPTS[name]), "--teacher", str(ROOT / "checkpoints" / "mini-teacher"), "--data",
            str(small_set), "--train-split", "train", "--val-split", "val", "--resolution", "32", "--channels",
            "16,32,32,48", "--steps", "24", "--batch-size", "8", "--lr", "1e-3", "--features", "effnet-lite0",
            "--eval-every", "16", "--eval-samples", "4", "--final-samples", "8", "--sample-steps", "3", "--save-every", "5",
            "--log-every", "1", "--device", "cpu", "--out", str(out), *OWN[name], *more]


def run(*arguments):
    return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)


def last_step(out):
    path = out / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1])["step"] if path.is_file() and path.read_text() else 0


@pytest.fixture(scope="module", params=SCRIPTS)
def unbroken(request, small_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run(*command(request.param, small_set, out))
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, out, done.stdout


def test_outputs_are_complete_and_stock(unbroken):
    _, out, printed = unbroken
    assert "FD(effnet-lite0)" in printed and "teacher" in printed and "FID" not in printed
    assert (out / "curves.png").is_file() and (out / "samples" / "step_000024.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(out / "student", safety_checker=None)
    assert pipeline.unet.config.sample_size == 8
    assert [x["step"] for x in lines(out) if "evaluation" in x] == [16, 24]
    assert [x["step"] for x in lines(out) if "loss" in x] == list(range(1, 25))
    assert [x["step"] for x in comparable(lines(out))] == [16]  # the last evaluation has more samples: no point of the curve
    card = (out / "student" / "README.md").read_text()
    assert card.startswith("---\n") and "model-index" in card and "FD(effnet-lite0)" in card


def test_the_loss_is_made_of_its_parts(unbroken):
    name, out, _ = unbroken
    train = [x for x in lines(out) if "loss" in x]
    for i, x in enumerate(train):
        if name == "v2.2":
            assert abs(x["alpha"] - (1 - 0.5 * i / 23)) < 1e-5
            assert abs(x["dropout"] - (0.05 + 0.15 * i / 23)) < 1e-5
        if name == "v2.2 store":
            assert abs(x["dropout"] - (0.075, 0.125, 0.175)[i // 8]) < 1e-5
        if name.startswith("v2.2"):
            want = x["alpha"] * x["kd_loss"] + (1 - x["alpha"]) * x["noise_loss"]
        elif name == "v1":
            assert x["chain"] == (1000 if i < 9 else 50 if i < 16 else 25)
            want = x["noise_loss"] + 0.1 * x["feature_loss"]
        else:
            continue
        assert abs(x["loss"] - want) < 1e-5 * max(1, want)


def test_a_killed_and_resumed_run_ends_as_the_unbroken_one(small_set, unbroken, tmp_path):
    name, whole, _ = unbroken
    out = tmp_path / "killed"
    process = subprocess.Popen(command(name, small_set, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and last_step(out) < 12:
        time.sleep(0.05)
    assert process.poll() is None
    process.kill()
    process.wait()
    again = run(*command(name, small_set, out))
    assert again.returncode == 1 and "--resume" in again.stderr and "Traceback" not in again.stderr
    newest = max(out.glob("state-*.pt"))  # as if the disk had failed it
    newest.write_bytes(newest.read_bytes()[:10_000])
    done = run(*command(name, small_set, out, "--resume"))
    assert done.returncode == 0 and "is broken" in done.stdout and "going on at step" in done.stdout, done.stderr[-2000:]
    weights = "student/unet/diffusion_pytorch_model.safetensors"
    want, found = load_file(whole / weights), load_file(out / weights)
    assert all(torch.equal(want[k], found[k]) for k in want)
    assert [x["step"] for x in lines(out) if "loss" in x] == list(range(1, 25))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to a child process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(small_set, tmp_path, number):
    out = tmp_path / "stopped"
    process = subprocess.Popen(command("v2.1", small_set, out, "--steps", "5000"), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and last_step(out) < 2:
        time.sleep(0.05)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in printed and "Traceback" not in errors
    assert any(out.glob("state-*.pt"))


@pytest.mark.parametrize("name, arguments, message", [
    ("v2.2", ["--lr", "-1"], "--lr"), ("v2.2", ["--batch-size", "0"], "--batch-size"),
    ("v2.2", ["--alpha-start", "1.5"], "--alpha-start"), ("v2.1", ["--data", "nowhere"], "--mini"),
    ("v2.1", ["--channels", "128,128,128,160"], "wider"), ("v2.1", ["--resolution", "36"], "multiple"),
    ("v1", ["--feature-blocks", "down_blocks.7"], "down_blocks.7"), ("v1", ["--chains", "25,50,1000"], "--chains"),
    ("v1", ["--target", "y"], "--target"),
    ("v1", ["--chains", "1000,125,50", "--stage-percent", "40,30,30"], "halve"), ("v1", ["--chains", "600,50,25"], "divide"),
    ("v2.1", ["--device", "foo"], "--device must be"),
    ("v2.1", ["--device", "cuda:99"], "no such device"), ("v2.1", ["--channels", "0,0"], "--channels"),
    ("v2.1", ["--channels", ","], "comma"), ("v2.1", ["--groups", "5"], "groups"), ("v2.1", ["--groups", "-2"], "--groups"),
    ("v2.1", ["--layers", "3"], "layers"), ("v2.1", ["--resolution", "0"], "multiple"), ("v2.1", ["--seed", "-1"], "--seed"),
    ("v2.2", ["--guidance", "nan"], "finite"), ("v2.2", ["--cache-gb", "inf"], "finite"), ("v2.1", ["--steps", "1e3"], "int"),
    ("v2.1", ["--out", str(ROOT / "LICENSE")], "--out"), ("v2.1", ["--cache-folder", str(ROOT / "LICENSE")], "--cache-folder"),
    ("v2.1", ["--teacher", str(ROOT / "LICENSE")], "pipeline folder"), ("v2.1", ["--train-split", "no"], "captions_no.json"),
])
def test_a_users_mistake_is_one_clear_line(small_set, tmp_path, capsys, name, arguments, message):
    version = script(str(SCRIPTS[name].relative_to(ROOT)))
    with pytest.raises(SystemExit) as stop:
        version.main(parse(version.Settings, "", version.MINI, command(name, small_set, tmp_path / "x", *arguments)[2:]))
    assert message in (stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err)
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


@pytest.mark.parametrize("steps", [2, 3, 50])
def test_the_learning_rate_rises_and_falls_in_runs_of_any_length(steps):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    scheduler, rates = one_cycle(optimizer, SimpleNamespace(lr=0.1, warmup=0.05, steps=steps)), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.004) and rates[-1] < 1e-5 and (steps == 2 or max(rates) > 0.09)


def test_help_shows_every_setting_with_its_default():
    done = run(sys.executable, str(SCRIPTS["v2.2"]), "--help")
    text = " ".join(done.stdout.split())
    assert "weight of the KD term at the first step (default 1.0)" in text
    assert "320,352; with --mini" in text


def test_linear_against_closed_form():
    linear = script("v2/2.2.py").linear
    assert linear(1.0, 0.5, 0, 11) == 1.0 and linear(1.0, 0.5, 10, 11) == 0.5 and linear(1.0, 0.5, 5, 11) == 0.75


def test_a_step_without_finite_gradients_is_skipped_and_counted():
    torch.manual_seed(0)
    student = torch.nn.Linear(3, 1)
    world = SimpleNamespace(student=student, device=torch.device("cpu"), dtype=torch.float32)
    learner = Learner(world, SimpleNamespace(lr=0.1, weight_decay=0.0, max_grad_norm=1.0, steps=10, warmup=0.3,
                                             ema_decay=0.9, batch_size=1))
    learner.step(student(torch.ones(1, 3)).sum(), 0)
    before = student.weight.detach().clone()
    for step, scale in enumerate((float("nan"), float("inf"))):
        learner.step(student(torch.ones(1, 3)).sum() * scale, step + 1)
    assert torch.equal(student.weight, before) and learner.bad_steps() == (2, 2)
    learner.step(student(torch.ones(1, 3)).sum(), 3)
    assert not torch.equal(student.weight, before) and learner.bad_steps() == (2, 0)
    assert torch.isfinite(torch.stack(learner.ema.shadow[:1])).all()
