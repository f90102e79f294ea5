"""The adaptation of a teacher: what is trained, merged and saved, kills, mistakes."""

import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TEACHER, lines, refusal, run, script
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_precision import DeviceProducts

from common import precision
from common.precision import time_kernels
from common.teacher import load_teacher, load_unet

PATH, WEIGHTS = "checkpoints/adapt_teacher.py", "unet/diffusion_pytorch_model.safetensors"
adapt = script(PATH)


def command(small_set, cache, out, *more) -> list[str]:
    return [PATH, "--mini", "--data", str(small_set), "--teacher", str(TEACHER), "--steps", "6", "--batch-size", "4",
            "--rank", "2", "--eval-every", "4", "--eval-samples", "4", "--final-samples", "8", "--sample-steps", "2",
            "--save-every", "2",
            "--log-every", "1", "--lr", "1e-2", "--cache-folder", str(cache), "--out", str(out), *more]


@pytest.fixture(scope="module")
def adapted(small_set, cache, tmp_path_factory):
    """(the folder, what was printed) of a short adaptation."""
    out = tmp_path_factory.mktemp("adapted") / "teacher"
    done = run(*command(small_set, cache, f"{out}/"))  # the run's folder lies beside it all the same
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


@pytest.mark.slow
def test_what_is_not_adapted_stays_as_it_is(adapted):
    before = {name: weight.float() for name, weight in load_file(TEACHER / WEIGHTS).items()}
    after = load_file(adapted[0] / WEIGHTS)
    assert before.keys() == after.keys() and {w.dtype for w in after.values()} == {torch.float32}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kept = {"conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.attentions.0.proj_in.weight", "conv_out.weight",
            "down_blocks.0.resnets.0.time_emb_proj.weight", "down_blocks.0.resnets.0.conv1.bias"}
    assert kept <= before.keys() - changed
    for name in ("conv_norm_out.weight", "down_blocks.0.resnets.0.norm1.bias", "down_blocks.0.downsamplers.0.conv.weight",
                 "up_blocks.1.resnets.0.conv_shortcut.weight", "mid_block.resnets.1.conv2.weight",
                 "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.weight", "up_blocks.0.upsamplers.0.conv.weight"):
        assert name in changed, name
    # what a convolution gained has the adapters' rank
    name = "mid_block.resnets.1.conv2.weight"
    gained = (after[name] - before[name]).flatten(1)
    assert torch.linalg.matrix_rank(gained, rtol=1e-4) == 2


@pytest.mark.slow
def test_it_is_a_stock_pipeline_that_draws_at_its_resolution_and_teaches(adapted):
    pipeline = StableDiffusionPipeline.from_pretrained(adapted[0], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("a cat", num_inference_steps=1).images
    assert picture.size == (16, 16)
    assert load_teacher(str(adapted[0]), torch.device("cpu")).latent_side(16) == 4
    assert (adapted[0] / "category_reader.safetensors").read_bytes() == (TEACHER / "category_reader.safetensors").read_bytes()


@pytest.mark.slow
def test_the_run_shows_before_and_after(adapted):
    out, printed = adapted
    logged = lines(out.with_name(f"{out.name}-run"))
    fits = [x for x in logged if "yardstick" in x]
    assert [x["step"] for x in fits] == [0, 6] and fits[0]["error"] != fits[1]["error"]
    assert [x["step"] for x in logged if "evaluation" in x] == [4, 6] and "before" in printed and "after" in printed
    assert sorted(path.name for path in (out.with_name(f"{out.name}-run") / "samples").iterdir()) == [
        "step_000004.png", "step_000006.png"]
    assert "adapted-to-16px" in (out / "README.md").read_text("utf-8")


@pytest.mark.parametrize("full", [False, True])
def test_what_is_merged_predicts_what_was_trained(full):
    torch.manual_seed(0)
    unet = load_unet(str(TEACHER))
    adapt.make_trainable(unet, 3, full)
    trained = adapt.Adapted(unet)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    merged = adapt.merge(str(TEACHER), 3, full, trained)
    assert not any("lora" in name for name, _ in merged.named_modules())
    given = torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), torch.randn(2, 24, 128)
    with torch.no_grad():
        want = unet(*given).sample
        torch.testing.assert_close(merged(*given).sample, want, rtol=1e-4, atol=1e-4)
        assert (load_unet(str(TEACHER))(*given).sample - want).abs().max() > 0.01


