"""The real world's code on stand-ins of its layout: Inception features and FID, true-size pieces."""

import os

import numpy as np
import pytest
import torch
from conftest import ROOT, lines, run_apart, script
from PIL import Image

from data.draw_mini import Painter, plan_set

stand_in = script("bench/stand_in.py")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A torch home with random Inception and AlexNet weights, in force for this module."""
    home = tmp_path_factory.mktemp("torch home")
    torch.manual_seed(0)
    stand_in.make_metric_networks(home / "hub" / "checkpoints")
    before = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(home)
    yield home
    os.environ.pop("TORCH_HOME")
    if before is not None:
        os.environ["TORCH_HOME"] = before


@pytest.mark.slow
def test_fid_is_the_pytorch_fid_commands(networks, tmp_path):
    from common.metrics import InceptionV3, frechet_distance

    rng = np.random.default_rng(0)
    painter, scenes, folders = Painter(), plan_set(60), {}
    for name, first in (("a", 0), ("b", 30)):
        drawn = [Image.fromarray(painter.paint(scene)) for scene, _ in scenes[first : first + 30]]
        pictures = np.stack([np.asarray(picture.resize((64, 64))) for picture in drawn])
        if name == "b":
            pictures = (pictures + rng.normal(0, 20, pictures.shape)).clip(0, 255).astype(np.uint8)
        folders[name] = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    done = run_apart("-c", "import common, runpy; runpy.run_module('pytorch_fid', run_name='__main__')", tmp_path / "a",
                     tmp_path / "b", "--device", "cpu", "--num-workers", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    want = float(done.stdout.split("FID:")[1])
    network = InceptionV3()
    with torch.no_grad():
        found = frechet_distance(*(torch.cat([network(p) for p in folders[k].split(20)]) for k in "ab"))
    assert want > 0 and abs(found / want - 1) < 1e-3, (found, want)


def test_lpips_is_the_packages_own(networks):
    import lpips

    from common.metrics import InceptionV3

    torch.manual_seed(0)
    a, b = torch.randint(256, (2, 3, 3, 64, 64)).to(torch.uint8)
    network = InceptionV3()
    with torch.no_grad():
        want = lpips.LPIPS(net="alex", verbose=False).eval()(a.float() / 127.5 - 1, b.float() / 127.5 - 1).flatten()
        torch.testing.assert_close(network.distance(a, b), want)
        assert network.distance(a, a).abs().max() == 0


def test_reduced_jpeg_decoding_stays_close_to_the_whole_one(tmp_path):
    from PIL import ImageOps

    from common.images import load_image

    stand_in.make_coco(tmp_path, 8, 2, 0)
    for file in sorted((tmp_path / "train2017").iterdir()):
        with Image.open(file) as image:
            whole = np.asarray(ImageOps.fit(image.convert("RGB"), (64, 64), Image.Resampling.BICUBIC), float)
        error = np.square(load_image(file, 64) - whole).mean()
        assert 10 * np.log10(255**2 / error) > 40


@pytest.mark.slow
@pytest.mark.parametrize("path, parameters, own", [
    ("v1/1.py", 64_140_964, {}), ("v2/2.2.py", 64_140_964, {}), ("v3/train_student_kd.py", 65_188_324, {}),
    ("v3/train_student_kd.py", 65_188_324, {"feature_weight": 0.1}), ("v4/4.py", 64_140_964, {})])
def test_every_version_fits_a_6_gb_card_with_a_margin(monkeypatch, path, parameters, own):
    monkeypatch.syspath_prepend(ROOT / "v3")  # where V-3's script stands when it is the program
    memory = script("bench/memory.py")
    row = memory.measure(path, memory.Settings(), store=0, **own)
    # weights, gradients, two moments and the EMA in fp32, and the projections; autocast may keep nothing of them
    assert 1 <= row["student's states"] / (5 * 4 * parameters / 2**30) < 1.03
    context = 0.5  # of CUDA, at most 0.6 GB
    assert max(row["peak in training"], row["in evaluation"]) + context < 0.85 * 6


@pytest.mark.slow
def test_adapting_the_teacher_fits_a_6_gb_card(monkeypatch):
    row = script("bench/memory.py").measure("checkpoints/adapt_teacher.py", script("bench/memory.py").Settings())
    assert max(row["peak in training"], row["in evaluation"]) < 5 and row["student's states"] < 0.5


@pytest.mark.slow
def test_a_teacher_is_adapted_and_distilled_at_the_true_size(tmp_path):
    """SD-1.5's and COCO's sizes and layouts, Inception's and AlexNet's too, random weights: as a user would type it."""
    from safetensors import safe_open

    stand_in.main(stand_in.Settings(out=str(tmp_path / "stand-in"), train=8, val=2))
    short = ["--data", tmp_path / "stand-in" / "coco2017", "--device", "cpu", "--steps", "2", "--batch-size", "2",
             "--eval-every", "0", "--final-samples", "2", "--sample-steps", "2", "--cache-folder", tmp_path / "cache"]
    home = os.environ | {"TORCH_HOME": str(tmp_path / "stand-in" / "torch")}
    done = run_apart("checkpoints/adapt_teacher.py", "--teacher", tmp_path / "stand-in" / "sd15", "--half", "--out",
                     tmp_path / "sd15-64px", *short, env=home)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1.5% of the teacher's U-Net" in done.stdout
    done = run_apart("v2/2.2.py", "--teacher", tmp_path / "sd15-64px", "--out", tmp_path / "run", *short, env=home)
    assert done.returncode == 0, done.stderr[-2000:]
    logged = lines(tmp_path / "run")
    (train,) = [x for x in logged if "loss" in x]
    assert train["step"] == 2 and train["loss_max"] >= train["loss"] > 0 and max(x.get("store_seconds", 0) for x in logged) > 0
    row = logged[-1]["evaluation"]
    assert row["parameters"] == 64_140_964 and {"FID", "KID", "LPIPS"} <= set(row) and np.isfinite(list(row.values())).all()
    with safe_open(tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as student:
        shapes = [student.get_slice(name).get_shape() for name in student.keys()]
    assert sum(np.prod(shape) for shape in shapes) == 64_140_964
