"""Slicing, sampling and metrics against independent references."""

import json
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import TEACHER
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from common.metrics import coverage, frechet_distance, kernel_distance
from common.mini import EffNetLite0, caption_accuracy, drawn_objects, load_reader
from common.sampling import denoise, encode_images, make_scheduler, sample
from common.slicing import even_channels, slice_unet, student_config
from common.teacher import load_teacher
from data.draw_mini import Painter, annotations, plan_set


def predictions(*unets):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    hidden = torch.randn(2, 24, 128)
    with torch.no_grad():
        return [u(x, t, hidden).sample for u in unets]


def test_a_student_of_the_teachers_shape_is_the_teacher(teacher):
    student = slice_unet(teacher.unet, student_config(teacher.unet, (64, 96, 128, 160), 2)).eval()
    a, b = predictions(teacher.unet, student)
    assert (a - b).abs().max() < 1e-5


def test_even_channels_takes_equally_from_groups_heads_and_halves():
    for wide, narrow, parts in ((1280, 320, 32), (640, 352, 32), (320, 160, 8), (1024, 256, 2)):
        picked = even_channels(wide, narrow)
        counts = torch.bincount(picked // (wide // parts), minlength=parts)
        assert len(set(picked.tolist())) == narrow and (counts == narrow // parts).all()


def test_slice_keeps_both_parts_of_a_concatenated_input(teacher):
    student = slice_unet(teacher.unet, student_config(teacher.unet, (16, 32, 32, 48), 2))
    # up block 0, resnet 2 reads [160 channels from below, 128 of the skip]; the student [48, 32]
    wide = teacher.unet.up_blocks[0].resnets[2].norm1.weight
    narrow = student.up_blocks[0].resnets[2].norm1.weight
    want = torch.cat([wide[:160][even_channels(160, 48)], wide[160:][even_channels(128, 32)]])
    torch.testing.assert_close(narrow.detach(), want)
    picked = teacher.unet.conv_out.weight[:, even_channels(64, 16)] * (64 / 16) ** 0.5
    torch.testing.assert_close(student.conv_out.weight.detach(), picked)


def test_slices_of_fewer_levels_and_layers_predict(teacher):
    for channels, layers in (((32, 64, 96), 2), ((16, 32, 32, 48), 1)):
        student = slice_unet(teacher.unet, student_config(teacher.unet, channels, layers))
        assert torch.isfinite(predictions(student)[0]).all()


def test_a_level_that_is_kept_whole_computes_what_it_does_in_the_teacher(teacher):
    student = slice_unet(teacher.unet, student_config(teacher.unet, (64,), 2, mid_block=False)).eval()
    caught, hooks = {}, []
    for unet in (student, teacher.unet):
        block = unet.down_blocks[0].attentions[1]
        hooks.append(block.register_forward_hook(lambda *of, unet=unet: caught.update({unet: of[2][0]})))
    predictions(student, teacher.unet)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(caught[student], caught[teacher.unet], rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in student.parameters()) <= 0.1 * sum(p.numel() for p in teacher.unet.parameters())


def test_the_real_student_has_65_m_parameters():
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(cross_attention_dim=768)
        assert sum(p.numel() for p in sd15.parameters()) == 859_520_964
        student = UNet2DConditionModel(**student_config(sd15, (320, 352), 2, mid_block=False))
    assert sum(p.numel() for p in student.parameters()) == 64_140_964


@pytest.mark.parametrize("channels, layers", [((128, 96, 128, 160), 2), ((20, 32, 32, 48), 2), ((16,) * 5, 2),
                                              ((16, 32), 3)])
def test_impossible_students_are_refused(teacher, channels, layers):
    with pytest.raises(SystemExit, match="no slice of the teacher"):
        student_config(teacher.unet, channels, layers)


def test_a_teacher_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable was read at the import
    with pytest.raises(SystemExit, match="no diffusers pipeline folder"):
        load_teacher(str(tmp_path), torch.device("cpu"))
    with pytest.raises(SystemExit, match="--mini"):
        load_teacher("nobody/no-such-model", torch.device("cpu"))


@pytest.mark.parametrize("sampler, scheduler", [("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)])
def test_sampling_equals_diffusers_pipeline(teacher, sampler, scheduler):
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER, safety_checker=None)
    pipeline.scheduler = scheduler.from_config(teacher.noise_scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    captions = ["a large cat on the left on the grass", "a cup to the left of a clock at night"]
    theirs = pipeline(captions, num_inference_steps=6, guidance_scale=3.0, output_type="np", height=32, width=32,
                      generator=torch.Generator().manual_seed(7)).images
    ours, _ = sample(teacher.unet, teacher, captions, sampler=sampler, steps=6, guidance=3.0, seed=7, size_px=32)
    assert (ours.permute(0, 2, 3, 1).numpy() - theirs * 255).__abs__().max() <= 1


def test_keys_of_captions_are_computed_once_for_each_path(teacher, monkeypatch):
    """Two paths of one U-Net take turns, as the page's do; the reference computes everything at every step."""
    width = teacher.unet.config.cross_attention_dim
    layer = teacher.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    generator = torch.Generator().manual_seed(0)
    z, encoded = torch.randn(2, 3, 4, 8, 8, generator=generator), torch.randn(2, 3, 24, width, generator=generator)
    calls = []

    def plain(z, encoded, scheduler):
        for t in scheduler.timesteps:
            with torch.no_grad():
                z = scheduler.step(teacher.unet(z, t, encoded).sample, t, z).prev_sample
        return z

    def scheduler():
        found = make_scheduler("ddim", teacher.noise_scheduler)
        found.set_timesteps(3)
        return found

    wanted = [plain(*path, scheduler()) for path in zip(z, encoded)]
    whole = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: calls.append(self) or whole(self, x))
    both = zip(*(denoise(teacher.unet, scheduler(), *path, 1.0, None) for path in zip(z, encoded)))
    assert torch.equal(torch.stack(list(both)[-1]), torch.stack(wanted))
    assert calls.count(layer) == 2 and calls.count(teacher.unet.time_embedding.linear_1) == 6
    teacher.unet(z[0], 0, encoded[0])
    assert calls.count(layer) == 3  # outside of a path nothing is kept


def test_no_more_pixels_are_encoded_at_once_than_250_pictures_of_64_px_have():
    """By an autoencoder that takes every eighth pixel."""
    counts = []

    def encode(pixels):
        counts.append(len(pixels))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels[:, :, ::8, ::8]))

    vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, encode=encode,
                          config=SimpleNamespace(scaling_factor=2.0))
    for count, side, wanted in ((7, 512, [3, 3, 1]), (128, 64, [128])):
        counts.clear()
        images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
        latents = encode_images(vae, images)
        assert counts == wanted and torch.equal(latents, 2 * (images[:, :, ::8, ::8] / 127.5 - 1))


def test_trailing_steps_never_visit_the_timestep_before_the_first(teacher):
    """Of 61 steps diffusers makes 62: np.arange(1000, 0, -1000 / 61) has as many values."""
    visited = []

    def predict(latents, t, *_, **__):
        visited.append(int(t))
        return [torch.zeros_like(latents)]

    unet = mock.Mock(side_effect=predict, parameters=lambda: iter([torch.zeros(())]), named_modules=lambda: iter(()))
    for steps in (60, 61, 122):
        visited.clear()
        sample(unet, teacher, ["a cat"], sampler="ddim-trailing", steps=steps, guidance=1.0, size_px=32)
        assert len(visited) == steps and min(visited) >= 0 and visited == sorted(visited, reverse=True)


def test_frechet_distance_of_known_gaussians():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(3_000, 6)), generator.normal(size=(3_000, 6)) @ generator.normal(size=(6, 6)) + 1
    mean = np.sum((a.mean(0) - b.mean(0)) ** 2)
    ca, cb = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(ca)
    root = vectors * np.sqrt(values) @ vectors.T
    want = mean + np.trace(ca + cb) - 2 * np.sqrt(np.linalg.eigvalsh(root @ cb @ root)).sum()
    found = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(want, rel=1e-9)
    from pytorch_fid.fid_score import calculate_frechet_distance

    assert abs(found - calculate_frechet_distance(a.mean(0), ca, b.mean(0), cb)) / want < 1e-3