@pytest.mark.parametrize("full", [False, True])
def test_the_precision_of_frozen_weights_leaves_no_trace_in_trained_ones(full):
    unet = load_unet(str(TEACHER), torch.bfloat16)
    adapt.make_trainable(unet, 2, full)
    adapt.undo_rounding(unet, str(TEACHER))
    merged = adapt.merge(str(TEACHER), 2, full, adapt.Adapted(unet)).state_dict()
    assert all(torch.equal(weight, merged[name]) for name, weight in load_unet(str(TEACHER)).state_dict().items())


@pytest.mark.parametrize("full", [False, True])
def test_the_kernels_of_what_is_trained_can_be_timed(full):
    """Torch 2.13 crashes in the backward pass of an adapter beside frozen weights in channels_last."""
    unet = load_unet(str(TEACHER))
    adapt.make_trainable(unet, 2, full)
    unet.register_to_config(sample_size=8)
    found = time_kernels(adapt.Adapted(unet), 2, 24)
    assert len(found["seconds"]) == 4 and min(found["seconds"].values()) > 0


def test_the_average_shares_the_frozen_weights():
    unet = load_unet(str(TEACHER), torch.bfloat16)
    adapt.make_trainable(unet, 2, full=False)
    average = adapt.average_beside(unet)
    ours, theirs = dict(unet.named_parameters()), dict(average.unet.named_parameters())
    for name, parameter in ours.items():
        assert (parameter is theirs[name]) == (not parameter.requires_grad), name
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert len(average.trained) == sum(p.requires_grad for p in ours.values())
    held = sum(p.numel() for p in average.parameters())
    assert held < 0.05 * sum(p.numel() for p in unet.parameters())


@pytest.mark.slow
def test_a_killed_and_resumed_adaptation_ends_as_the_unbroken_one(adapted, small_set, cache, tmp_path):
    out, log = tmp_path / "killed", tmp_path / "killed-run" / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, *command(small_set, cache, out)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.is_file() and '"step": 3' in log.read_text("utf-8")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not out.exists()
    done = run(*command(small_set, cache, out, "--resume"))
    assert done.returncode == 0, done.stderr[-2000:]
    want, found = load_file(adapted[0] / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.equal(want[name], found[name]) for name in want)


@pytest.mark.slow
def test_mistakes_get_one_line(adapted, small_set, cache, tmp_path, monkeypatch):
    out = adapted[0]
    assert "holds a run already" in refusal(*command(small_set, cache, out))
    twice = command(small_set, cache, tmp_path / "twice", "--teacher", out)
    assert "has been adapted to 16 px already" in refusal(*twice) and "--again" in refusal(*twice)
    assert "--resolution must be a multiple of 8" in refusal(*command(small_set, cache, tmp_path / "x", "--resolution", "20"))


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_folder_that_no_run_has_made_is_not_replaced(small_set, cache, tmp_path, more):
    (tmp_path / "mine").mkdir()
    assert "is there already" in refusal(*command(small_set, cache, tmp_path / "mine", *more))


def test_adapters_that_cannot_be_made_are_one_line_before_anything_is_computed(tmp_path, monkeypatch):
    from peft.tuners.lora import torchao

    def is_old():
        raise ImportError("Found an incompatible version of torchao. Found version 0.10.0, but only versions above 0.16.0 ...")

    arguments = (PATH, "--mini", "--data", tmp_path / "none", "--out", tmp_path / "y")
    monkeypatch.setattr(torchao, "is_torchao_available", is_old)
    line = refusal(*arguments)
    assert "Found version 0.10.0" in line and "pip uninstall torchao" in line and "--full" in line
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refusal(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_it_runs_in_low_precision(dtype, adapted, small_set, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "leaves_gradients_unwritten", lambda _: False)  # a GPU's products do not
    with DeviceProducts():
        done = run(*command(small_set, cache, tmp_path / "low", "--dtype", dtype, "--half"))
    assert done.returncode == 0, done.stderr[-2000:]
    found, want = ([x["loss"] for x in lines(run_of) if "loss" in x] for run_of in (
        tmp_path / "low-run", adapted[0].with_name("teacher-run")))
    assert len(found) == len(want) and all(abs(a - b) < 0.03 * b + 4e-3 for a, b in zip(found, want))
    assert {w.dtype for w in load_file(tmp_path / "low" / WEIGHTS).values()} == {torch.float16}
