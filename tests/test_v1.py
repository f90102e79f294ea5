"""V-1's formulas: chains, progressive distillation on a known Gaussian, feature matching."""

from unittest import mock

import pytest
import torch
from conftest import script
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from common.cache import Batch
from common.features import ConvProjection, FeatureMatching, StudentWithFeatures, hook_both
from common.sampling import ddim_step
from common.slicing import even_channels, slice_unet, student_config

v1 = script("v1/1.py")


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_the_last_chain_is_what_a_sampler_visits(teacher, kind):
    sampler = kind.from_config(teacher.noise_scheduler.config)
    sampler.set_timesteps(25)
    assert v1.chain_timesteps(teacher.noise_scheduler, 25).tolist() == sampler.timesteps.flip(0).tolist()


@pytest.mark.parametrize("length", [1000, 250, 125, 50, 25])
def test_a_chain_spans_the_whole_noise_range(teacher, length):
    chain = v1.chain_timesteps(teacher.noise_scheduler, length)
    stride = 1000 // length
    assert len(chain) == length and chain.diff().eq(stride).all()
    assert chain[0] <= stride and 999 - chain[-1] <= stride


def test_stages_take_their_shares():
    assert v1.stage_starts(1000, (60, 10, 10, 10, 10)) == [0, 600, 700, 800, 900]
    assert v1.stage_starts(10, (1, 1)) == [0, 5]


class BestOfAGaussian(torch.nn.Module):
    """The best noise prediction for x_0 ~ N(0, s2): sigma z / v with v = alpha^2 s2 + sigma^2. Called as a U-Net is."""

    def __init__(self, alphas_cumprod: torch.Tensor, s2: float):
        super().__init__()
        self.alphas_cumprod, self.s2 = alphas_cumprod, s2
        self.any = torch.nn.Parameter(torch.zeros((), dtype=alphas_cumprod.dtype))  # tells in what precision it computes

    def forward(self, noisy, timesteps, encoder_hidden_states, return_dict=True):
        assert not return_dict and noisy.dtype == encoder_hidden_states.dtype == self.any.dtype
        a = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * noisy / (a * self.s2 + 1 - a),)


@pytest.mark.parametrize("stride", [40, 8, 4])
def test_two_steps_of_a_known_gaussian_have_their_closed_form(teacher, stride):
    """A DDIM step of the best prediction multiplies z by (alpha alpha' s^2 + sigma sigma') / v.

    All is float64 but for what `predict_noise` hands out, float32 by contract. Solving for x_0 divides by
    alpha_end - sigma_end / sigma alpha, which is small for neighbouring steps, and its rounding grows by as much: that is the
    tolerance, and where both predictions are left in float64 it is the 1e-9 that it always was.
    """
    abar, s2 = teacher.noise_scheduler.alphas_cumprod.double(), 0.7**2

    def parts(t):
        a = abar[t.clamp(min=0)].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def factor(t, t_next):
        (alpha, sigma), (alpha_next, sigma_next) = parts(t), parts(t_next)
        return (alpha * alpha_next * s2 + sigma * sigma_next) / (alpha**2 * s2 + sigma**2)

    t = v1.chain_timesteps(teacher.noise_scheduler, 1000 // stride)
    z = torch.randn(len(t), 4, 2, 2, dtype=torch.float64)
    batch = Batch(z, torch.zeros(len(t), 1, 1), z, t)
    z_end = factor(t, t - stride // 2) * factor(t - stride // 2, t - stride) * z
    alpha, sigma = parts(t)
    alpha_end, sigma_end = parts(t - stride)
    x0 = (z_end - sigma_end / sigma * z) / (alpha_end - sigma_end / sigma * alpha)
    want = (z - alpha * x0) / sigma
    unet = BestOfAGaussian(abar, s2)

    def exactly(unet, noisy, batch):  # `predict_noise` without its .float()
        return unet(noisy, batch.timesteps, batch.encoder_hidden_states.double(), return_dict=False)[0]

    with mock.patch.object(v1, "predict_noise", exactly):
        target = v1.two_step_target(unet, z, batch, stride, abar)
    assert torch.allclose(target, want, rtol=1e-9, atol=1e-9)
    one_step = ddim_step(z, target, alpha**2, alpha_end**2)
    assert torch.allclose(one_step, z_end, rtol=1e-7, atol=1e-9)

    rounded = v1.two_step_target(unet, z, batch, stride, abar)
    assert torch.allclose(rounded, want, rtol=0, atol=1e-5), (rounded - want).abs().max()
    assert torch.allclose(ddim_step(z, rounded, alpha**2, alpha_end**2), z_end, rtol=0, atol=1e-5)


def test_weights_turn_epsilon_errors_into_those_of_each_target():
    a = torch.tensor([0.9, 0.5, 0.01], dtype=torch.float64)
    z, eps, other = torch.randn(3, 3, dtype=torch.float64)
    x0, x0_other = ((z - (1 - a).sqrt() * e) / a.sqrt() for e in (eps, other))
    v, v_other = (a.sqrt() * e - (1 - a).sqrt() * x for e, x in ((eps, x0), (other, x0_other)))
    errors = {"epsilon": eps - other, "x0": x0 - x0_other, "v": v - v_other}
    for target, error in errors.items():
        assert torch.allclose(v1.epsilon_weight(target, a) * (eps - other) ** 2, error**2)
    truncated = (a / (1 - a)).clamp(min=1) * (x0 - x0_other) ** 2
    assert torch.allclose(v1.epsilon_weight("truncated", a) * (eps - other) ** 2, truncated)


def test_conv_projection_starts_as_the_slicing_map():
    projection = ConvProjection(4, 8)
    features = torch.randn(2, 4, 3, 3)
    assert torch.equal(projection(features)[:, even_channels(8, 4)], features)


@pytest.fixture
def no_hooks_left(teacher):
    """The session's teacher loses the hooks that a test leaves in it."""
    yield
    for module in teacher.unet.modules():
        module._forward_hooks.clear()


def test_a_sliced_students_features_start_nearer_to_the_teachers_than_random_ones(teacher, no_hooks_left):
    config = student_config(teacher.unet, (32, 48, 64, 80), 2)
    torch.manual_seed(0)
    students = {"sliced": slice_unet(teacher.unet, config), "random": UNet2DConditionModel(**config)}
    noisy, t, states = torch.randn(8, 4, 8, 8), torch.randint(1000, (8,)), torch.randn(8, 24, 128)
    distance = {}
    for name, student in students.items():
        in_student, in_teacher = hook_both(student.eval(), teacher.unet, ("down_blocks.0", "up_blocks.3"))
        with torch.no_grad():
            teacher.unet(noisy, t, states), student(noisy, t, states)
        student_features, teacher_features = in_student.take(), in_teacher.take()
        assert student_features.keys() == teacher_features.keys() == {"down_blocks.0", "up_blocks.3"}
        distance[name] = []
        for block, ours in student_features.items():
            theirs = teacher_features[block]
            # projected by the map that ConvProjection starts as
            theirs = theirs[:, even_channels(theirs.shape[1], ours.shape[1])]
            distance[name].append(1 - torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0).item())
        for module in teacher.unet.modules():
            module._forward_hooks.clear()
    assert all(s < 0.9 * r for s, r in zip(distance["sliced"], distance["random"])), distance


def test_feature_loss_of_a_network_with_itself_is_zero_and_in_the_teachers_units(teacher, no_hooks_left):
    student = slice_unet(teacher.unet, dict(teacher.unet.config)).eval()
    in_student, in_teacher = hook_both(student, teacher.unet, ("mid_block", "up_blocks.1.resnets.0"))
    noisy, t, states = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 24, 128)
    with torch.no_grad():
        student(noisy, t, states), teacher.unet(noisy, t, states)
        ours, theirs = in_student.take(), in_teacher.take()
        matching = FeatureMatching(ours, theirs, torch.nn.functional.mse_loss)
        assert matching(ours, theirs).item() < 1e-8
        nothing = {block: torch.zeros_like(values) for block, values in ours.items()}
        even = {block: values / values.square().mean((2, 3), keepdim=True).sqrt() for block, values in theirs.items()}
        assert abs(matching(nothing, even).item() - 1) < 1e-4  # nothing at all is one unit away, of even channels
    assert in_student.take() == {} == in_teacher.take()  # handed out once


