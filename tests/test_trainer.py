"""Trainer: the moving average, the learning rate, steps that are left out, checkpoints; and that nothing waits."""

import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_apart
from diffusers import UNet2DConditionModel
from pretend_device import WAITS
from torch.utils._python_dispatch import TorchDispatchMode

from common import trainer as trainer_module
from common.cache import Batch
from common.trainer import Trainer, make_adamw, one_cycle, predict_noise, start_accelerator

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, cross_attention_dim=4,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None)


def trainer_of(student, **options) -> Trainer:
    options = dict(dtype=torch.float32, steps=10, batch_size=2, lr=0.1, warmup=0.3, weight_decay=0.0, max_grad_norm=1.0,
                   ema_decay=0.9) | options
    return Trainer(start_accelerator("cpu"), student, **options)


def some_batch() -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(2, 4, 8, 8), torch.randn(2, 3, 4), torch.randn(2, 4, 8, 8), torch.tensor([10, 900]))


def noise_loss(trainer, batch) -> torch.Tensor:
    with trainer.autocast():
        noise_pred = predict_noise(trainer.model, batch.latents + batch.noise, batch)
    return torch.nn.functional.mse_loss(noise_pred, batch.noise)


def test_the_named_gpu_is_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(trainer_module, "Accelerator", lambda **_: exit("started"))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")  # which it is told of, and forgets
    for device in ("cuda:1", "cuda", "auto", "cpu"):
        with pytest.raises(SystemExit, match="started"):
            start_accelerator(device)
    assert current == ["cuda:1"]


def test_a_run_says_what_it_runs_on(monkeypatch, capsys):
    accelerator = SimpleNamespace(gradient_accumulation_steps=1, distributed_type="NO", print=print,
                                  state=SimpleNamespace(deepspeed_plugin=None))
    monkeypatch.setattr(trainer_module, "Accelerator", lambda **_: accelerator)
    for asked, found, why in (("auto", "cpu", ", as this torch finds no GPU"), ("cpu", "cpu", ""), ("auto", "cuda", "")):
        accelerator.device = torch.device(found)
        start_accelerator(asked)
        assert capsys.readouterr().out == f"device: {found}{why}\n"


