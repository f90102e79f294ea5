"""V-3: pruning at SD-1.5's true size, shards, several processes, inference."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TEACHER, lines, process, refusal, run, run_apart, script
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from common.cache import TrainingPairs
from common.slicing import slice_unet

pytest.importorskip("webdataset", reason="pip install -r v3/requirements.txt")
pytest.importorskip("tensorboard", reason="pip install -r v3/requirements.txt")
prepare_unet_small = script("v3/prepare_unet_small.py")
script("v3/data.py")
import coco_dataset  # by its own name, by which workers that are not forked import it

WEIGHTS = "student/unet/diffusion_pytorch_model.safetensors"
FEATURES = ["--feature-weight", "0.1", "--store", "0"]
STORE = ["--feature-weight", "0", "--store", "2"]


def command(small_set, cache, out, *more) -> list[str]:
    """The script and its arguments."""
    return ["v3/train_student_kd.py", "--teacher", str(TEACHER), "--data", str(small_set), "--train-split", "train",
            "--val-split", "val", "--resolution", "32", "--channels", "32,48,64", "--steps", "20", "--batch-size", "8",
            "--features", "effnet-lite0", "--eval-every", "0", "--final-samples", "8", "--eval-batch", "4",
            "--sample-steps", "2", "--save-every", "5", "--log-every", "1", "--device", "cpu", "--mixed-precision", "no",
            "--track", "tensorboard", "--cache-folder", str(cache), "--out", str(out), *FEATURES, *more]


@pytest.fixture(scope="module")
def sd15():
    """A U-Net of SD-1.5's true shape with random weights, in half precision to save memory."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        unet.to_empty(device="cpu")
        for p in unet.parameters():
            torch.nn.init.uniform_(p, -1, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    return unet


def require_pruned(student, teacher, size: str):
    """Every weight is the teacher's: of the layer, and for sd_tiny's up blocks of the level, that the paper keeps.

    Where the level that sd_tiny drops is wider than the one above it, as in the embedded teacher but not in SD-1.5, the
    innermost up block's first resnet gets fewer channels from below.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    shift = 1 if size == "sd_tiny" else 0
    wide = teacher.config.block_out_channels
    narrower = size == "sd_tiny" and wide[-1] != wide[-2]
    for name in ours:
        kept = name
        if name.startswith("up_blocks."):
            _, block, kind, layer, *rest = name.split(".")
            if kind in ("resnets", "attentions"):
                layer = {"0": "0", "1": "2"}[layer]  # of three layers the first and the last stay
            kept = ".".join(["up_blocks", str(int(block) + shift), kind, layer, *rest])
        if narrower and re.match(r"up_blocks\.0\.resnets\.0\.(norm1|conv1\.weight|conv_shortcut\.weight)", name):
            assert ours[name].shape != theirs[kept].shape
            continue
        assert torch.equal(ours[name], theirs[kept].float()), name


@pytest.mark.slow
@pytest.mark.parametrize("size, count", [("sd_small", 579_384_964), ("sd_tiny", 323_384_964)])
def test_pruned_at_true_size(sd15, size, count):
    assert sum(p.numel() for p in sd15.parameters()) == 859_520_964
    student = slice_unet(sd15, prepare_unet_small.pruned_config(sd15, size))
    assert sum(p.numel() for p in student.parameters()) == count
    require_pruned(student, sd15, size)


@pytest.mark.parametrize("size", ["sd_small", "sd_tiny"])
def test_pruned_at_the_embedded_teachers_size(teacher, size):
    require_pruned(slice_unet(teacher.unet, prepare_unet_small.pruned_config(teacher.unet, size)), teacher.unet, size)


@pytest.mark.parametrize("size, channels, count", [("sd_small", (), 579_384_964), ("sd_tiny", (), 323_384_964),
                                                   ("sd_tiny", (320, 480, 192), 65_188_324)])
def test_sizes_of_pruned_students(size, channels, count):
    """The last one is the default student, of 65 million parameters."""
    with torch.device("meta"):
        whole = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        student = UNet2DConditionModel(**prepare_unet_small.pruned_config(whole, size, channels))
    assert sum(p.numel() for p in student.parameters()) == count
    assert not channels or abs(count / 65e6 - 1) < 0.01


@pytest.mark.parametrize("size", ["sd_small", "sd_tiny"])
def test_the_saved_folder_is_stock(tmp_path, size):
    done = run("v3/prepare_unet_small.py", "--teacher", "checkpoints/mini-teacher", "--size", size, "--out", tmp_path / "u")
    assert done.returncode == 0, done.stderr
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "u")
    assert f"{sum(p.numel() for p in unet.parameters()):,}" in done.stdout
    assert unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 24, 128)).sample.shape == (1, 4, 8, 8)


def test_a_teacher_of_another_family_is_one_line(tmp_path):
    UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True, transformer_layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=(2, 4)).save_pretrained(tmp_path / "t" / "unet")
    assert "another family" in refusal("v3/prepare_unet_small.py", "--teacher", tmp_path / "t", "--out", tmp_path / "u")


@pytest.fixture(scope="module")
def one_process(small_set, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("v3") / "one"
    done = run(*command(small_set, cache, out))
    assert done.returncode == 0, done.stderr[-2000:]
    return out


SHORT = ["--steps", "4", "--batch-size", "4"]


@pytest.fixture(scope="module")
def short(small_set, cache, tmp_path_factory):
    """One of four steps, for the fast tests."""
    out = tmp_path_factory.mktemp("v3") / "short"
    done = run(*command(small_set, cache, out, *SHORT))
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def losses(out) -> list[float]:
    """Of each logged step."""
    return [x["loss"] for x in lines(out) if "loss" in x]


def test_a_run_leaves_a_stock_student_a_log_and_its_sum_of_losses(short):
    train = [x for x in lines(short) if "loss" in x]
    assert [x["step"] for x in train] == [1, 2, 3, 4]
    for x in train:
        assert abs(x["loss"] - (x["task_loss"] + x["kd_loss"] + 0.1 * x["feature_loss"])) < 1e-5 * x["loss"]
        assert x["feature_loss"] > 0
    assert lines(short)[-1]["evaluation"]["samples"] == 8 and (short / "tensorboard").is_dir()
    unet = UNet2DConditionModel.from_pretrained(short / "student" / "unet")
    assert tuple(unet.config.block_out_channels) == (32, 48, 64) and unet.config.sample_size == 8


@pytest.mark.slow
def test_without_its_losses_the_teacher_is_not_asked(small_set, cache, tmp_path):
    done = run(*command(small_set, cache, tmp_path / "alone", *SHORT, "--kd-weight", "0", "--feature-weight", "0"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(x["kd_loss"] == x["task_loss"] == x["loss"] for x in lines(tmp_path / "alone") if "loss" in x)


def on_two_processes(arguments: list[str]):
    done = run_apart("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                     "--mixed_precision", "no", "--dynamo_backend", "no", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_train_as_one(small_set, cache, one_process, tmp_path):
    on_two_processes(command(small_set, cache, tmp_path / "two"))
    one, two = lines(one_process), lines(tmp_path / "two")
    assert len(one) == len(two) and len(losses(one_process)) == 20
    for a, b in zip(losses(one_process), losses(tmp_path / "two"), strict=True):
        assert abs(a - b) < 1e-4 * a, (a, b)
    a, b = one[-1]["evaluation"], two[-1]["evaluation"]  # each process draws half of the pictures
    assert a["samples"] == b["samples"] == 8
    assert abs(a["FD(effnet-lite0)"] / b["FD(effnet-lite0)"] - 1) < 0.01
    assert (one_process / "tensorboard").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("whole, options", [("short", SHORT), ("one_process", [])])
def test_accumulated_passes_train_as_one(small_set, cache, request, tmp_path, whole, options):
    whole = request.getfixturevalue(whole)
    done = run(*command(small_set, cache, tmp_path / "accumulated", *options, "--accumulate", "2",
                        "--gradient-checkpointing"))
    assert done.returncode == 0, done.stderr[-2000:]
    logs = [[x for x in lines(out) if "loss" in x] for out in (whole, tmp_path / "accumulated")]
    assert len(logs[0]) == (4 if options else 20)
    for a, b in zip(*logs, strict=True):  # rounding grows with the steps, on torch 2.15 to 1.4e-4
        within = 1e-5 if a["step"] <= 8 else 1e-3
        assert abs(a["loss"] - b["loss"]) < within * a["loss"], (a, b)


@pytest.mark.slow
@pytest.mark.parametrize("options", [SHORT, []], ids=["short", "whole"])
def test_the_teacher_store_serves_v3(small_set, tmp_path, options):
    logs = []
    for name, more in (("one", []), ("accumulated", ["--accumulate", "2"])):
        done = run(*command(small_set, tmp_path / "cache", tmp_path / name, *STORE, *options, *more))
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("caching teacher" in done.stderr) == (name == "one")
        logs.append(lines(tmp_path / name))
    for a, b in zip(*logs, strict=True):
        if "loss" in a:
            assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"] and a["feature_loss"] == 0, (a, b)
    assert len(list((tmp_path / "cache").glob("pairs-*/teacher-*.npy"))) == 2


@pytest.mark.slow
def test_two_processes_make_and_read_one_store(small_set, tmp_path):
    on_two_processes(command(small_set, tmp_path / "cache", tmp_path / "two", *STORE, *SHORT))
    done = run(*command(small_set, tmp_path / "other", tmp_path / "one", *STORE, *SHORT))
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert abs(a - b) < 1e-4 * a, (a, b)
    stores = [[np.load(f) for f in sorted((tmp_path / name).glob("pairs-*/teacher-*.npy"))] for name in ("cache", "other")]
    assert len(stores[0]) == 2 and all(np.array_equal(a, b) for a, b in zip(*stores, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind, own", [("fsdp", FEATURES), ("fsdp", STORE), ("deepspeed", FEATURES), ("deepspeed", STORE)])
def test_two_processes_that_share_the_states_train_as_one(small_set, cache, one_process, tmp_path, monkeypatch, kind, own):
    if kind == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "v3" / "configs" / f"{kind}.yaml"),
              "--mixed_precision", "no", str(ROOT / "tests" / "sharded.py")]
    arguments = command(small_set, cache, tmp_path / "two", *own)
    if own is STORE:  # without projections the U-Net is the whole of what is trained
        one_process = tmp_path / "one"
        done = run(*command(small_set, cache, one_process, *own))
        assert done.returncode == 0, done.stderr[-2000:]
    arguments[arguments.index("--device") + 1] = "auto"  # told to stay on the CPU, Accelerate leaves sharding out
    done = run_apart(*launch, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(losses(one_process), losses(tmp_path / "two"), strict=True):
        assert abs(a - b) < 1e-3 * a, (a, b)
    shutil.rmtree(tmp_path / "two" / "checkpoint-00000020")
    weights = tmp_path / "two" / WEIGHTS
    want = load_file(weights)
    weights.unlink()
    done = run_apart(*launch, *arguments, "--resume")
    assert done.returncode == 0 and "going on at step 15" in done.stdout, done.stderr[-2000:]
    found = load_file(weights)
    assert all(torch.equal(want[k], found[k]) for k in want)


@pytest.mark.slow
def test_adamw_in_8_bits_trains_nearly_as_adamw(small_set, cache, one_process, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    done = run(*command(small_set, cache, tmp_path / "eight", "--optimizer", "adamw8bit"))
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(losses(one_process), losses(tmp_path / "eight"), strict=True):
        assert abs(a - b) < 1e-2 * a, (a, b)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to a child process")
def test_a_killed_and_resumed_run_ends_as_the_unbroken_one(small_set, cache, one_process, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, *command(small_set, cache, out)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "checkpoint-00000010").is_dir():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run_apart(*command(small_set, cache, out, "--resume"))
    assert done.returncode == 0 and "going on at step" in done.stdout, done.stderr[-2000:]
    want, found = load_file(one_process / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.equal(want[k], found[k]) for k in want)


@pytest.mark.parametrize("arguments, message", [
    (["--size", "sd_huge"], "--size"), (["--batch-size", "7", "--accumulate", "2"], "multiple"),
    (["--channels", "32,48"], "3 widths"), (["--shards", "nowhere"], "v3/data.py"),
    (["--feature-blocks", "mid_block"], "mid_block"), (["--store", "1"], "add --store 0"),
    (["--feature-blocks", "mid_block", "--feature-weight", "0"], "--feature-weight 0.1 --store 0"),
    (["--feature-weight", "0", "--store", "1", "--shards", "nowhere"], "add --store 0"),
    (["--feature-weight", "0", "--store", "1", "--kd-weight", "0"], "add --store 0"),
    (["--feature-weight", "0", "--store", "1", "--no-cache"], "--store 0"),
])
def test_a_users_mistake_is_one_clear_line(small_set, cache, tmp_path, arguments, message):
    assert message in refusal(*command(small_set, cache, tmp_path / "x", *arguments))
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


@pytest.mark.parametrize("processes, accumulate", [(1, 1), (2, 1), (3, 2)])
def test_an_epoch_sees_every_sample_once(processes, accumulate):
    class Indices(TrainingPairs):
        def __init__(self, rank, processes):
            self.usable, self.device = np.arange(100), torch.device("cpu")
            self.batch_size, self.seed, self.rank, self.processes, self.flip = 12, 0, rank, processes, False
            self.teacher = SimpleNamespace(noise_scheduler=None)

        def batch(self, indices, choices, mirrored):
            seen.extend(indices.tolist())
            return torch.zeros(len(indices), 4, 1, 1), torch.zeros(len(indices), 1, 1)

    seen, noise, chain = [], [], torch.arange(1000)
    pairs = [Indices(rank, processes) for rank in range(processes)]
    for step in range(100 // 12):
        noise.append([one.draw(step, 0.1, chain=chain, part=part, parts=accumulate).noise
                      for one in pairs for part in range(accumulate)])
    assert len(seen) == 96 and len(set(seen)) == 96  # 4 are left over of a last batch of 12
    whole = Indices(0, 1).draw(3, 0.1, chain=chain)
    assert torch.equal(torch.cat(noise[3]), whole.noise)


@pytest.fixture(scope="module")
def shards(small_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    done = run("v3/data.py", "--data", str(small_set), "--split", "train", "--shard-size", "6", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def test_shards_hold_every_picture_as_it_is(small_set, shards):
    content = json.loads((small_set / "annotations" / "captions_train.json").read_text("utf-8"))
    wanted = {i["id"]: i["file_name"] for i in content["images"]}
    found = list(coco_dataset.samples(coco_dataset.find_shards(str(shards))))
    assert sorted(int(x["__key__"]) for x in found) == sorted(wanted)
    for sample in found:
        file = small_set / "train" / wanted[int(sample["__key__"])]
        assert sample[file.suffix[1:]] == file.read_bytes()
        captions = [a["caption"] for a in content["annotations"] if a["image_id"] == int(sample["__key__"])]
        assert coco_dataset.sample_captions(sample) == captions
    again = run("v3/data.py", "--check", str(shards))
    assert again.returncode == 0 and "48 samples" in again.stdout


def keys_of(stream, worker, workers, epochs=1):
    keys = {}
    for epoch, sample in stream.raw(worker, workers):
        if epoch == epochs:
            return keys
        keys.setdefault(epoch, []).append(sample["__key__"])


def test_shards_of_another_set_or_size_are_not_mixed(small_set, shards):
    for other in (["--split", "val"], ["--split", "train", "--shard-size", "5"]):
        assert "another --out" in refusal("v3/data.py", "--data", small_set, *other, "--out", shards)


@pytest.mark.usefixtures("v3_in_path")
@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_usable_sample_end_in_one_line(teacher, tmp_path, workers):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"cat"))
    pairs = coco_dataset.ShardPairs(str(tmp_path), teacher, process(), size_px=32, batch_size=4, seed=0, workers=workers)
    with pytest.raises(SystemExit, match="--check"):
        pairs.draw(0, 0.1)


@pytest.mark.parametrize("processes, workers", [(1, 1), (2, 2), (4, 2)])
def test_every_sample_goes_to_one_worker_of_one_process(shards, processes, workers):
    files = coco_dataset.find_shards(str(shards))
    counts = Counter()
    for rank in range(processes):
        stream = coco_dataset.ShardStream(files, 32, 4, seed=0, rank=rank, processes=processes)
        for worker in range(workers):
            counts.update(keys_of(stream, worker, workers)[0])
    assert len(counts) == 48 and set(counts.values()) == {1}


@pytest.mark.slow
@pytest.mark.usefixtures("v3_in_path")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_skips_goes_on_where_it_was(shards, workers):
    files = coco_dataset.find_shards(str(shards))

    def batches(skip, count):
        stream = coco_dataset.ShardStream(files, 32, 4, seed=0, rank=0, processes=1, skip=skip)
        loader = iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers))
        return [next(loader) for _ in range(count)]

    whole = batches(0, 30)
    for skip in (8, 14):
        for (pixels, captions), (again, again_captions) in zip(whole[skip:], batches(skip, 30 - skip)):
            if workers and skip % workers:
                continue
            assert torch.equal(pixels, again) and captions == again_captions


SPAWNED = """
import multiprocessing, os, signal, sys
import torch
sys.path[:0] = [".", "v3"]
from accelerate import Accelerator
from coco_dataset import ShardPairs
from common.teacher import load_teacher

if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    signal.signal(signal.SIGINT, lambda *_: None)  # as a run does, to save first
    teacher = load_teacher("checkpoints/mini-teacher", torch.device("cpu"))
    pairs = ShardPairs(sys.argv[1], teacher, Accelerator(cpu=True), size_px=32, batch_size=4, seed=0, workers=1)
    pairs.stream = pairs._open(4, 0)
    next(pairs.stream)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    print("drawn", sum(len(next(pairs.stream)[1]) for _ in range(8)))
"""


@pytest.mark.slow
def test_ctrl_c_leaves_spawned_workers_alive(shards, tmp_path):
    """As macOS and Windows start them."""
    (tmp_path / "spawned.py").write_text(SPAWNED, "utf-8")
    done = run_apart(tmp_path / "spawned.py", shards)
    assert done.returncode == 0 and "drawn 32" in done.stdout, done.stderr[-2000:]


def test_broken_shards_are_counted(shards, tmp_path):
    for number, shard in enumerate(sorted(shards.glob("*.tar"))[:2]):
        (tmp_path / f"{number}.tar").write_bytes(shard.read_bytes())
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    with tarfile.open(tmp_path / "2.tar", "w") as tar:
        picture = io.BytesIO()
        Image.new("RGB", (40, 40)).save(picture, "PNG")
        for name, content in (("a.png", b"no picture"), ("a.txt", b"a cat"), ("b.png", picture.getvalue()),
                              ("c.png", picture.getvalue()), ("c.txt", b"a dog")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    done = run("v3/data.py", "--check", str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1 broken pictures" in done.stdout and "1 without a caption" in done.stdout and "broken shards" in done.stdout


def test_training_on_shards(small_set, cache, shards, tmp_path):
    done = run(*command(small_set, cache, tmp_path / "s", "--shards", str(shards), "--workers", "2", "--steps", "2"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [x["step"] for x in lines(tmp_path / "s") if "loss" in x] == [1, 2]


def test_inference_compares_from_the_same_noise(short, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat on the grass\n\na dog in the snow\n", "utf-8")
    teacher = str(TEACHER)
    common = ("--steps", "3", "--guidance", "3", "--device", "cpu", "--prompts", str(prompts), "--grid")
    done = run("v3/inference.py", "--model", teacher, "--compare", teacher, "--out", str(tmp_path / "same"), *common)
    assert done.returncode == 0 and "s an image" in done.stdout, done.stderr[-2000:]
    assert {p.name for p in (tmp_path / "same").iterdir()} == {"00000.png", "00001.png", "grid.png"}
    pair = np.asarray(Image.open(tmp_path / "same" / "00001.png"))
    assert pair.shape == (32, 64, 3) and np.array_equal(pair[:, :32], pair[:, 32:])
    # one picture does not depend on its batch; a run's folder stands for its student
    done = run("v3/inference.py", "--model", teacher, "--batch", "1", "--out", str(tmp_path / "single"), *common)
    single = np.asarray(Image.open(tmp_path / "single" / "00001.png"))
    assert done.returncode == 0 and np.abs(single.astype(int) - pair[:, :32]).max() <= 1
    done = run("v3/inference.py", "--model", str(short), "--out", str(tmp_path / "student"), *common)
    assert done.returncode == 0 and len(list(Path(tmp_path / "student").glob("0*.png"))) == 2