def test_every_channel_of_a_picture_is_measured_in_units_of_its_own(teacher, no_hooks_left):
    """So a batch's loss is the mean of its pictures' losses, however it is split."""
    theirs = {"a": torch.randn(3, 8, 4, 4) * torch.tensor([1.0, 10, 100]).view(3, 1, 1, 1)}
    theirs["a"] *= torch.logspace(-3, 0, 8).view(8, 1, 1)  # channels of all strengths
    ours = {"a": torch.randn(3, 4, 4, 4)}
    matching = FeatureMatching(ours, theirs, torch.nn.functional.mse_loss)
    whole = matching(ours, theirs)
    single = [matching({"a": ours["a"][i : i + 1]}, {"a": theirs["a"][i : i + 1]}) for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(single).mean())
    projected, errors = matching.projections["a"](ours["a"]), []
    for wanted, got in zip(theirs["a"], projected):
        for channel in range(8):
            more = torch.cat([wanted[channel].flatten(), wanted.square().mean().sqrt().view(1)])  # the position more
            errors.append((got[channel] - wanted[channel]).square().mean() / more.square().mean())
    torch.testing.assert_close(whole, torch.stack(errors).mean())


def test_the_students_up_blocks_are_matched_with_the_teachers_of_the_same_level(teacher, no_hooks_left):
    student = slice_unet(teacher.unet, student_config(teacher.unet, (64,), 2, mid_block=False)).eval()
    blocks = ("down_blocks.0.attentions.1", "up_blocks.0")
    both = StudentWithFeatures(student, teacher.unet, blocks, torch.nn.functional.mse_loss, torch.zeros(1, 24, 128))
    caught = {}
    for block in ("down_blocks.0.attentions.1", "up_blocks.3"):  # the teacher has three levels more
        module = dict(teacher.unet.named_modules())[block]
        module.register_forward_hook(lambda *of, block=block: caught.update(
            {block: of[2][0] if isinstance(of[2], tuple) else of[2]}))
    noisy, t, states = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 24, 128)
    with torch.no_grad():
        teacher.unet(noisy, t, states)
        features = both.teacher_hooks.take()
        assert torch.equal(features["up_blocks.0"], caught["up_blocks.3"])
        noise_pred, feature_loss = both(noisy, t, states, features)
        torch.testing.assert_close(noise_pred, student(noisy, t, states).sample)
        torch.testing.assert_close(feature_loss, both.matching(both.student_hooks.take(), features))
    assert feature_loss.isfinite() and feature_loss > 0
