"""What the pretended device refuses and what it lets through, with the CPU's values."""

import copy
import io
import os
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common  # noqa: F401

# isort: split
from pretend_device import POSSIBLE, pretend

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not POSSIBLE, reason="needs a CPU build of torch 2.13 on Linux")]

EVERY = pytest.mark.parametrize("kind", ["cuda", "mps"])


@pytest.fixture(params=["cuda", "mps"])
def gpu(request):
    with pretend(request.param) as device:
        yield device


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(),
                               torch.nn.Flatten(), torch.nn.Linear(8 * 16, 4))


def test_there_is_a_device_within_only():
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    with pretend("cuda"):
        assert torch.cuda.is_available() and torch.cuda.is_bf16_supported() and torch.accelerator.is_available()
        assert torch.ones(2, device="cuda").device == torch.device("cuda:0") and torch.ones(2).cuda().is_cuda
        assert isinstance(torch.default_generator, torch.Generator)
    assert not torch.cuda.is_available() and torch.Generator is torch._C.Generator
    assert not torch.accelerator.is_available() and torch.Tensor.data is torch._C.TensorBase.data
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")
    with pretend("mps"):
        assert torch.backends.mps.is_available() and not torch.cuda.is_available()
        assert torch.ones(2, device="mps").is_mps
    with pretend("cuda", bf16=False):
        assert not torch.cuda.is_bf16_supported(including_emulation=False)


def test_mixing_devices_raises(gpu):
    on, off = torch.ones(3, device=gpu.kind), torch.ones(3)
    for mistake in (lambda: on + off, lambda: off + on, lambda: torch.cat([on, off]), lambda: torch.stack([on[0], off[0]]),
                    lambda: on.mul_(off), lambda: off.mul_(on), lambda: on @ off, lambda: torch.lerp(on, off, 0.5),
                    lambda: torch.where(on > 0, on, off), lambda: F.linear(on, torch.ones(2, 3)),
                    lambda: F.embedding(torch.tensor([1]), on[:, None]), lambda: off[0].add_(on[0]),
                    lambda: torch._foreach_lerp_([on], [off], 0.5), lambda: torch.add(on, on, out=off),
                    lambda: torch.nn.Linear(3, 2)(on), lambda: F.mse_loss(on, off), lambda: torch.equal(on, off)):
        with pytest.raises(RuntimeError, match="same device"):
            mistake()
    with pytest.raises(RuntimeError, match="indices should be"):
        off[torch.tensor([0, 1], device=gpu.kind)]
    with pytest.raises(RuntimeError, match="same device"):
        on[torch.tensor([0, 1])] = off[:2]


def test_what_may_be_mixed(gpu):
    on, off = torch.arange(6.0, device=gpu.kind), torch.arange(6.0)
    for both in (lambda x: x * torch.tensor(2.0), lambda x: torch.where(x > 2, x, torch.tensor(0.0)),
                 lambda x: x[torch.tensor([3, 1])], lambda x: x[[0, 2]], lambda x: x.clone().fill_(torch.tensor(3.0)),
                 lambda x: x.clone().index_put_((torch.tensor([1]),), torch.tensor(9.0)), lambda x: x[x > 2],
                 lambda x: x.clone().copy_(torch.ones(6)), lambda x: x.masked_fill(x > 2, torch.tensor(1.0))):
        assert both(on).device.type == gpu.kind and torch.equal(both(on).cpu(), both(off))
    host = torch.zeros(6)
    host.copy_(on)
    assert torch.equal(host, off)
    new = torch.zeros(6, device=gpu.kind)
    torch._foreach_copy_([new], [off])
    assert torch.equal(new.cpu(), off)
    new[torch.tensor([0, 1])] = on[3:5]
    assert new[:2].tolist() == [3.0, 4.0]


def test_numpy_raises(gpu):
    on = torch.ones(2, device=gpu.kind)
    for mistake in (on.numpy, lambda: np.asarray(on), lambda: np.array(on), lambda: np.stack([on])):
        with pytest.raises(TypeError, match=f"can't convert {gpu.kind}"):
            mistake()
    array = np.zeros((2, 2))
    with pytest.raises(TypeError):
        array[0] = on
    with pytest.raises(TypeError, match="BFloat16"):
        on.bfloat16().cpu().numpy()
    array[0] = on.cpu().numpy()
    assert on.cpu().numpy().tolist() == [1, 1] and float(on[0]) == 1 and on.tolist() == [1, 1] and bool(on[0])


