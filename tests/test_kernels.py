"""Precision and attention by measurement: what is timed, what is chosen, and that a resumed run repeats it."""

import copy
import itertools
import json
import shutil
import time
from dataclasses import dataclass

import pytest
import torch
from conftest import process, run
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from test_trainer import tiny_unet

from common import precision
from common.cache import TeacherStore, TrainingPairs
from common.coco import CocoCaptions
from common.precision import drawing_dtype, fastest_kernels, kept_dtype, time_kernels
from common.run import Run
from common.trainer import predict_noise, start_accelerator

PLACES = [("fp32", "fused"), ("fp32", "plain"), ("bf16", "fused"), ("bf16", "plain")]  # in the order in which they are timed


@pytest.fixture
def bf16_units(monkeypatch):
    """Every CPU multiplies bf16."""
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: device.type == "cpu")


def clock(monkeypatch, *seconds):
    """Passes that take so long, in the order of PLACES; the first turn reads the clock only before each."""
    times, now = [0.0] * len(PLACES), 0.0
    for _ in range(2):
        for took in seconds:
            times += [now, now + took]
            now += took
    ticks = itertools.chain(times, iter(time.perf_counter, None))
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(ticks))


@pytest.mark.parametrize("seconds, chosen", [
    ((4.0, 3.0, 2.0, 1.0), ("bf16", "plain")),
    ((4.0, 3.0, 1.0, 2.0), ("bf16", "fused")),
    ((4.0, 1.0, 2.0, 3.0), ("fp32", "plain")),
    ((1.0, 2.0, 3.0, 4.0), ("fp32", "fused")),
    ((1.0, 0.97, 0.96, 0.99), ("fp32", "fused")),  # not worth it
])
def test_the_fastest_is_chosen(monkeypatch, seconds, chosen):
    student = tiny_unet()
    clock(monkeypatch, *seconds)
    found = time_kernels(student, 2, 3)
    assert (found["dtype"], found["attention"]) == chosen
    assert list(found["seconds"].values()) == pytest.approx(seconds)
    assert all(p.grad is None for p in student.parameters())


def test_what_moves_the_loss_is_not_chosen(monkeypatch):
    student = tiny_unet()
    forward = student.forward

    def wrong_in_bf16(*args, **kwargs):
        noise_pred, *rest = forward(*args, **kwargs)
        return noise_pred * (1.1 if torch.is_autocast_enabled("cpu") else 1), *rest

    student.forward = wrong_in_bf16
    with torch.no_grad():
        student.conv_out.bias += 1  # a loss that a tenth more of the prediction moves by more than 1 %
    clock(monkeypatch, 4.0, 3.0, 2.0, 1.0)
    assert time_kernels(student, 2, 3)["dtype"] == "fp32"


@dataclass
class Settings:
    seed: int = 0


def test_a_resumed_run_takes_the_same_without_timing(monkeypatch, bf16_units, tmp_path, capsys):
    accelerator, out = start_accelerator("cpu"), tmp_path / "run"
    student, run_of = tiny_unet(), dict(auto=True, steps=100, batch_size=2, tokens=3)
    first = Run(str(out), Settings(), False, accelerator)
    first.create("data", "teacher", torch.float32)
    clock(monkeypatch, 4.0, 3.0, 2.0, 1.0)
    assert fastest_kernels(first, student, torch.float32, **run_of) == torch.bfloat16
    assert "precision: bf16, plain attention" in capsys.readouterr().out
    assert all(isinstance(p, AttnProcessor) for p in student.attn_processors.values())
    assert json.loads((out / "settings.json").read_text())["kernels"]["dtype"] == "bf16"

    (out / "checkpoint-00000001").mkdir()
    monkeypatch.setattr(precision, "time_kernels", lambda *_: pytest.fail("timed again"))
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)  # on another machine, even
    again, student = Run(str(out), Settings(), True, accelerator), tiny_unet()
    again.create("data", "teacher", torch.float32)
    assert fastest_kernels(again, student, torch.float32, **run_of) == torch.bfloat16
    assert all(isinstance(p, AttnProcessor) for p in student.attn_processors.values())
    assert json.loads((out / "settings.json").read_text())["kernels"] == again.kernels


