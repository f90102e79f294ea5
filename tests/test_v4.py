"""V-4: the teacher's trajectories, what the student is trained to, and the pipeline that comes out."""

import copy

import numpy as np
import pytest
import torch
from conftest import ROOT, TEACHER, lines, process, refusal, run, script
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel

from common.coco import CocoCaptions
from common.sampling import ddim_step, sample
from common.slicing import slice_unet, student_config
from common.teacher import load_unet
from common.trainer import predict_noise

v4 = script("v4/4.py")
CAPTIONS = ["a cat", "a dog on the grass", "a pizza", "two cars", "a boat on the sea"]


def trajectories_of(teacher, folder, rank=0, processes=1, **more):
    options = dict(teacher_steps=(2, 2), guidance=3.0, side=8, batch_size=4, seed=0)
    return v4.Trajectories(teacher, CAPTIONS, folder, process(rank, processes), **options | more)


def command(small_set, cache, out, *more) -> list[str]:
    return ["v4/4.py", "--mini", "--data", str(small_set), "--teacher", str(TEACHER), "--trajectories", "12",
            "--teacher-passes", "6", "--teacher-steps", "2,2", "--passes", "2", "--also-passes", "1", "--steps", "6",
            "--batch-size", "4", "--eval-every", "4", "--eval-samples", "4", "--final-samples", "8", "--sample-steps", "2",
            "--save-every", "2", "--log-every", "1", "--cache-folder", str(cache), "--out", str(out), *more]