def test_generators(gpu):
    cpu, own = torch.Generator().manual_seed(1), torch.Generator(device=gpu.kind).manual_seed(1)
    assert own.device.type == gpu.kind and cpu.device.type == "cpu" and isinstance(own, torch.Generator)
    for mistake in (lambda: torch.randn(3, generator=cpu, device=gpu.kind), lambda: torch.randn(3, generator=own),
                    lambda: torch.ones(3, device=gpu.kind).normal_(generator=cpu),
                    lambda: torch.zeros(3).uniform_(generator=own), lambda: torch.randperm(3, generator=own),
                    lambda: torch.randint(3, (2,), generator=cpu, device=gpu.kind)):
        with pytest.raises(RuntimeError, match="generator"):
            mistake()
    assert torch.randn(3, generator=own, device=gpu.kind).shape == torch.randperm(3, generator=own, device=gpu.kind).shape
    assert torch.randn(3, generator=cpu).to(gpu.kind).shape == (3,)


def test_random_numbers_of_its_own(gpu):
    torch.manual_seed(0)
    want = torch.randn(3)
    torch.manual_seed(0)
    first = torch.rand(3, device=gpu.kind).cpu()
    F.dropout(torch.ones(9, device=gpu.kind))
    assert torch.equal(torch.randn(3), want)
    module = getattr(torch, gpu.kind)
    state = module.get_rng_state()
    drawn = torch.rand(3, device=gpu.kind).cpu()
    module.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=gpu.kind).cpu(), drawn)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3, device=gpu.kind).cpu(), first)


def test_dtypes_of_mps():
    with pretend("mps", bf16=False) as gpu:
        for mistake in (lambda: torch.ones(1, device="mps", dtype=torch.float64), lambda: torch.ones(1).double().to("mps"),
                        lambda: torch.ones(1, device="mps").double(), lambda: torch.from_numpy(np.ones(2)).to("mps"),
                        lambda: torch.ones(1, device="mps").bfloat16(), lambda: torch.tensor(np.ones(2), device="mps")):
            with pytest.raises(TypeError):
                mistake()
        assert torch.tensor([1.5], device="mps").half().dtype == torch.float16 and gpu.kind == "mps"


def test_waits_are_counted(gpu):
    on, index = torch.ones(4, device=gpu.kind), torch.tensor([1], device=gpu.kind)
    gpu.reset()
    y = (on * 2 + 1).square().mean()
    on[index] = 2 * torch.zeros((), device=gpu.kind)
    torch.ones(3).pin_memory().to(gpu.kind, non_blocking=True)
    assert not gpu.syncs
    y.item(), float(y), bool(y > 0), on.cpu(), on.nonzero(), on[on > 0], torch.ones(2).to(gpu.kind), on[torch.tensor([0])]
    torch.tensor([1.0], device=gpu.kind)
    assert gpu.syncs == {"_local_scalar_dense": 3, "to host": 1, "nonzero": 1, "index": 1, "to device": 3}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_with_pinned_memory(gpu, workers):
    data = torch.utils.data.TensorDataset(torch.arange(4.0))
    for (batch,) in torch.utils.data.DataLoader(data, batch_size=2, pin_memory=True, num_workers=workers):
        assert batch.is_pinned() == (gpu.kind == "cuda") and batch.device.type == "cpu"  # torch pins none for MPS
        assert batch.to(gpu.kind, non_blocking=True).sum().item() in (1, 5)