def test_a_machine_that_cannot_compile_is_one_line_at_the_start(tmp_path):
    out = tmp_path / "run"
    done = run_apart("v2/2.1.py", "--mini", "--compile", "--device", "cpu", "--out", out,
                     env=os.environ | {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 1 and not out.exists()
    assert done.stderr.splitlines()[-1].startswith("error: --compile does not work here: ")
    assert "Traceback" not in done.stderr


def test_ema_against_its_closed_form():
    """Weights that are set by hand before each step: its gradient is zero, so that AdamW moves nothing."""
    decay, values = 0.9, np.linspace(-1, 2, 400)
    trainer = trainer_of(tiny_unet(), steps=len(values), ema_decay=decay)
    weights = list(trainer.student.parameters())
    averages = [p.clone() for p in trainer.ema_student.parameters()]
    assert all(torch.equal(p, average) for p, average in zip(weights, averages))
    for step, value in enumerate(values):
        for p in weights:
            p.data.fill_(value)
        trainer.step(weights[0].sum() * 0)
        d = min(decay, (1 + step) / (10 + step))
        averages = [d * average.double() + (1 - d) * value for average in averages]
    for p, found, want in zip(weights, trainer.ema_student.parameters(), averages, strict=True):
        assert (found - want).abs().max() < 1e-5
        # with d constant and weights growing by h a step the average lags by h d / (1 - d)
        assert (values[-1] - want - (values[1] - values[0]) * decay / (1 - decay)).abs().max() < 1e-6
        assert (p - values[-1]).abs().max() < 1e-6  # the trained weights are another module's
    assert not any(p.requires_grad for p in trainer.ema_student.parameters()) and not trainer.ema_student.training


def test_without_ema_decay_the_average_is_the_student():
    trainer, batch = trainer_of(tiny_unet(), ema_decay=0.0), some_batch()
    for _ in range(3):
        trainer.step(noise_loss(trainer, batch))
    for p, average in zip(trainer.student.parameters(), trainer.ema_student.parameters(), strict=True):
        assert torch.equal(p, average)


@pytest.mark.parametrize("steps", [2, 3, 50])
def test_the_learning_rate_rises_and_falls_in_runs_of_any_length(steps):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    scheduler, rates = one_cycle(optimizer, lr=0.1, warmup=0.05, steps=steps), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.004) and rates[-1] < 1e-5 and (steps == 2 or max(rates) > 0.09)


def test_a_step_is_clipped_adamw_on_one_cycle():
    """Against torch's own parts, put together by hand."""
    trainer, batch = trainer_of(tiny_unet(), lr=0.01, weight_decay=0.1, max_grad_norm=0.05), some_batch()
    by_hand = tiny_unet().train()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10, pct_start=0.3)
    for _ in range(10):
        assert trainer.lr == scheduler.get_last_lr()[0]
        trainer.step(noise_loss(trainer, batch))
        torch.nn.functional.mse_loss(predict_noise(by_hand, batch.latents + batch.noise, batch), batch.noise).backward()
        assert torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.05) > 0.05
        optimizer.step()
        scheduler.step() if trainer.done_steps < 10 else None
        optimizer.zero_grad()
    for found, want in zip(trainer.student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_without_finite_gradients_is_skipped_and_counted(dtype):
    student, batch = tiny_unet(), some_batch()
    trainer = trainer_of(student, dtype=dtype)
    trainer.step(noise_loss(trainer, batch))
    before = [p.detach().clone() for p in student.parameters()]
    assert trainer.bad_steps() == (0, 0)
    for scale in (float("nan"), float("inf")):
        trainer.step(noise_loss(trainer, batch) * scale)
    assert all(torch.equal(p, old) for p, old in zip(student.parameters(), before)) and trainer.bad_steps() == (2, 2)
    trainer.step(noise_loss(trainer, batch))
    assert not any(torch.equal(p, old) for p, old in zip(student.parameters(), before)) and trainer.bad_steps() == (2, 0)
    assert all(p.isfinite().all() for p in trainer.ema_student.parameters())


class Waits(TorchDispatchMode):
    """Counts the operators whose result the host must have before it goes on."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            self.found[str(func)] += 1
        return func(*args, **kwargs or {})


def test_a_wait_is_seen():
    assert torch.ops.aten._local_scalar_dense in WAITS
    with Waits() as waits:
        torch.ones(1).item()
    assert waits.found["aten._local_scalar_dense.default"] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_training_step_never_waits_for_the_device(dtype):
    trainer, batch = trainer_of(tiny_unet(), dtype=dtype), some_batch()
    assert trainer.optimizer.optimizer.defaults["fused"]
    for _ in range(3):  # the first step makes the optimizer's state
        with Waits() as waits:
            loss = noise_loss(trainer, batch)
            trainer.step(loss)
        assert not waits.found
    assert trainer.done_steps == 3 and trainer.bad_steps() == (0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prediction_never_waits_and_is_float32(dtype):
    unet, batch = tiny_unet().to(dtype), some_batch()
    with torch.no_grad(), Waits() as waits:
        noise_pred = predict_noise(unet, batch.latents, batch)
    assert not waits.found and noise_pred.dtype == torch.float32
    want = tiny_unet()(batch.latents, batch.timesteps, batch.encoder_hidden_states).sample
    torch.testing.assert_close(noise_pred, want, rtol=0.1, atol=0.05 if dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checkpoint_holds_everything_that_training_changes(tmp_path, dtype):
    batch, also = some_batch(), torch.nn.Linear(2, 2)
    trainer = trainer_of(tiny_unet(), dtype=dtype, keep=2, also_saved={"also": also})
    for step in range(4):
        trainer.step(noise_loss(trainer, batch) * (float("inf") if step == 1 else 1))
        trainer.save(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-00000003", "checkpoint-00000004"]
    kept = [p.detach().clone() for p in also.parameters()]
    again = trainer_of(tiny_unet(), dtype=dtype, keep=2, also_saved={"also": torch.nn.Linear(2, 2)})
    assert again.restore(tmp_path) == 4 == again.done_steps and again.bad_steps() == trainer.bad_steps() == (1, 0)
    assert all(torch.equal(p, old) for p, old in zip(again.also_saved["also"].parameters(), kept))
    for one in (trainer, again):
        for _ in range(4):
            one.step(noise_loss(one, batch))
    for module in ("student", "ema_student"):
        for found, want in zip(getattr(again, module).parameters(), getattr(trainer, module).parameters(), strict=True):
            assert torch.equal(found, want)
    assert again.lr == trainer.lr and again.scaler.state_dict() == trainer.scaler.state_dict()


@pytest.mark.parametrize("before, after", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
def test_a_run_goes_on_in_another_precision(tmp_path, before, after):
    """As on a card that has no bf16, or has."""
    trainer = trainer_of(tiny_unet(), dtype=before)
    trainer.step(noise_loss(trainer, some_batch()))
    trainer.save(tmp_path)
    again = trainer_of(tiny_unet(), dtype=after)
    assert again.restore(tmp_path) == 1
    again.step(noise_loss(again, some_batch()))
    assert again.done_steps == 2 and again.bad_steps() == (0, 0)


CUDA, MPS = (True, torch.channels_last), (False, torch.contiguous_format)  # whether AdamW is fused; how weights lie in memory


@pytest.mark.parametrize("before, after", [(CUDA, MPS), (MPS, CUDA), ((True, torch.contiguous_format), CUDA)], ids=str)
def test_a_run_goes_on_on_another_device(tmp_path, monkeypatch, before, after):
    def trainer_on(fused: bool, strides: torch.memory_format) -> Trainer:
        with monkeypatch.context() as device:
            device.setattr(trainer_module, "strides_for", lambda *_: strides)
            device.setattr(trainer_module, "make_adamw", lambda *given: make_adamw(*given[:-1], fused))
            trainer = trainer_of(tiny_unet())
        trainer.fused = fused
        return trainer

    batch, trainer, unbroken = some_batch(), trainer_on(*before), trainer_on(*after)
    trainer.step(noise_loss(trainer, batch))
    trainer.save(tmp_path)
    again = trainer_on(*after)
    assert again.restore(tmp_path) == 1
    for one in (unbroken, unbroken, again):
        one.step(noise_loss(one, batch))
    for found, want in zip(again.student.parameters(), unbroken.student.parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)


def test_checkpoints_that_are_all_broken_are_one_line(tmp_path):
    trainer = trainer_of(tiny_unet())
    trainer.step(noise_loss(trainer, some_batch()))
    trainer.save(tmp_path)
    (tmp_path / "checkpoint-00000001" / "trainer.pt").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="^error: no checkpoint in .* can be loaded"):
        trainer_of(tiny_unet()).restore(tmp_path)
    assert trainer_of(tiny_unet()).restore(tmp_path / "none") == 0