@pytest.mark.usefixtures("kept_in_fp32")
def test_trajectories_are_the_pipelines_own_guided_path(teacher, tmp_path):
    """Against StableDiffusionPipeline with diffusers' DPMSolverMultistepScheduler, state by state."""
    found = trajectories_of(teacher, tmp_path)
    scheduler = DPMSolverMultistepScheduler.from_config(teacher.noise_scheduler.config, final_sigmas_type="sigma_min")
    pipeline = StableDiffusionPipeline(
        vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=teacher.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    noise, path = torch.from_numpy(np.stack([v4.noise_of(i, (4, 8, 8)) for i in range(5)])), []

    def note(_, step, t, values):
        path.append(values["latents"].clone())
        return values

    pipeline(CAPTIONS, timesteps=[999, 749, 499, 176], guidance_scale=3.0, latents=noise, output_type="latent",
             callback_on_step_end=note)
    want = torch.stack([noise, path[1], path[3]], 1)
    torch.testing.assert_close(torch.from_numpy(found.states[:]).float(), want, rtol=2e-3, atol=4e-3)  # kept in fp16
    assert found.timesteps.tolist() == [999, 499]
    unet, teacher.unet = teacher.unet, None
    try:
        assert np.array_equal(trajectories_of(teacher, tmp_path).states, found.states)  # the cache's
    finally:
        teacher.unet = unet


def test_a_step_lands_where_the_samplers_does(teacher, tmp_path):
    found = trajectories_of(teacher, tmp_path)
    batch = next(batch for batch in map(found.draw, range(9)) if len(set(batch.timesteps.tolist())) == 2)
    noise_pred = torch.randn_like(batch.z)
    landed = ddim_step(batch.z, noise_pred, batch.a, batch.a_next)
    for i, t in enumerate(batch.timesteps):
        want = found.scheduler.step(noise_pred[i : i + 1], t, batch.z[i : i + 1]).prev_sample
        torch.testing.assert_close(landed[i : i + 1], want, rtol=1e-4, atol=1e-5)
    # an error of 1 in every prediction is a loss of 1, on the mean of the segments
    first, second = batch.timesteps.tolist().index(999), batch.timesteps.tolist().index(499)
    missed = ddim_step(batch.z, noise_pred + 1, batch.a, batch.a_next) - landed
    assert missed[[first, second]].square().mean().item() / found.unit == pytest.approx(1.0, rel=1e-5)


@pytest.mark.usefixtures("kept_in_fp32")
@pytest.mark.parametrize("to_one", [False, True])
def test_a_teacher_of_as_many_steps_is_its_own_student(teacher, tmp_path, to_one):
    """With guidance 1 and as many steps as passes the teacher's slice, whole, has no loss, wherever its schedule ends."""
    teacher, schedule = copy.copy(teacher), teacher.noise_scheduler
    teacher.noise_scheduler = schedule.from_config({**schedule.config, "set_alpha_to_one": to_one})
    found = trajectories_of(teacher, tmp_path, teacher_steps=(1, 1), guidance=1.0)
    student = slice_unet(teacher.unet, dict(teacher.unet.config)).eval()
    for batch in map(found.draw, range(3)):
        with torch.no_grad():
            noise_pred = predict_noise(student, batch.z, batch)
        assert (ddim_step(batch.z, noise_pred, batch.a, batch.a_next) - batch.wanted).abs().max() < 0.02


def test_passes_that_the_stock_pipeline_cannot_draw_are_refused(teacher, tmp_path):
    with pytest.raises(SystemExit, match="--passes 61"):
        trajectories_of(teacher, tmp_path, teacher_steps=(1,) * 61)


def test_a_batch_that_the_processes_cannot_share_is_refused(teacher, tmp_path):
    with pytest.raises(SystemExit, match="--batch-size must be a multiple of 3"):
        trajectories_of(teacher, tmp_path, processes=3)


def test_draws_depend_on_seed_and_step_alone_and_are_shared(teacher, tmp_path):
    whole = trajectories_of(teacher, tmp_path)
    halves = [trajectories_of(teacher, tmp_path, rank=rank, processes=2) for rank in range(2)]
    for step in (0, 5):
        batch, again = whole.draw(step), trajectories_of(teacher, tmp_path).draw(step)
        for name, one, same, *parts in zip(batch._fields, batch, again, *(half.draw(step) for half in halves)):
            assert torch.equal(one, same) and torch.equal(torch.cat(parts), one), name
        assert len({tuple(states.flatten().tolist()) for states in batch.encoder_hidden_states}) == 4  # of as many paths
    assert not torch.equal(whole.draw(0).z, whole.draw(1).z)


def test_a_batch_holds_segments_of_the_trajectories(teacher, tmp_path):
    """Each begins at a kept state, at that state's timestep, and ends at the next state of the same caption's path."""
    found = trajectories_of(teacher, tmp_path)
    states, embeddings = torch.from_numpy(np.array(found.states)).float(), torch.from_numpy(np.array(found.embeddings)).float()
    batch = found.draw(2)
    for z, wanted, encoded, t in zip(*batch[:4]):
        (row,) = [i for i in range(len(CAPTIONS)) if torch.equal(embeddings[i], encoded)]
        k = found.timesteps.tolist().index(t)
        assert torch.equal(states[row, k], z) and torch.equal(states[row, k + 1], wanted)


def test_captions_are_distinct_and_the_same_every_time(small_set):
    dataset = CocoCaptions(small_set, "train", 32)
    some = v4.some_captions(dataset, 20)
    assert len(set(some)) == 20 and some == v4.some_captions(dataset, 20) and some == v4.some_captions(dataset, 50)[:20]
    assert set(some) <= {caption for captions in dataset.captions for caption in captions}


@pytest.fixture(scope="module")
def finished(small_set, cache, tmp_path_factory):
    """(its folder, what it printed) of a short run."""
    out = tmp_path_factory.mktemp("v4") / "run"
    done = run(*command(small_set, cache, out))
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_the_stock_pipeline_draws_what_the_evaluation_draws(finished, teacher):
    """With nothing but what the card says: steps and guidance; the scheduler is the folder's."""
    out, printed = finished
    pipeline = StableDiffusionPipeline.from_pretrained(out / "student", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    card = (out / "student" / "README.md").read_text("utf-8")
    assert "pipeline(prompt, num_inference_steps=2, guidance_scale=1.0)" in card
    want = pipeline(CAPTIONS, num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(7),
                    output_type="np").images
    unet = load_unet(str(out / "student"))
    found, _ = sample(unet, teacher, CAPTIONS, sampler="ddim-trailing", steps=2, guidance=1.0, seed=7, size_px=32, batch=5)
    want = torch.from_numpy(want).permute(0, 3, 1, 2) * 255
    assert (found - want).abs().max() <= 1.01
    rows = lines(out)[-1]["passes"]
    assert list(rows) == ["teacher, 6 passes", "teacher, 4 passes", "student, 1 passes", "student, 2 passes"]
    assert rows["teacher, 4 passes"]["PD(effnet-lite0)"] == 0 < rows["teacher, 6 passes"]["PD(effnet-lite0)"]
    assert all(0 <= row["coverage"] <= 1 for row in rows.values()) and "6 passes" in printed


@pytest.mark.slow
def test_it_learns_and_resumes_bit_for_bit(finished, small_set, cache, tmp_path):
    from safetensors.torch import load_file

    out, _ = finished
    assert [x["step"] for x in lines(out) if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in lines(out) if "evaluation" in x] == [4, 6]
    weights = "student/unet/diffusion_pytorch_model.safetensors"
    want = load_file(out / weights)
    for file in (out / "checkpoint-00000006").iterdir():
        file.unlink()
    done = run(*command(small_set, cache, out, "--resume"))
    assert done.returncode == 0 and "going on at step 4" in done.stdout, done.stderr[-2000:]
    found = load_file(out / weights)
    assert all(torch.equal(want[name], found[name]) for name in want)


@pytest.mark.slow
def test_it_goes_on_from_another_student(finished, small_set, cache, tmp_path):
    done = run(*command(small_set, cache, tmp_path / "more", "--start", finished[0], "--teacher-passes", ""))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "more" / "student" / "model_index.json").is_file()


@pytest.mark.parametrize("passes, more", [("7", []), ("1002", ["--guidance", "1"])])
def test_passes_that_the_teacher_cannot_draw_in_are_refused(small_set, cache, tmp_path, passes, more):
    line = refusal(*command(small_set, cache, tmp_path / "out", "--teacher-passes", passes, *more))
    assert "--teacher-passes must be" in line and not (tmp_path / "out").exists()


def test_a_student_of_another_text_encoders_is_refused(teacher, small_set, cache, tmp_path):
    config = student_config(teacher.unet, (16,), 1, mid_block=False) | {"cross_attention_dim": 64}
    UNet2DConditionModel(**config).save_pretrained(tmp_path / "other" / "unet")
    line = refusal(*command(small_set, cache, tmp_path / "out", "--start", tmp_path / "other"))
    assert "no student of this teacher's" in line and not (tmp_path / "out").exists()
    line = refusal("common/evaluate.py", "--mini", "--data", small_set, "--model", tmp_path / "other", "--samples", "8",
                   "--sample-steps", "2", "--no-bounds", "--cache-folder", cache)
    assert "takes captions 64 wide, the teacher's text encoder gives 128" in line


@pytest.mark.slow
def test_the_log_keeps_both_of_the_teachers_rows_in_as_many_passes(small_set, cache, tmp_path):
    done = run(*command(small_set, cache, tmp_path / "run", "--teacher-passes", "4", "--eval-every", "0", "--steps", "2"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = lines(tmp_path / "run")[-1]["passes"]
    assert list(rows)[:2] == ["teacher, 4 passes", "teacher, 4 passes, ddpm"]
    assert rows["teacher, 4 passes"]["PD(effnet-lite0)"] > 0 == rows["teacher, 4 passes, ddpm"]["PD(effnet-lite0)"]


@pytest.mark.slow
def test_mistakes_get_one_line(small_set, cache, tmp_path):
    assert "each of --passes" in refusal(*command(small_set, cache, tmp_path / "a", "--passes", "3"))
    assert "no diffusers pipeline folder" in refusal(*command(small_set, cache, tmp_path / "b", "--start", str(ROOT / "docs")))
    assert "more than the 12 captions" in refusal(*command(small_set, cache, tmp_path / "c", "--batch-size", "40"))


@pytest.mark.slow
def test_other_commands_know_its_steps_from_the_folder(finished, small_set, cache, tmp_path):
    out, _ = finished
    done = run("v3/inference.py", "--model", out, "--prompt", "a cat", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0 and "2 ddim-trailing steps, guidance 1" in done.stdout, done.stderr[-2000:]
    done = run("v3/inference.py", "--model", out, "--prompt", "a cat", "--steps", "3", "--device", "cpu", "--out", tmp_path)
    assert "3 ddim-trailing steps, guidance 1" in done.stdout
    done = run("v3/inference.py", "--model", TEACHER, "--prompt", "a cat", "--steps", "2", "--device", "cpu", "--out", tmp_path)
    assert "2 ddim steps, guidance 5" in done.stdout
    done = run("common/evaluate.py", "--mini", "--data", small_set, "--model", out, "--samples", "8", "--sample-steps", "2",
               "--no-bounds", "--cache-folder", cache)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "run: 8 samples, 2 DDIM-TRAILING steps, guidance 1" in done.stdout
    assert "teacher: 8 samples, 2 DDPM steps, guidance 3" in done.stdout
    scores = [line["evaluation"] for line in lines(out) if "evaluation" in line][-1]
    assert f"{scores['FD(effnet-lite0) to reconstructions']:.4g}" in done.stdout  # the run's own last figure