def test_a_copy_that_nobody_waited_for_is_garbage(gpu):
    host = torch.ones(3, device=gpu.kind).to("cpu", non_blocking=True)
    assert host.isnan().all()
    getattr(torch, gpu.kind).synchronize()
    assert host.tolist() == [1, 1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_use_after_a_fork_raises(gpu):
    on = torch.ones(2, device=gpu.kind)
    child = os.fork()
    if not child:
        code = 0
        for use in (lambda: on + 1, lambda: torch.ones(1).to(gpu.kind)):
            try:
                use()
                code = 1
            except RuntimeError as error:
                code = code or (0 if "forked" in str(error) else 2)
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_is_the_cpus(gpu, dtype):
    """Autocast, scaler, clipping, fused AdamW, channels_last, EMA by foreach: the same weights as on the CPU."""
    ends = []
    for device in ("cpu", gpu.kind):
        model = net().to(device, memory_format=torch.channels_last)
        identity = [id(p) for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        shadow = [p.detach().clone() for p in model.parameters()]
        for step in range(4):
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step)).to(device)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                y = model(x)
                assert y.dtype == dtype and y.device.type == device
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(y.float().square().mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            torch._foreach_lerp_(shadow, [p.detach() for p in model.parameters()], 0.1)
        assert all(isinstance(p, torch.nn.Parameter) and p.device.type == device for p in model.parameters())
        assert identity == [id(p) for p in model.parameters()]
        ends.append([t.cpu() for t in (*(p.detach() for p in model.parameters()), *shadow)])
    for a, b in zip(*ends):  # autocast's lists of operators differ between the devices
        assert (a - b).abs().mean() < (1e-6 if dtype == torch.float32 else 1e-3)


def test_a_step_waits_for_nothing(gpu):
    model = net().to(gpu.kind)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(2, 3, 4, 4).to(gpu.kind)
    for _ in range(2):
        gpu.reset()
        model(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert not gpu.syncs


def test_attention(gpu):
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = F.scaled_dot_product_attention(*(x.to(gpu.kind).requires_grad_() for x in (q, k, v)), is_causal=True)
    found.sum().backward()
    torch.testing.assert_close(found.detach().cpu(), want)
    with torch.no_grad():
        mask = torch.zeros(5, 5, device=gpu.kind)
        found = F.scaled_dot_product_attention(*(x.to(gpu.kind) for x in (q, k, v)), attn_mask=mask)
    assert found.device.type == gpu.kind


def test_factories_and_views(gpu):
    make = (lambda d: torch.arange(7, device=d), lambda d: torch.linspace(0, 1, 5, device=d), lambda d: torch.eye(3, device=d),
            lambda d: torch.full((2, 3), 4.0, device=d), lambda d: torch.tensor([[1, 2]], device=d),
            lambda d: torch.zeros(2, 3, device=d).new_ones(2), lambda d: torch.zeros(2, 3, device=d).t().contiguous(),
            lambda d: torch.arange(6.0, device=d).view(2, 3)[:, 1:].cumsum(1), lambda d: torch.ones(3, device=d).unsqueeze_(0),
            lambda d: torch.tril(torch.ones(3, 3, device=d)), lambda d: F.one_hot(torch.arange(3, device=d), 4),
            lambda d: torch.logspace(0, 1, 3, device=d), lambda d: torch.sort(torch.tensor([3, 1, 2], device=d))[0],
            lambda d: torch.ones(3, device=d).resize_(2), lambda d: torch.empty(0, device=d).set_(torch.ones(2, device=d)),
            lambda d: torch.add(torch.ones(3, device=d), 1, out=torch.empty(0, device=d)))
    for function in make:
        want, found = function("cpu"), function(gpu.kind)
        assert found.device.type == gpu.kind and found.shape == want.shape and torch.equal(found.cpu(), want)
    x = torch.zeros(4, device=gpu.kind)
    x[1:3] += 1
    x.view(2, 2)[0, 0] = 5
    assert x.tolist() == [5, 1, 1, 0] and "5" in repr(x)
    with torch.device(gpu.kind):
        assert torch.nn.Linear(2, 2).weight.device.type == gpu.kind
    assert torch.zeros(1, device=gpu.kind) in [torch.zeros(1, device=gpu.kind)]


def test_gradients_through_views_and_checkpointing(gpu):
    grads = []
    for device in ("cpu", gpu.kind):
        w = torch.arange(6.0, device=device).requires_grad_()
        y = w * 2
        y[1:3] *= 3
        y.view(2, 3).t()[0].exp_()
        z = torch.utils.checkpoint.checkpoint(lambda a: F.silu(a) * a, y / 10, use_reentrant=False)
        z.sum().backward()
        grads.append(w.grad.cpu())
    torch.testing.assert_close(*grads)


def test_inference_mode(gpu):
    model, x = net(), torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        want = model(x)
        found = model.to(gpu.kind)(x.to(gpu.kind))
        torch.testing.assert_close(found.cpu(), want)
        with pytest.raises(RuntimeError, match="same device"):
            model(x)


def test_another_thread(gpu):
    found, model = [], net().to(gpu.kind)

    def work():
        found.append(model(torch.ones(1, 3, 4, 4).to(gpu.kind)).sum())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].device.type == gpu.kind
    found[0].backward()
    assert model[0].weight.grad.device.type == gpu.kind


def test_saving_and_loading(gpu, tmp_path):
    from safetensors import torch as files
    model = net().to(gpu.kind)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3, 4, 4, device=gpu.kind)).sum().backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "grad": model[0].weight.grad}, buffer)
    want = [t.cpu() for t in model.state_dict().values()]
    for location, kind in (("cpu", "cpu"), (None, gpu.kind), (gpu.kind, gpu.kind), (torch.device(gpu.kind), gpu.kind)):
        buffer.seek(0)
        state = torch.load(buffer, map_location=location, weights_only=True)
        assert all(t.device.type == kind for t in state["model"].values())
        assert all(torch.equal(a.cpu(), b) for a, b in zip(state["model"].values(), want))
        other = net().to(gpu.kind)
        other.load_state_dict(state["model"])
        again = torch.optim.AdamW(other.parameters(), fused=True)
        again.load_state_dict(state["optimizer"])
        assert all(v.device.type == gpu.kind for v in again.state[other[0].weight].values())
    files.save_file(model.state_dict(), tmp_path / "x.safetensors")
    for device in ("cpu", gpu.kind):
        found = files.load_file(tmp_path / "x.safetensors", device=device)
        assert all(t.device.type == device and torch.equal(t.cpu(), model.state_dict()[k].cpu()) for k, t in found.items())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0 and isinstance(twin[0].weight, torch.nn.Parameter)
    assert twin[0].weight.requires_grad and twin.cpu()[0].weight.device.type == "cpu"
    assert type(twin[0].weight) is torch.nn.Parameter
    twin[0].weight.sum().backward()