@pytest.mark.parametrize(("count", "other"), [(2, 2), (20, 30), (20, 90), (90, 80)])
def test_frechet_distance_against_torchmetrics(count, other):
    """Of fewer pictures than features, of more, and of both kinds."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(count, 50, generator=generator, dtype=torch.float64)
    b = torch.rand(other, 50, generator=generator, dtype=torch.float64) * 3
    network = torch.nn.Identity()
    network.num_features = 50
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_coverage_against_its_definition():
    rng = np.random.default_rng(0)
    real, drawn = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.5
    covered = 0
    for i in range(40):
        to_real = sorted(np.linalg.norm(real[i] - real[j]) for j in range(40) if j != i)
        covered += any(np.linalg.norm(real[i] - other) < to_real[4] for other in drawn)
    assert 0.1 < covered / 40 < 0.95
    assert coverage(torch.from_numpy(real), torch.from_numpy(drawn)) == pytest.approx(covered / 40)
    assert coverage(torch.from_numpy(real), torch.from_numpy(real)) == 1
    collapsed = torch.from_numpy(real[:1]).expand(30, -1)
    assert coverage(torch.from_numpy(real), collapsed) < 0.5


def test_kernel_distance_against_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = torch.randn(200, 16, dtype=torch.float64), torch.randn(200, 16, dtype=torch.float64) + 0.3

    def kernel(x, y):
        return (x @ y.T / 16 + 1) ** 3

    from torchmetrics.image.kid import maximum_mean_discrepancy

    want = maximum_mean_discrepancy(kernel(a, a), kernel(a, b), kernel(b, b)).item()
    assert abs(kernel_distance(a, b) - want) < 1e-9
    assert abs(poly_mmd(a, b, 3, None, 1.0).item() - want) < 1e-9


def paint(scenes) -> torch.Tensor:
    """(N, 3, 32, 32) uint8."""
    painter = Painter()
    return torch.stack([torch.from_numpy(painter.paint(scene)).permute(2, 0, 1) for scene, _ in scenes])


def test_perceptual_distance_and_features():
    network, pictures = EffNetLite0(), paint(plan_set(3))
    with torch.no_grad():
        assert network.distance(pictures, pictures).abs().max() == 0
        assert network.distance(pictures, pictures.flip(0))[0] > 0.1
        pooled, maps = network.maps(pictures)
        x = torch.nn.functional.interpolate(pictures.float(), (128, 128), mode="bilinear")
        theirs = network.net.extract_features((x - 127) / 128).mean((2, 3))
    torch.testing.assert_close(pooled, theirs, rtol=1e-3, atol=1e-3)
    assert [m.shape[1] for m in maps] == [16, 24, 40, 112, 320]


def test_the_category_reader_reads_validation_pictures(tmp_path):
    scenes = plan_set(24_600)[24_000:]  # the first 600 of data/mini's validation split
    _, instances = annotations(scenes, 24_001)
    (tmp_path / "instances.json").write_text(json.dumps(instances), "utf-8")
    objects, names = drawn_objects(tmp_path / "instances.json", list(range(24_001, 24_601)))
    reader, pictures = load_reader(TEACHER), paint(scenes)
    one, both, in_place = caption_accuracy(reader, pictures, objects)
    assert len(names) == 60 and min(one, both, in_place) >= 0.95
    swapped = caption_accuracy(reader, pictures, [o[::-1] for o in objects])
    assert swapped[1] == both and swapped[2] < 0.05  # only the last one minds the sides


def test_the_shipped_teacher_loads_as_a_stock_pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER, safety_checker=None)
    assert tuple(pipeline.unet.config.block_out_channels) == (64, 96, 128, 160)
    assert {p.dtype for m in (pipeline.unet, pipeline.text_encoder, pipeline.vae) for p in m.parameters()} == {torch.float32}
