"""Other people's teachers, and what the caches, the saved student and its card depend on."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, run
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPTextModel

from common import cache
from common.cache import TrainingPairs, cache_key
from common.coco import CocoCaptions
from common.metrics import Evaluator
from common.report import copy_weights, licence_of, model_card
from common.sampling import make_scheduler
from common.teacher import load_teacher, load_unet

CPU = torch.device("cpu")
FOLDER = ROOT / "checkpoints" / "mini-teacher"
WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
           "text_encoder": "model.safetensors"}


def copy_teacher(folder: Path) -> Path:
    return Path(shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("evaluation", "*.png", "README.md")))


def edit_json(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(SystemExit) as stop:
        load_teacher(str(folder), CPU)
    line = str(stop.value.code)
    assert line.startswith("error: ") and "\n" not in line
    return line


# ---- teachers that are refused, each in one line ----


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["prefixed", "one missing", "other shape", "cut"])
def test_a_part_whose_weights_are_not_all_there_is_refused(tmp_path, part, damage):
    path = copy_teacher(tmp_path / "t") / part / WEIGHTS[part]
    weights = load_file(path)
    first = sorted(name for name in weights if name.endswith(".weight"))[0]
    if damage == "prefixed":
        weights = {"model.inner." + name: value for name, value in weights.items()}
    elif damage == "one missing":
        del weights[first]
    elif damage == "other shape":
        weights[first] = torch.cat([weights[first]] * 2)
    save_file(weights, path, {"format": "pt"})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    line = refusal(tmp_path / "t")
    assert part in line
    if damage == "prefixed":
        assert f"{len(weights)} that it does not know, such as model.inner." in line
    if damage == "one missing":
        assert "lacks 1 of its weights" in line and first in line


def test_a_weight_too_many_is_no_fault(tmp_path):
    """Stable Diffusion's older files hold position_ids, which the text encoder no longer keeps."""
    path = copy_teacher(tmp_path / "t") / "text_encoder" / WEIGHTS["text_encoder"]
    weights = load_file(path) | {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    save_file(weights, path, {"format": "pt"})
    assert load_teacher(str(tmp_path / "t"), CPU).text_encoder.config.hidden_size == 128


def test_an_autoencoder_with_the_older_names_of_attention_loads_whole(tmp_path):
    """SD-1.5's autoencoder on the hub names its attention's weights query, key, value and proj_attn."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2)
    vae.save_pretrained(tmp_path / "t" / "vae")
    path = tmp_path / "t" / "vae" / WEIGHTS["vae"]
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(path).items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = value
    assert any(".query." in name for name in renamed)
    save_file(renamed, path, {"format": "pt"})
    from common.teacher import load_part

    loaded = load_part(AutoencoderKL, str(tmp_path / "t"), "vae").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in vae.state_dict().items())


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    folder = copy_teacher(tmp_path / "none")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(folder)
    folder = copy_teacher(tmp_path / "other")
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    rows = content["model"]["vocab"]
    last = max(rows.values())
    rows |= {f"more{k}": last + 1 + k for k in range(10)}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert "tokens, its text encoder" in refusal(folder)


def test_an_inpainting_unet_is_refused(tmp_path):
    folder = copy_teacher(tmp_path / "t")
    path = folder / "unet" / WEIGHTS["unet"]
    weights = load_file(path)
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, first.new_zeros(first.shape[0], 5, 3, 3)], 1)
    save_file(weights, path, {"format": "pt"})
    edit_json(folder / "unet" / "config.json", in_channels=9)
    assert "in_channels 9" in refusal(folder)


def test_a_consistency_model_is_refused(tmp_path):
    """An LCM's U-Net takes the guidance scale as an embedding, which its pipeline makes and no script here does."""
    config = {"sample_size": 8, "block_out_channels": (32, 32), "norm_num_groups": 8, "cross_attention_dim": 8,
              "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    for name, more in (("plain", {}), ("lcm", {"time_cond_proj_dim": 16})):
        UNet2DConditionModel(**config, **more).save_pretrained(tmp_path / name / "unet")
    assert load_unet(str(tmp_path / "plain")).config.sample_size == 8
    with pytest.raises(SystemExit, match="^error: .* another family"):
        load_unet(str(tmp_path / "lcm"))


@pytest.mark.parametrize("file, values, said", [
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "ends at noise alone"),
    ("unet/config.json", {"use_linear_projection": True}, "unet"),
    ("text_encoder/config.json", {"num_hidden_layers": 3}, "text_encoder lacks"),
])
def test_what_cannot_be_a_stable_diffusion_1_teacher_is_refused(tmp_path, file, values, said):
    folder = copy_teacher(tmp_path / "t")
    edit_json(folder / file, **values)
    assert said in refusal(folder)


@pytest.mark.parametrize("kind, options", [
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True, "timestep_type": "continuous"}),
    (DEISMultistepScheduler, {}),
], ids=["dpm++", "euler", "deis"])
def test_the_sampler_in_a_teachers_folder_does_not_matter(tmp_path, kind, options):
    """As many a fine-tuned Stable Diffusion comes with one: only its noise schedule is the teacher's."""
    stock = DDPMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    betas = {name: stock.config[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    kind(**betas, **options).save_pretrained(tmp_path / "scheduler")
    noise_scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler", clip_sample=False, steps_offset=1)
    found, want = (make_scheduler("dpm++", kept, final_sigmas_type="zero") for kept in (noise_scheduler, stock))
    for scheduler in (found, want):
        scheduler.set_timesteps(timesteps=[999, 600, 300, 100])
    assert torch.equal(found.sigmas, want.sigmas) and torch.equal(found.timesteps, want.timesteps)
    latents = torch.ones(1, 4, 2, 2)
    for t in want.timesteps:
        after = found.step(0.1 * latents, t, latents).prev_sample
        assert torch.equal(after, want.step(0.1 * latents, t, latents).prev_sample)
        latents = after


def test_a_config_that_is_no_json_is_one_line(tmp_path):
    folder = copy_teacher(tmp_path / "t")
    (folder / "unet" / "config.json").write_text("{", "utf-8")
    assert "unet" in refusal(folder)


def test_a_teacher_in_half_precision_alone_is_taken_and_one_in_pickles_is_told_the_cure(tmp_path):
    folder = copy_teacher(tmp_path / "half")
    for part, name in WEIGHTS.items():
        stem = name.removesuffix(".safetensors")
        (folder / part / name).rename(folder / part / f"{stem}.fp16.safetensors")
    plain, half = load_teacher(str(FOLDER), CPU), load_teacher(str(folder), CPU)
    for part in WEIGHTS:
        want = getattr(plain, part).state_dict()
        assert all(torch.equal(want[name], value) for name, value in getattr(half, part).state_dict().items())
    (tmp_path / "pickles" / "unet").mkdir(parents=True)
    torch.save({}, tmp_path / "pickles" / "unet" / "diffusion_pytorch_model.bin")
    shutil.copy(FOLDER / "unet" / "config.json", tmp_path / "pickles" / "unet")
    with pytest.raises(SystemExit, match="use_safetensors=False"):
        load_unet(str(tmp_path / "pickles"))


# ---- what a cached thing depends on ----


def change_weight(folder: Path, part: str):
    path = folder / part / WEIGHTS[part]
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] += 1
    save_file(weights, path, {"format": "pt"})


CHANGES = {  # of a teacher's folder, and the parts whose fingerprint must change
    "unet weight": (lambda f: change_weight(f, "unet"), "unet"),
    "vae weight": (lambda f: change_weight(f, "vae"), "vae"),
    "text encoder weight": (lambda f: change_weight(f, "text_encoder"), "text_encoder"),
    "unet config": (lambda f: edit_json(f / "unet" / "config.json", norm_eps=1e-4), "unet"),
    "vae config": (lambda f: edit_json(f / "vae" / "config.json", scaling_factor=0.5), "vae"),
    "text encoder config": (lambda f: edit_json(f / "text_encoder" / "config.json", layer_norm_eps=1e-3), "text_encoder"),
    "tokenizer length": (lambda f: edit_json(f / "tokenizer" / "tokenizer_config.json", model_max_length=20), "tokenizer"),
    "schedule": (lambda f: edit_json(f / "scheduler" / "scheduler_config.json", beta_schedule="linear"), "noise_scheduler"),
    "nothing": (lambda f: None, None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_teachers_dependencies_are_in_the_keys(tmp_path, teacher, change):
    folder = copy_teacher(tmp_path / "t")
    edit, changed = CHANGES[change]
    edit(folder)
    other = load_teacher(str(folder), CPU)
    for kind, parts in cache.DEPENDS_ON.items():
        assert (cache_key(kind, teacher) == cache_key(kind, other)) == (changed not in parts), (kind, change)


def test_precision_options_and_the_codes_format_are_in_the_keys(teacher, monkeypatch):
    half = load_teacher(str(FOLDER), CPU, torch.bfloat16)
    key = cache_key("pairs", teacher)
    assert key != cache_key("pairs", half) and key != cache_key("pairs", teacher, "set")
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert key != cache_key("pairs", teacher)


def touch_up(file: Path):
    """Another picture of the same name and, for a bitmap, size."""
    pixels = 255 - np.asarray(Image.open(file).convert("RGB"))
    size, stat = file.stat().st_size, file.stat()
    Image.fromarray(pixels).save(file, "BMP")
    return size, stat


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_replaced_picture_of_the_same_size_is_seen(small_set, teacher, tmp_path, split):
    root = Path(shutil.copytree(small_set, tmp_path / "set"))
    files = sorted((root / split).iterdir())
    for file in files:
        touch_up(file)  # all are bitmaps now, so of one size
    accelerator, sampling = Accelerator(cpu=True), dict(sampler="ddim", steps=1, guidance=1.0, seed=0, size_px=32, batch=4)

    def computed():
        data = CocoCaptions(root, split, 32)
        if split == "train":
            pairs = TrainingPairs(data, teacher, tmp_path / "cache", accelerator, batch_size=4, seed=0, caption_gb=0)
            return pairs.latents[0][5]
        evaluator = Evaluator("effnet-lite0", data, teacher, tmp_path / "cache", accelerator, sampling)
        return evaluator.reference("image features", len(data))[5].numpy()

    before = np.array(computed())
    size = files[5].stat().st_size
    touch_up(files[5])
    assert files[5].stat().st_size == size
    assert not np.allclose(before, computed(), atol=1e-3)


def test_captions_are_in_the_key(small_set, teacher, tmp_path):
    root = Path(shutil.copytree(small_set, tmp_path / "set"))
    key = CocoCaptions(root, "train", 32).fingerprint()
    annotations = root / "annotations" / "captions_train.json"
    annotations.write_text(annotations.read_text("utf-8").replace('"caption": "a', '"caption": "one', 1), "utf-8")
    assert CocoCaptions(root, "train", 32).fingerprint() != key


# ---- validation pictures, too few of them ----


def test_validation_pictures_that_cannot_be_decoded_are_counted_and_too_few_are_refused(small_set, teacher, tmp_path):
    root = Path(shutil.copytree(small_set, tmp_path / "set"))
    files = sorted((root / "val").iterdir())
    for file in files[::2]:
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    accelerator, sampling = Accelerator(cpu=True), dict(sampler="ddim", steps=1, guidance=1.0, seed=0, size_px=32, batch=4)

    def evaluator(**more):
        val_set = CocoCaptions(root, "val", 32)
        return Evaluator("effnet-lite0", val_set, teacher, tmp_path / "cache", accelerator, sampling, **more)

    with pytest.raises(SystemExit, match="8 of 16 pictures of val cannot be used: 8 cannot be decoded"):
        evaluator(max_broken=0.05)
    kept = evaluator(max_broken=0.5)
    assert kept.describe().startswith("8 validation pictures (left out: 8 cannot be decoded")
    want = CocoCaptions(root, "val", 32)
    assert kept.captions == [captions[0] for captions in want.captions[1::2]]
    for file in files[3::2]:
        file.write_bytes(b"")
    with pytest.raises(SystemExit, match="only 1 pictures of .*val can be used"):
        evaluator(max_broken=1.0)


# ---- the saved student and its card ----


def test_only_what_a_stock_pipeline_loads_is_copied_bit_for_bit(tmp_path):
    source = tmp_path / "vae"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "model.fp16.safetensors", "model.bin", "flax_model.msgpack"):
        (source / name).write_bytes(name.encode())
    copy_weights(source, tmp_path / "both")
    assert sorted(f.name for f in (tmp_path / "both").iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "both" / "model.safetensors").read_bytes() == b"model.safetensors"
    (source / "model.safetensors").unlink()
    copy_weights(source, tmp_path / "half")
    assert (tmp_path / "half" / "model.safetensors").read_bytes() == b"model.fp16.safetensors"


def card_of(teacher_name: str) -> ModelCard:
    scores = {"parameters": 5, "FID": 1.5, "one object right": float("nan")}
    val_set = SimpleNamespace(root=Path("/somewhere/private/photos"), split="val", size_px=64)
    return model_card("V-2.2", teacher_name, val_set, scores, {"FID": 1.0}, "8 samples")


def test_the_card_says_what_is_true_of_teacher_and_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    card = card_of(str(FOLDER))
    assert card.data.license == "cc-by-sa-4.0" == licence_of(str(FOLDER)) and card.data.base_model is None
    folder = copy_teacher(tmp_path / "mine")
    card = card_of(str(folder))
    assert card.data.license is None and card.data.base_model is None and card.data.datasets is None
    assert "openrail" not in str(card) and "coco" not in str(card) and str(tmp_path) not in str(card)
    assert "/somewhere" not in str(card) and "photos" in str(card) and "`mine`" in str(card)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("FID", 1.5, "photos (val)")
    monkeypatch.setattr("common.report.licence_of", lambda name: "creativeml-openrail-m")
    card = card_of("somebody/sd-1-5")
    assert card.data.base_model == "somebody/sd-1-5" and card.data.license == "creativeml-openrail-m"


# ---- drawing: prompts, sizes, folders ----


def infer(*arguments):
    return run("v3/inference.py", "--model", FOLDER, "--steps", "1", "--device", "cpu", *arguments)


def test_a_tiny_autoencoder_decodes_what_the_pipeline_drew(tmp_path):
    few = (8,) * 3  # levels: a factor of 4, as the embedded teacher's
    blocks = dict(num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    tiny = AutoencoderTiny(encoder_block_out_channels=few, decoder_block_out_channels=few, **blocks).eval()
    tiny.save_pretrained(tmp_path / "tiny")
    done = infer("--prompt", "a cat", "--tiny-vae", tmp_path / "tiny", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-1500:]
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    latents = pipeline("a cat", num_inference_steps=1, guidance_scale=5.0, height=32, width=32, output_type="latent",
                       generator=torch.Generator().manual_seed(0)).images
    with torch.no_grad():
        want = (tiny.decode(latents).sample[0] * 127.5 + 127.5).clamp(0, 255)
    found = pil_to_tensor(Image.open(tmp_path / "out" / "00000.png"))
    assert (found - want).abs().max() <= 1
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")  # its factor is 8
    for wrong, why in ((tmp_path / "taesd", "latents of another shape"), (tmp_path / "none", "is not there")):
        done = infer("--prompt", "a cat", "--tiny-vae", wrong, "--out", tmp_path / "out")
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith("error: ") and why in last


def test_prompts_of_a_windows_editor_draw_what_they_say(tmp_path):
    prompts = ["a cat on the grass", "a dog at night"]
    for name, encoding in (("plain", "utf-8"), ("bom", "utf-8-sig"), ("utf16", "utf-16")):
        (tmp_path / f"{name}.txt").write_bytes("\r\n".join(prompts).encode(encoding))
        done = infer("--prompts", tmp_path / f"{name}.txt", "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr[-1500:]
    for name in ("bom", "utf16"):
        for k in range(2):
            assert (tmp_path / name / f"{k:05d}.png").read_bytes() == (tmp_path / "plain" / f"{k:05d}.png").read_bytes()


@pytest.mark.parametrize("arguments, said", [
    (("--prompt", "a cat", "--size-px", "36"), "multiple of 8"), (("--prompt", "a cat", "--out", ROOT / "LICENSE"), "--out"),
    (("--prompt", "a cat", "--model", "nowhere/at-all/x"), "nowhere/at-all/x"), (("--prompt", ""), "--prompt"),
    (("--prompt", "a cat", "--seed", str(2**32)), "--seed"),
    (("--prompt", "a cat", "--sampler", "ddim-trailing", "--steps", "61"), "--steps 61"),
    (("--prompt", "a cat", "--steps", "1000"), "0..999"),
])
def test_a_mistake_in_drawing_is_one_line(tmp_path, arguments, said):
    done = infer("--out", tmp_path / "x", *arguments)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and said in last and "Traceback" not in done.stderr, done.stderr[-1500:]


def test_text_that_is_no_unicode_is_one_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes("ein Löwe\n".encode("latin-1"))
    done = infer("--prompts", tmp_path / "latin.txt", "--out", tmp_path / "x")
    assert done.returncode == 1 and "UTF-8" in done.stderr and "Traceback" not in done.stderr


def test_the_classes_that_the_parts_load_as_are_the_stock_ones(teacher):
    assert isinstance(teacher.unet, UNet2DConditionModel) and isinstance(teacher.text_encoder, CLIPTextModel)
    assert os.path.isdir(teacher.folder())