def test_moving_a_model_keeps_its_parameters(gpu):
    model = net()
    weight, optimizer = model[0].weight, torch.optim.SGD(model.parameters(), 0.1)
    model.to(gpu.kind).half().float().to(memory_format=torch.channels_last)
    assert model[0].weight is weight is optimizer.param_groups[0]["params"][0] and weight.device.type == gpu.kind
    assert weight.is_contiguous(memory_format=torch.channels_last)
    weight.data = torch.zeros_like(weight)
    assert weight.abs().sum() == 0
    host = torch.nn.Parameter(torch.ones(2))
    host.data = host.data.to(gpu.kind)
    assert host.device.type == gpu.kind and host.requires_grad


def test_autocast_of_the_cpu_does_not_concern_it(gpu):
    x = torch.ones(2, 2, device=gpu.kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.float32
    with torch.autocast(gpu.kind, torch.float16):
        assert (x @ x).dtype == torch.float16 and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_pipelines_and_accelerate(gpu, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        accelerator = Accelerator(mixed_precision="no")
        assert accelerator.device.type == gpu.kind
        model = net()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        for _ in range(2):
            accelerator.backward(model(torch.ones(1, 3, 4, 4, device=accelerator.device)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state(str(tmp_path / "s"))
        want = model[0].weight.detach().cpu()
        with torch.no_grad():
            model[0].weight.zero_()
        accelerator.load_state(str(tmp_path / "s"))
        assert torch.equal(model[0].weight.detach().cpu(), want)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def test_a_unet_is_saved_and_loaded(gpu, tmp_path):
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8,
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2)
    x, hidden = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    with torch.no_grad():
        want = unet(x, 5, hidden).sample
    unet.to(gpu.kind)
    found = unet(x.to(gpu.kind), 5, hidden.to(gpu.kind)).sample
    torch.testing.assert_close(found.detach().cpu(), want, rtol=1e-3, atol=1e-4)
    unet.save_pretrained(tmp_path / "u")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "u").to(gpu.kind)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(unet.state_dict().values(), again.state_dict().values()))
