"""What a teacher knows at a resolution, and what the students do about it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TEACHER, lines, run

from common.coco import CocoCaptions
from common.fitness import UNFIT, Fitness, blind_error, measure_fitness


def test_the_blind_guess_of_gaussian_latents_is_as_good_as_said():
    """Against the best linear guess, which numpy finds by least squares."""
    rng, mean, deviation = np.random.default_rng(0), 0.7, np.array([0.5, 1.0, 3.0])
    for a in (0.99, 0.5, 0.01):
        found = []
        for s in deviation:
            noise = rng.standard_normal(400_000)
            noisy = a**0.5 * (mean + s * rng.standard_normal(400_000)) + (1 - a) ** 0.5 * noise
            inputs = np.stack([noisy, np.ones_like(noisy)], 1)
            best = inputs @ np.linalg.lstsq(inputs, noise, rcond=None)[0]
            found.append(np.square(best - noise).mean())
        want = blind_error(torch.tensor([a]), torch.from_numpy(deviation).square())
        assert abs(np.mean(found) / want.item() - 1) < 0.01
    a = torch.tensor([0.9, 0.2])
    torch.testing.assert_close(blind_error(a, torch.ones(4)), a)


def test_knowledge_is_what_the_error_lacks_of_the_yardstick():
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    fitness = Fitness([100, 300], [0.2, 0.45], [0.8, 0.6])
    known = fitness.knowledge(scheduler)
    assert known.shape == (1000,) and known[100] == 0.75 and known[300] == 0
    torch.testing.assert_close(known[[0, 200, 999]], torch.tensor([0.75, 0.375, 0.0]))
    assert torch.equal(fitness.knowledge(scheduler, weigh=False), torch.ones(1000))
    assert fitness.unfit() == [300] and "timesteps 300; so" in fitness.warning(64, "so")
    assert all(f"--{name}" in fitness.warning(64, "so") for name in ("out FOLDER", "mini", "teacher", "data"))
    assert Fitness([100], [float("nan")], [0.6]).unfit() == [100]  # a broken teacher knows nothing
    assert Fitness([100], [0.1], [0.6]).warning(64, "so") == ""
    assert fitness.warning(64, "so", "Wait.").endswith("timesteps 300; so. Wait.")


@pytest.fixture(scope="module")
def evaluator(small_set, tmp_path_factory):
    """What `measure_fitness` reads of an Evaluator, of 16 pictures at a resolution."""
    def of(resolution):
        dataset = CocoCaptions(small_set, "val", resolution)
        return SimpleNamespace(dataset=dataset, usable=np.arange(16), folder=tmp_path_factory.mktemp("fitness"))
    return of


def test_the_embedded_teacher_is_fit_at_home_and_unfit_away(teacher, evaluator):
    home, away, large = (measure_fitness(teacher, evaluator(px)) for px in (32, 16, 64))
    ratios = {name: np.divide(f.error, f.yardstick) for name, f in (("home", home), ("away", away), ("large", large))}
    assert ratios["home"].max() < UNFIT and not home.unfit() and home.warning(32, "so") == "", ratios
    for fitness, px in ((away, 16), (large, 64)):
        assert len(fitness.unfit()) >= 3 and f"--resolution {px}" in fitness.warning(px, "so"), ratios
    assert len(home.table().splitlines()) == 4 and max(map(len, home.table().splitlines())) <= 80


@pytest.mark.slow
def test_the_error_is_that_of_the_stock_networks_and_is_kept(teacher, evaluator):
    """By diffusers' own calls, one picture at a time."""
    there = evaluator(32)
    fitness, generator = measure_fitness(teacher, there), torch.Generator().manual_seed(0)
    pixels = torch.stack([there.dataset[i] for i in range(16)]) / 127.5 - 1
    with torch.no_grad():
        latents = teacher.vae.encode(pixels).latent_dist.mode() * teacher.vae.config.scaling_factor
        for t, want in zip(fitness.timesteps, fitness.error):
            noise, error = torch.randn(latents.shape, generator=generator), 0.0
            for i in range(16):
                tokens = teacher.tokenizer(there.dataset.captions[i][0], padding="max_length", truncation=True,
                                           max_length=teacher.tokenizer.model_max_length, return_tensors="pt").input_ids
                states = teacher.text_encoder(tokens).last_hidden_state
                noisy = teacher.noise_scheduler.add_noise(latents[i : i + 1], noise[i : i + 1], torch.tensor([t]))
                error += (teacher.unet(noisy, t, states).sample - noise[i]).square().mean().item() / 16
            assert abs(error / want - 1) < 1e-3
    unet, teacher.unet = teacher.unet, None
    try:
        assert measure_fitness(teacher, there) == fitness  # from the folder
    finally:
        teacher.unet = unet


@pytest.mark.slow
@pytest.mark.parametrize("path, more", [("v2/2.2.py", ["--store", "1"]), ("v1/1.py", []), ("v3/train_student_kd.py", [])])
def test_a_run_away_from_home_says_so_and_its_card_too(path, more, small_set, cache, tmp_path):
    done = run(path, "--mini", "--resolution", "16", "--data", small_set, "--teacher", TEACHER, "--steps", "2", "--batch-size",
               "4", "--eval-every", "0", "--final-samples", "8", "--sample-steps", "2", "--cache-folder", cache, "--out",
               tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("warning: at 16 px this teacher") == 2  # at the start and below the closing table
    assert "Warning: at 16 px this teacher" in (tmp_path / "run" / "student" / "README.md").read_text("utf-8")
    (line,) = [x for x in lines(tmp_path / "run") if "yardstick" in x]
    assert line["step"] == 0 and len(line["error"]) == len(line["yardstick"]) == 8
    scores = lines(tmp_path / "run")[-1]["evaluation"]
    assert 0 <= scores["one object right"] <= 1 and np.isfinite(scores["FD(effnet-lite0) to reconstructions"])


@pytest.mark.slow
def test_kd_from_a_teacher_that_knows_nothing_is_the_noise(small_set, cache, tmp_path, monkeypatch):
    """V-2.2 with knowledge 0 at every level has V-2.1's loss, whatever alpha is."""
    monkeypatch.setattr(Fitness, "knowledge", lambda *_: torch.zeros(1000))
    done = run("v2/2.2.py", "--mini", "--data", small_set, "--teacher", TEACHER, "--steps", "3", "--batch-size", "4", "--store",
               "0", "--eval-every", "0", "--final-samples", "4", "--sample-steps", "2", "--log-every", "1", "--cache-folder",
               cache, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [x for x in lines(tmp_path / "run") if "loss" in x]
    assert len(steps) == 3 and all(x["loss"] == x["kd_loss"] == x["noise_loss"] > 0 for x in steps)
