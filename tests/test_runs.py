"""V-1, V-2.1 and V-2.2 as a user starts them: what a run leaves, kills and resumes, mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TEACHER, lines, refusal, run, run_apart, script
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from common import run as run_module
from common.cache import Batch
from common.report import comparable, drawn_with
from common.sampling import encode_captions
from common.trainer import before_guidance, predict_noise, start_accelerator

SCRIPTS = {"v1": "v1/1.py", "v2.1": "v2/2.1.py", "v2.2": "v2/2.2.py", "v2.2 store": "v2/2.2.py"}
OWN = {"v1": ["--mid-block", "--feature-blocks", "down_blocks.0,mid_block,up_blocks.3", "--progressive", "--chains",
              "1000,50,25", "--stage-percent", "40,30,30"],
       "v2.1": [], "v2.2": ["--store", "0"], "v2.2 store": ["--store", "3"]}
SLOW = pytest.mark.slow
WEIGHTS = "student/unet/diffusion_pytorch_model.safetensors"


@dataclass
class OneSetting:
    seed: int = 0


@dataclass
class Taught:
    teacher: str


def command(name, small_set, cache, out, *more) -> list[str]:
    """A script and its arguments. Its batches, and so its losses, are those of 48 pictures."""
    return [SCRIPTS[name], "--teacher", str(TEACHER), "--data", str(small_set), "--train-split", "train", "--val-split", "val",
            "--resolution", "32", "--channels", "16,32,32,48", "--steps", "12", "--batch-size", "4", "--lr", "1e-3",
            "--features", "effnet-lite0", "--eval-every", "8", "--eval-samples", "4", "--final-samples", "8",
            "--sample-steps", "3", "--save-every", "2", "--log-every", "1", "--device", "cpu", "--workers", "0",
            "--cache-folder", str(cache), "--out", str(out), *OWN[name], *more]


def start(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, **options)


def last_step(out):
    path = out / "metrics.jsonl"
    return json.loads(path.read_text("utf-8").splitlines()[-1])["step"] if path.is_file() and path.read_text("utf-8") else 0


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW if name == "v2.2" else []) for name in SCRIPTS])
def unbroken(request, small_set, cache, tmp_path_factory):
    """(its name, its folder, what it printed) of a run of each script."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run(*command(request.param, small_set, cache, out))
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, out, done.stdout