def test_gradients_that_torch_leaves_unwritten_are_made_in_fp32(bf16_units, teacher, tmp_path):
    """Four levels shrink 4 x 4 latents to one position before the last downsampler, and 8 x 8 ones after it."""
    unet, tokens = copy.deepcopy(teacher.unet).requires_grad_(True), teacher.tokenizer.model_max_length
    first = Run(str(tmp_path), Settings(), False, start_accelerator("cpu"))
    options = dict(auto=False, steps=100, batch_size=2, tokens=tokens)
    unet.register_to_config(sample_size=8)
    assert fastest_kernels(first, unet, torch.bfloat16, **options) == torch.bfloat16
    unet.register_to_config(sample_size=4)
    with pytest.raises(SystemExit, match="take fp32"):
        fastest_kernels(first, unet, torch.bfloat16, **options)
    assert list(time_kernels(unet, 2, tokens)["seconds"]) == ["fp32, fused", "fp32, plain"]


def test_a_student_is_drawn_again_as_its_run_drew_it(bf16_units, tmp_path):
    device, student = torch.device("cpu"), str(tmp_path / "student")
    assert drawing_dtype("auto", device, student) == torch.float32  # no run of ours
    (tmp_path / "settings.json").write_text("{}", "utf-8")
    assert drawing_dtype("auto", device, student) == torch.float32
    (tmp_path / "settings.json").write_text('{"kernels": {"dtype": "bf16"}}', "utf-8")
    assert drawing_dtype("auto", device, student) == torch.bfloat16
    assert drawing_dtype("fp32", device, student) == torch.float32


@pytest.mark.parametrize("options", [dict(auto=False, steps=100), dict(auto=True, steps=99)])
def test_a_named_precision_and_a_short_run_are_not_timed(monkeypatch, bf16_units, tmp_path, options):
    first = Run(str(tmp_path), Settings(), False, start_accelerator("cpu"))
    monkeypatch.setattr(precision, "time_kernels", lambda *_: pytest.fail("timed"))
    student = tiny_unet()
    assert fastest_kernels(first, student, torch.float32, batch_size=2, tokens=3, **options) == torch.float32
    assert all(isinstance(p, AttnProcessor2_0) for p in student.attn_processors.values())


def test_a_cpu_without_units_stays_in_fp32(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    first = Run(str(tmp_path), Settings(), False, start_accelerator("cpu"))
    monkeypatch.setattr(precision, "time_kernels", lambda *_: pytest.fail("timed"))
    student = tiny_unet()
    assert fastest_kernels(first, student, torch.float32, auto=True, steps=1000, batch_size=2, tokens=3) == torch.float32
    assert kept_dtype(student) == torch.float32


def test_what_is_kept_in_bf16_is_near_what_fp32_gives(bf16_units, monkeypatch, small_set, teacher, tmp_path):
    """Latents, embeddings and the teacher's predictions: in the root mean square within 2 % of fp32's."""
    def kept(folder):
        pairs = TrainingPairs(CocoCaptions(small_set, "train", 32), teacher, folder, process(), batch_size=8, seed=0,
                              caption_gb=1)
        store = TeacherStore(pairs, lambda noisy, batch: predict_noise(teacher.unet, noisy, batch), [0.1], 10)
        batch = store.draw(0)
        return batch.latents, batch.encoder_hidden_states, batch.teacher_pred

    lowered = kept(tmp_path)
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)
    for found, want in zip(lowered, kept(tmp_path), strict=True):  # in the same folder: their keys differ
        assert 0 < (found - want).square().mean() < 0.02**2 * want.square().mean()


@pytest.mark.slow
def test_a_run_in_the_fastest_precision_is_resumed_bit_for_bit(small_set, cache, tmp_path):
    """On a machine with such units in bf16, elsewhere in fp32."""
    def train(*more):
        done = run("v2/2.1.py", "--mini", "--data", small_set, "--cache-folder", cache, "--out", out, "--steps", 100,
                   "--batch-size", 2, "--eval-every", 0, "--final-samples", 4, "--sample-steps", 1, "--save-every", 50, *more)
        assert done.returncode == 0, done.stderr
        return (out / "student/unet/diffusion_pytorch_model.safetensors").read_bytes()

    out = tmp_path / "run"
    unbroken = train()
    shutil.rmtree(out / "checkpoint-00000100")  # as a kill after the first checkpoint leaves it
    shutil.rmtree(out / "student")
    assert train("--resume") == unbroken
