"""V-1's formulas: chains, progressive distillation on a known Gaussian, feature matching."""

import pytest
import torch
from conftest import script
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from common.features import ConvProjection, FeatureMatching
from common.teacher import slice_unet, spread, student_config

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


@pytest.mark.parametrize("stride", [40, 8, 4])
def test_two_steps_of_a_known_gaussian_have_their_closed_form(teacher, stride):
    """For x_0 ~ N(0, s^2) the best noise prediction is sigma z / v with v = alpha^2 s^2 + sigma^2, so a DDIM step
    multiplies z by (alpha alpha' s^2 + sigma sigma') / v."""
    abar, s2 = teacher.noise_scheduler.alphas_cumprod.double(), 0.7**2

    def parts(t):
        a = abar[t.clamp(min=0)].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def factor(t, t_next):
        (alpha, sigma), (alpha_next, sigma_next) = parts(t), parts(t_next)
        return (alpha * alpha_next * s2 + sigma * sigma_next) / (alpha**2 * s2 + sigma**2)

    def best(z, t, hidden):
        alpha, sigma = parts(t)
        return sigma * z / (alpha**2 * s2 + sigma**2)

    t = v1.chain_timesteps(teacher.noise_scheduler, 1000 // stride)
    z = torch.randn(len(t), 4, 2, 2, dtype=torch.float64)
    target = v1.two_step_target(best, z, t, None, stride, abar)
    z_end = factor(t, t - stride // 2) * factor(t - stride // 2, t - stride) * z
    alpha, sigma = parts(t)
    alpha_end, sigma_end = parts(t - stride)
    x0 = (z_end - sigma_end / sigma * z) / (alpha_end - sigma_end / sigma * alpha)
    assert torch.allclose(target, (z - alpha * x0) / sigma, rtol=1e-9, atol=1e-9)
    one_step = v1.ddim_step(z, target, alpha**2, alpha_end**2)
    assert torch.allclose(one_step, z_end, rtol=1e-7, atol=1e-9)


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
    assert torch.equal(projection(features)[:, spread(8, 4)], features)


def test_a_sliced_students_features_start_nearer_to_the_teachers_than_random_ones(teacher):
    config = student_config(teacher.unet, (32, 48, 64, 80), 2)
    torch.manual_seed(0)
    students = {"sliced": slice_unet(teacher.unet, config), "random": UNet2DConditionModel(**config)}
    noisy, t, hidden = torch.randn(8, 4, 8, 8), torch.randint(1000, (8,)), torch.randn(8, 24, 128)
    distance = {}
    for name, student in students.items():
        matching = FeatureMatching(student.eval(), teacher.unet, ("down_blocks.0", "up_blocks.3"), torch.nn.functional.mse_loss)
        with torch.no_grad():
            teacher.unet(noisy, t, hidden), student(noisy, t, hidden)
        distance[name] = []
        for block in matching.pairs:
            ours, theirs = matching.caught["student", block], matching.caught["teacher", block]
            theirs = theirs[:, spread(theirs.shape[1], ours.shape[1])]  # projected by the map that ConvProjection starts as
            distance[name].append(1 - torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0).item())
        for unet in (student, teacher.unet):
            for module in unet.modules():
                module._forward_hooks.clear()
    assert all(s < 0.9 * r for s, r in zip(distance["sliced"], distance["random"])), distance


def test_feature_loss_of_a_network_with_itself_is_zero_and_in_the_teachers_units(teacher):
    student = slice_unet(teacher.unet, dict(teacher.unet.config)).eval()
    matching = FeatureMatching(student, teacher.unet, ("mid_block", "up_blocks.1.resnets.0"), torch.nn.functional.mse_loss)
    noisy, t, hidden = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 24, 128)
    with torch.no_grad():
        student(noisy, t, hidden), teacher.unet(noisy, t, hidden)
        matching.build()
        assert matching().item() < 1e-8
        student(noisy, t, hidden), teacher.unet(noisy, t, hidden)
        for block in matching.pairs:
            matching.caught["student", block] = torch.zeros_like(matching.caught["student", block])
        assert abs(matching().item() - 1) < 1e-4  # nothing at all is one unit away
    for module in teacher.unet.modules():
        module._forward_hooks.clear()