def test_outputs_are_complete_and_stock(unbroken):
    name, out, printed = unbroken
    assert "FD* to reconstructions" in printed and "* of EfficientNet-lite0's features, not Inception's" in printed
    assert "teacher" in printed and "FID" not in printed
    table = printed.split(":\n\n")[-1].splitlines()
    assert max(map(len, table)) <= 80 and any(line.startswith("parameters") for line in table)
    assert (out / "curves.png").is_file() and (out / "samples" / "step_000012.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(out / "student", safety_checker=None)
    assert pipeline.unet.config.sample_size == 8
    steps, sampler = (25, "DDIM") if name == "v1" else (3, "DDPM")  # progressive distillation's student knows those alone
    assert type(pipeline.scheduler).__name__ == f"{sampler}Scheduler" and f"{steps} {sampler} steps" in printed
    own = {"guidance": 5.0, "sampler": "ddim", "steps": 25} if name == "v1" else {}
    assert drawn_with(str(out / "student")) == own
    assert [x["step"] for x in lines(out) if "evaluation" in x] == [8, 12]
    assert [x["step"] for x in lines(out) if "loss" in x] == list(range(1, 13))
    assert [x["step"] for x in comparable(lines(out))] == [8]  # the last evaluation has more samples: no point of the curve
    if os.name == "posix":  # whoever can read one file can read all
        assert len({path.stat().st_mode & 0o777 for path in (out / "student").rglob("*") if path.is_file()}) == 1
    card = (out / "student" / "README.md").read_text("utf-8")
    assert card.startswith("---\n") and "model-index" in card and "FD(effnet-lite0)" in card


def test_the_students_other_files_are_the_teachers_own(unbroken):
    _, out, _ = unbroken
    for part in ("vae", "text_encoder", "tokenizer"):
        theirs = {f.relative_to(TEACHER): f.read_bytes() for f in (TEACHER / part).rglob("*") if f.is_file()}
        ours = {f.relative_to(out / "student"): f.read_bytes() for f in (out / "student" / part).rglob("*") if f.is_file()}
        assert ours == theirs and theirs
    half = load_file(TEACHER / "vae" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in half.values()} == {torch.float16}
    assert {weight.dtype for weight in load_file(out / WEIGHTS).values()} == {torch.float32}


def test_the_loss_is_made_of_its_parts(unbroken):
    name, out, _ = unbroken
    train = [x for x in lines(out) if "loss" in x]
    for i, x in enumerate(train):
        if name == "v2.2":
            assert abs(x["alpha"] - (1 - 0.5 * i / 11)) < 1e-5
            assert abs(x["dropout"] - (0.05 + 0.15 * i / 11)) < 1e-5
        if name == "v2.2 store":
            assert abs(x["dropout"] - (0.075, 0.125, 0.175)[i // 4]) < 1e-5
        if name.startswith("v2.2"):
            want = x["alpha"] * x["kd_loss"] + (1 - x["alpha"]) * x["noise_loss"]
        elif name == "v1":
            assert x["chain"] == (1000 if i < 4 else 50 if i < 8 else 25)
            want = x["noise_loss"] + 0.1 * x["feature_loss"]
        else:
            continue
        assert abs(x["loss"] - want) < 1e-5 * max(1, want)
        assert x["loss_max"] == x["loss"]  # with a line for every step


@pytest.mark.slow
def test_two_processes_train_as_one(small_set, cache, unbroken, tmp_path):
    name, whole, _ = unbroken
    # Launched processes get a thread each, and with other threads sums are rounded otherwise: 3e-4 after ten steps.
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = run_apart("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                     "--mixed_precision", "no", "--dynamo_backend", "no", *command(name, small_set, cache, tmp_path / "two"),
                     env=threads)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = lines(whole), lines(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        if "loss" in a:
            assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"], (a, b)
    a, b = one[-1]["evaluation"], two[-1]["evaluation"]  # each process draws its share of the pictures
    assert a["samples"] == b["samples"] == 8
    assert abs(a["FD(effnet-lite0)"] / b["FD(effnet-lite0)"] - 1) < 0.01


@pytest.mark.parametrize("unbroken", [*(pytest.param(name, marks=SLOW) for name in SCRIPTS if name != "v2.2 store"),
                                      "v2.2 store"], indirect=True)
def test_a_killed_and_resumed_run_ends_as_the_unbroken_one(small_set, cache, unbroken, tmp_path):
    name, whole, _ = unbroken
    out = tmp_path / "killed"
    arguments = command(name, small_set, cache, out)
    process = start(*arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and last_step(out) < 6:
        time.sleep(0.02)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert "--resume" in refusal(*arguments)
    newest = max(out.glob("checkpoint-????????")) / "trainer.pt"  # as if the disk had failed it
    newest.write_bytes(newest.read_bytes()[:10_000])
    line = refusal(*arguments, "--resume", "--lr", "0.5", "--max-bad-steps", "7")
    assert "other settings (lr)" in line and line.endswith("the same ones: lr = 0.001")
    done = run(*arguments, "--resume", "--max-bad-steps", "7")  # which may change
    assert done.returncode == 0 and "is broken" in done.stdout and "going on at step" in done.stdout, done.stderr[-2000:]
    want, found = load_file(whole / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.equal(want[k], found[k]) for k in want)
    assert run(*arguments, "--resume").returncode == 0  # it has come to its end and repeats that only
    assert [x["step"] for x in lines(out) if "loss" in x] == list(range(1, 13))
    assert [x["step"] for x in lines(out) if "evaluation" in x] == [8, 12]


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_student_whose_checkpoints_were_removed_is_not_replaced(small_set, cache, tmp_path, more):
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n', "utf-8")
    line = refusal(*command("v2.1", small_set, cache, tmp_path / "run", *more))
    assert "holds a student, and no checkpoint" in line and (tmp_path / "run" / "metrics.jsonl").is_file()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to a process")
def test_ctrl_c_in_this_process_saves_and_leaves_the_handlers_as_they_were(small_set, cache, tmp_path):
    out, before = tmp_path / "stopped", [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def press():
        while last_step(out) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    done = run(*command("v2.1", small_set, cache, out, "--steps", "5000", "--eval-every", "0"))
    assert done.returncode == 128 + signal.SIGINT and "--resume" in done.stdout
    assert any(out.glob("checkpoint-????????"))
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to a child process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(small_set, cache, tmp_path, number):
    out = tmp_path / "stopped"
    process = start(*command("v2.1", small_set, cache, out, "--steps", "5000"), text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE)
    while process.poll() is None and last_step(out) < 2:
        time.sleep(0.05)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in printed and "Traceback" not in errors
    assert any(out.glob("checkpoint-????????"))


def test_a_teacher_may_lie_elsewhere_but_must_be_the_same(tmp_path):
    """By its weights; those of another precision do not compare, and then it must lie where it lay."""
    out = str(tmp_path)
    run_module.Run(out, Taught(teacher="here"), False, start_accelerator("cpu")).create("data", "weights", torch.float32)
    (tmp_path / "checkpoint-00000001").mkdir()

    def resume(place, weights, dtype):
        run_module.Run(out, Taught(teacher=place), True, start_accelerator("cpu")).create("data", weights, dtype)

    resume("there", "weights", torch.float32)
    for place, weights, dtype in (("there", "others", torch.float32), ("here", "rounded", torch.bfloat16)):
        with pytest.raises(SystemExit, match="^error: the teacher changed since"):
            resume(place, weights, dtype)
    resume("there", "rounded", torch.bfloat16)


@pytest.mark.parametrize("changed", ["picture", "caption", "unet", "vae", "text_encoder", "scheduler"])
def test_changed_data_or_another_teacher_is_noticed_on_resume(small_set, cache, tmp_path_factory, changed):
    """A run whose pictures, captions or teacher are others than before would mix two trainings; as they were, it goes on."""
    folder = tmp_path_factory.getbasetemp() / "changing"
    if not folder.is_dir():
        shutil.copytree(small_set, folder / "set")
        shutil.copytree(TEACHER, folder / "teacher")
    arguments = command("v2.1", folder / "set", cache, folder / "run", "--teacher", folder / "teacher", "--steps", "2",
                        "--eval-every", "0", "--final-samples", "2", "--sample-steps", "1")
    if not (folder / "run").is_dir():
        done = run(*arguments)
        assert done.returncode == 0, done.stderr[-2000:]
    file = {"picture": folder / "set" / "train" / "000000000001.png",
            "caption": folder / "set" / "annotations" / "captions_train.json",
            "scheduler": folder / "teacher" / "scheduler" / "scheduler_config.json",
            "text_encoder": folder / "teacher" / "text_encoder" / "model.safetensors",
            }.get(changed, folder / "teacher" / changed / "diffusion_pytorch_model.safetensors")
    kept, times = file.read_bytes(), file.stat()
    try:
        if changed == "picture":
            shutil.copy(folder / "set" / "train" / "000000000002.png", file)
        elif changed == "caption":
            file.write_bytes(kept.replace(b"a large ", b"a huge ", 1))
        elif changed == "scheduler":
            file.write_text(json.dumps(json.loads(kept) | {"beta_end": 0.013}), "utf-8")
        else:
            weights = load_file(file)
            first = next(iter(weights))
            save_file(weights | {first: weights[first] + 0.01}, file, metadata={"format": "pt"})
        assert file.read_bytes() != kept
        line = refusal(*arguments, "--resume")
        assert "changed" in line and "--out" in line
    finally:
        file.write_bytes(kept)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    if changed == "picture":  # once is enough
        done = run(*arguments, "--resume")
        assert done.returncode == 0 and "going on at step 2" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("name, arguments, message", [
    ("v2.2", ["--lr", "-1"], "--lr"), ("v2.2", ["--batch-size", "0"], "--batch-size"),
    ("v2.2", ["--alpha-start", "1.5"], "--alpha-start"), ("v2.1", ["--data", "nowhere"], "--mini"),
    ("v2.1", ["--channels", "128,128,128,160"], "wider"), ("v2.1", ["--resolution", "36"], "multiple"),
    ("v1", ["--feature-blocks", "down_blocks.7"], "down_blocks.7"), ("v1", ["--chains", "25,50,1000"], "--chains"),
    ("v1", ["--target", "y"], "--target"),
    ("v1", ["--chains", "1000,125,50", "--stage-percent", "40,30,30"], "halve"), ("v1", ["--chains", "600,50,25"], "divide"),
    ("v1", ["--chains", "1000,0"], "--chains must lie in 1..1000"), ("v1", ["--stage-percent", "50,50"], "--stage-percent"),
    ("v2.1", ["--device", "foo"], "--device must be"), ("v2.1", ["--device", "cuda:a"], "--device must be"),
    ("v2.1", ["--device", "cuda:99"], "no such device"), ("v2.1", ["--channels", "0,0"], "--channels"),
    ("v2.1", ["--channels", ","], "comma"), ("v2.1", ["--channels", "64,48,x"], "'64,48,x' is no list of whole numbers"),
    ("v2.1", ["--groups", "5"], "groups"), ("v2.1", ["--groups", "-2"], "--groups"),
    ("v2.1", ["--layers", "3"], "layers"), ("v2.1", ["--resolution", "0"], "--resolution must be at least 1"),
    ("v2.1", ["--seed", "-1"], "--seed"),
    ("v2.2", ["--guidance", "nan"], "finite"), ("v2.2", ["--cache-gb", "inf"], "finite"), ("v2.1", ["--steps", "1e3"], "int"),
    ("v2.2", ["--no-cache"], "--store needs the cache"), ("v2.2", ["--guided-teacher"], "--learned-guidance"),
    ("v2.1", ["--nonsense", "1"], "--nonsense"),
    ("v2.1", ["--out", str(ROOT / "LICENSE")], "--out"), ("v2.1", ["--cache-folder", str(ROOT / "LICENSE")], "--cache-folder"),
    ("v2.1", ["--teacher", str(ROOT / "LICENSE")], "pipeline folder"), ("v2.1", ["--train-split", "no"], "captions_no.json"),
])
def test_a_users_mistake_is_one_clear_line(small_set, cache, tmp_path, name, arguments, message):
    done = run(*command("v2.2 store" if "--no-cache" in arguments else name, small_set, cache, tmp_path / "x", *arguments))
    assert done.returncode == 1
    said = done.stderr[done.stderr.index("error: ") :]
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


@pytest.mark.parametrize("arguments, message", [
    ("--mini --chains 1000,0", "--chains must lie in 1..1000 and not rise"),
    ("--mini --sample-steps 1000", "--sample-steps must lie in 1..999"),
    ("--mini --device cuda:a", "--device must be auto, cuda, cuda:N, mps or cpu"),
    ("--mini --channels 64,48,x", "argument --channels: '64,48,x' is no list of whole numbers with commas between them"),
])
def test_a_mistake_with_mini_is_one_line_before_anything_is_made(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run("v1/1.py", *arguments.split())
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--sheet"], ["--passes", "2", "--curve"]])
def test_where_an_evaluations_pictures_go_is_known_before_it_draws(tmp_path, option):
    (tmp_path / "file").touch()
    nowhere = ["common/evaluate.py", "--data", tmp_path / "none", *option]
    assert refusal(*nowhere, tmp_path / "x.gif") == f"error: {option[-1]} must end in .png"
    assert refusal(*nowhere, tmp_path / "file" / "x.png").startswith(f"error: {option[-1]}: {tmp_path / 'file'} cannot be made")
    assert str(tmp_path / "none") in refusal(*nowhere, tmp_path / "new" / "deep" / "x.png")
    assert (tmp_path / "new" / "deep").is_dir()


def test_help_shows_every_setting_with_its_default():
    done = run(SCRIPTS["v2.2"], "--help")
    text = " ".join(done.stdout.split())
    assert "weight of the KD term at the first step (default 1.0)" in text
    assert "320,352; with --mini" in text


def test_the_guided_prediction_is_the_pipelines(teacher):
    """Against the one guided step of diffusers' pipeline, from pure noise."""
    captions, noise = ["a cat on the grass", "a dog at night"], torch.randn(2, 4, 8, 8)
    scheduler = DDIMScheduler.from_config(teacher.noise_scheduler.config, timestep_spacing="trailing")
    pipeline = StableDiffusionPipeline(
        vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=teacher.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(captions, num_inference_steps=1, guidance_scale=3.0, latents=noise, output_type="latent").images
    states, empty = (encode_captions(teacher.text_encoder, teacher.tokenizer, texts) for texts in (captions, [""]))
    batch = Batch(noise, states, noise, torch.tensor([999, 999]))
    with torch.no_grad():
        found = script("v2/2.2.py").teacher_noise(teacher.unet, noise, batch, empty, 3.0)
    landed = scheduler.step(found, 999, noise).prev_sample
    torch.testing.assert_close(landed, want, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        want = predict_noise(teacher.unet, noise, batch)
    found.requires_grad_(True)
    made_from = before_guidance(teacher.unet, found, noise, batch, empty, 3.0)
    torch.testing.assert_close(made_from, want, rtol=1e-3, atol=1e-3)
    made_from.sum().backward()
    torch.testing.assert_close(found.grad, torch.full_like(found, 1 / 3))


@pytest.mark.slow
@pytest.mark.parametrize("name, guided_teacher", [
    ("v2.1", []), ("v2.2", ["--guided-teacher"]), ("v2.2 store", []), ("v2.2 store", ["--guided-teacher"])])
def test_a_student_of_learned_guidance_is_drawn_without(small_set, cache, tmp_path, name, guided_teacher):
    done = run(*command(name, small_set, cache, tmp_path / "run", "--learned-guidance", "3", *guided_teacher))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 samples, 3 DDPM steps, guidance 1:" in done.stdout
    train = [x for x in lines(tmp_path / "run") if "loss" in x]
    assert len(train) == 12
    if guided_teacher:
        assert all(x["alpha"] == 1 and x["dropout"] == 0 and x["loss"] == x["kd_loss"] for x in train)
    elif name != "v2.1":
        assert train[-1]["alpha"] == 0.5 and all(x["dropout"] > 0 for x in train)
    assert drawn_with(str(tmp_path / "run" / "student")) == {"guidance": 1.0}
    assert "guidance_scale=1.0" in (tmp_path / "run" / "student" / "README.md").read_text("utf-8")


def test_two_runs_do_not_share_a_folder(monkeypatch, tmp_path):
    left = [tmp_path / name for name in ("samples/step_000003.png", "curves.png", "metrics.jsonl")]
    (tmp_path / "samples").mkdir()
    for path in left:  # by a run that was killed before its first checkpoint
        path.touch()
    monkeypatch.setattr(run_module, "PATIENCE_S", 0.1)
    program = f"import filelock\nwith filelock.FileLock({str(tmp_path / 'lock')!r}):\n    print(flush=True)\n    input()"
    other = start("-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    new = run_module.Run(str(tmp_path), OneSetting(), False, start_accelerator("cpu"))
    with pytest.raises(SystemExit, match="^error: another run is writing to"):
        new.create("data", "teacher", torch.float32)
    assert all(path.exists() for path in left)
    other.communicate(b"\n")
    new.create("data", "teacher", torch.float32)
    assert not any(path.exists() for path in left)


def test_settings_that_a_crash_has_spoilt_are_one_line(tmp_path):
    (tmp_path / "checkpoint-00000001").mkdir()
    (tmp_path / "settings.json").write_bytes(bytes(20))
    with pytest.raises(SystemExit, match="^error: .*settings.json is damaged"):
        run_module.Run(str(tmp_path), OneSetting(), True, start_accelerator("cpu"))


def test_an_evaluation_says_where_a_model_was_made_for_another_size(teacher, capsys):
    for px in (32, 16):
        script("common/evaluate.py").note_other_size(SimpleNamespace(print=print), "the teacher", teacher.unet, teacher, px)
    assert capsys.readouterr().out == "note: the teacher was made for 32 px and is measured at 16 px (--resolution)\n"


def test_a_curve_takes_any_name(tmp_path):
    few = {"teacher": {2: {"FD": 9.0}, 4: {"FD": 3.0}}, "a$x^$b": {2: {"FD": 5.0}}}
    script("common/evaluate.py").save_curve(tmp_path / "curve.png", few, "FD")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_linear_against_closed_form():
    linear = script("v2/2.2.py").linear
    assert linear(1.0, 0.5, 0, 11) == 1.0 and linear(1.0, 0.5, 10, 11) == 0.5 and linear(1.0, 0.5, 5, 11) == 0.75


def test_only_numbers_of_whole_steps_have_a_score():
    few_steps = script("common/evaluate.py").few_steps
    ways = few_steps((1, 2, 3, 50, 2001, 2002), 3.0)
    assert {number: way["steps"] for number, way in ways.items()} == {2: 1, 50: 25}
    assert list(few_steps((1, 3, 1000, 1001), 1.0)) == [1, 3, 1000]


@pytest.mark.usefixtures("kept_in_fp32")
def test_a_student_and_its_teacher_are_measured_beside_their_bounds(small_set, cache, tmp_path):
    """`common.evaluate --mini`, on the teacher's own U-Net as the student: the rows agree but for the time."""
    done = run("common/evaluate.py", "--mini", "--data", small_set, "--model", TEACHER, "--samples", "6", "--sample-steps", "2",
               "--device", "cpu", "--cache-folder", cache, "--sheet", tmp_path / "sheet.png", "--passes", "1,4", "--curve",
               tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "sheet.png").is_file() and "dB PSNR over 6 validation images" in done.stdout
    assert "6 samples, 2 DDPM steps, guidance 3" in done.stdout
    table = done.stdout.split("\n\n")[1].splitlines()
    head = [line.split() for line in table[:3]]
    assert head == [["floor:"], ["training", "the", "same,", "ceiling:"],
                    ["teacher", "mini-teacher", "images", "reconstructed", "noise"]]
    few = [line.split() for line in done.stdout.rstrip().splitlines()[-3:]]
    assert few[0] == ["1", "4"] and [line[:2] for line in few[1:]] == [["teacher", "-"], ["mini-teacher", "-"]]  # two a step
    assert float(few[1][2]) == pytest.approx(float(few[2][2]), rel=0.01) and (tmp_path / "curve.png").is_file()
    numbers = {}
    for line in [line for line in table[3:] if line[0] not in "*!"]:
        name, *cells = re.split(r"\s{2,}", line.rstrip())
        numbers[name] = cells[:2]  # the teacher's, the student's
    assert numbers.pop("parameters") == ["13.04 M"] * 2 and numbers.pop("samples") == ["6"] * 2
    assert {"FD* ↓ !", "PD* ↓", "both in place ↑"} < set(numbers)
    del numbers["seconds an image ↓"]
    for theirs, ours in numbers.values():  # a pixel may round the other way
        assert ours == theirs or float(ours) == pytest.approx(float(theirs), rel=0.01, abs=0.005)
