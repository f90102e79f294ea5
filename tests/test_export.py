"""Students in other programs' forms: the original single file, ONNX, fp16."""

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TEACHER, refusal, run, run_apart, script
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.slicing import slice_unet, student_config

export = script("v3/export.py")
pruned_config = script("v3/prepare_unet_small.py").pruned_config

SLOW = pytest.mark.slow
PROMPTS = ["a cat on the grass", "a dog and a red flower in the snow"]
SHAPES = {"one level": ((16,), 2, False), "two levels": ((32, 48), 2, False), "two levels, middle": ((32, 64), 1, True),
          "three levels": ((32, 48, 64), 1, False), "whole": ((64, 96, 128, 160), 2, True)}


def save_pipeline(folder: Path, **parts) -> Path:
    """The embedded teacher with other `parts`, as a pipeline folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER, safety_checker=None, **parts)
    pipeline.save_pretrained(folder)
    return folder


def save_student(teacher, folder: Path, shape: str) -> Path:
    if shape == "sd_tiny":
        config = pruned_config(teacher.unet, "sd_tiny")
    else:
        channels, layers, mid_block = SHAPES[shape]
        config = student_config(teacher.unet, channels, layers, mid_block=mid_block)
    return save_pipeline(folder, unet=slice_unet(teacher.unet, config))


def pictures(pipeline, steps=3, guidance=3.0, **options) -> np.ndarray:
    """(2, H, W, 3) of PROMPTS, 0..255 and not rounded."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    drawn = pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np",
                     **options)
    return drawn.images * 255


def shapes_in(path: Path) -> dict[str, tuple]:
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


# --- the single file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["one level", "two levels, middle", "sd_tiny", pytest.param("two levels", marks=SLOW),
                                   pytest.param("three levels", marks=SLOW), pytest.param("whole", marks=SLOW)])
def test_the_single_file_draws_the_same_pictures(teacher, tmp_path, shape):
    folder = save_student(teacher, tmp_path / "student", shape)
    file = tmp_path / "s.safetensors"
    done = run("v3/export.py", "--model", folder, "--single-file", file)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"student", "s.safetensors"}
    theirs = StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    ours = StableDiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder"):
        expected, found = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert np.abs(pictures(ours) - pictures(theirs)).max() < 0.01  # of 255: memory's alignment alone makes 1e-4
    assert "16 here, 32 in SD-1.5" in done.stdout and "0.41183 here" in done.stdout and "warning: ComfyUI" in done.stdout


def original_unet(model_channels, multipliers, layers, depth_down, depth_up, depth_middle, context) -> dict[str, tuple]:
    """Names and shapes of CompVis' UNetModel (ldm/modules/diffusionmodules/openaimodel.py), built in its constructor's order.

    `layers` a level; of the transformers' depths, 0 for none, one a resnet: on the way down, up (from the innermost), middle.
    """
    shapes = {}

    def add(name, *shape):
        shapes[f"model.diffusion_model.{name}.weight"] = shape
        shapes[f"model.diffusion_model.{name}.bias"] = shape[:1]

    def resnet(name, wide_in, wide):
        add(f"{name}.in_layers.0", wide_in)
        add(f"{name}.in_layers.2", wide, wide_in, 3, 3)
        add(f"{name}.emb_layers.1", wide, 4 * model_channels)
        add(f"{name}.out_layers.0", wide)
        add(f"{name}.out_layers.3", wide, wide, 3, 3)
        if wide_in != wide:
            add(f"{name}.skip_connection", wide, wide_in, 1, 1)

    def transformer(name, wide, depth):
        add(f"{name}.norm", wide)
        add(f"{name}.proj_in", wide, wide, 1, 1)
        add(f"{name}.proj_out", wide, wide, 1, 1)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            for number, source in ((1, wide), (2, context)):
                attention = f"model.diffusion_model.{block}.attn{number}"
                shapes[f"{attention}.to_q.weight"] = (wide, wide)
                shapes[f"{attention}.to_k.weight"] = shapes[f"{attention}.to_v.weight"] = (wide, source)
                add(f"{block}.attn{number}.to_out.0", wide, wide)
            for number in (1, 2, 3):
                add(f"{block}.norm{number}", wide)
            add(f"{block}.ff.net.0.proj", 8 * wide, wide)
            add(f"{block}.ff.net.2", wide, 4 * wide)

    depth_down, depth_up = list(depth_down), list(depth_up)
    add("time_embed.0", 4 * model_channels, model_channels)
    add("time_embed.2", 4 * model_channels, 4 * model_channels)
    add("input_blocks.0.0", model_channels, 4, 3, 3)
    wide, number, skips = model_channels, 1, [model_channels]
    for level, multiplier in enumerate(multipliers):
        for _ in range(layers[level]):
            resnet(f"input_blocks.{number}.0", wide, multiplier * model_channels)
            wide = multiplier * model_channels
            if depth := depth_down.pop(0):
                transformer(f"input_blocks.{number}.1", wide, depth)
            skips.append(wide)
            number += 1
        if level != len(multipliers) - 1:
            add(f"input_blocks.{number}.0.op", wide, wide, 3, 3)
            skips.append(wide)
            number += 1
    if depth_middle:
        resnet("middle_block.0", wide, wide)
        transformer("middle_block.1", wide, depth_middle)
        resnet("middle_block.2", wide, wide)
    number = 0
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for layer in range(layers[level] + 1):
            resnet(f"output_blocks.{number}.0", wide + skips.pop(), multiplier * model_channels)
            wide, place = multiplier * model_channels, 1
            if depth := depth_up.pop(0):
                transformer(f"output_blocks.{number}.1", wide, depth)
                place = 2
            if level and layer == layers[level]:
                add(f"output_blocks.{number}.{place}.conv", wide, wide, 3, 3)
            number += 1
    add("out.0", wide)
    add("out.2", 4, model_channels, 3, 3)
    return shapes


def test_the_names_are_sd15s(tmp_path):
    """Of a pipeline of SD-1.5's own layout, at small widths, that diffusers reads back."""
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 64, 128, 128), cross_attention_dim=64,
                                attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(32, 64, 128, 128), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4)
    tokenizer = CLIPTokenizer.from_pretrained(TEACHER / "tokenizer")
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=827, hidden_size=64, intermediate_size=128, num_hidden_layers=12,
                                                num_attention_heads=4, bos_token_id=825, eos_token_id=826, pad_token_id=826))
    folder = save_pipeline(tmp_path / "p", unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    file = tmp_path / "s.safetensors"
    done = run("v3/export.py", "--model", folder, "--single-file", file)
    assert done.returncode == 0, done.stderr
    shapes = shapes_in(file)
    deep = original_unet(32, (1, 2, 4, 4), (2,) * 4, (1,) * 6 + (0, 0), (0,) * 3 + (1,) * 9, 1, 64)
    assert {name: shape for name, shape in shapes.items() if name.startswith("model.")} == deep
    # 686 and 248 tensors in v1-5-pruned.safetensors, and 196 beside text_model.embeddings.position_ids, which no weight is
    counts = [sum(name.startswith(part) for name in shapes) for part in ("model.", "first_stage_model.", "cond_stage_model.")]
    assert counts == [686, 248, 196] and len(shapes) == sum(counts)
    assert shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (128, 128, 1, 1)
    assert shapes["first_stage_model.decoder.up.3.upsample.conv.weight"] == (128, 128, 3, 3)
    assert shapes["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"] == (32, 64, 1, 1)
    assert shapes["first_stage_model.encoder.down.2.downsample.conv.bias"] == (128,)
    assert "first_stage_model.quant_conv.weight" in shapes and "first_stage_model.encoder.norm_out.weight" in shapes
    layer = "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight"
    assert shapes[layer] == (64, 64)
    assert "cond_stage_model.transformer.text_model.final_layer_norm.bias" in shapes
    theirs = StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    ours = StableDiffusionPipeline.from_pretrained(folder)
    assert np.abs(pictures(ours, height=64, width=64) - pictures(theirs, height=64, width=64)).max() < 0.01


def read_by_comfyui(shapes: dict[str, tuple]) -> dict[str, tuple]:
    """The U-Net that ComfyUI builds for a file: what detect_unet_config of comfy/model_detection.py counts and divides."""
    unet = {name.removeprefix("model.diffusion_model."): shape for name, shape in shapes.items()}
    model_channels, context = unet["input_blocks.0.0.weight"][0], 0

    def depth(block: str) -> int:
        transformer = f"{block}.1.transformer_blocks."
        return len({name.removeprefix(transformer).split(".")[0] for name in unet if name.startswith(transformer)})

    count = 0
    while any(name.startswith(f"input_blocks.{count}.") for name in unet):  # to the first gap
        count += 1
    layers, multipliers, depth_down, depth_up = [0], [0], [], []
    for i in range(count):
        block = f"input_blocks.{i}"
        if f"{block}.0.op.weight" in unet:
            layers.append(0)
            multipliers.append(0)
        elif f"{block}.0.in_layers.0.weight" in unet:
            layers[-1] += 1
            multipliers[-1] = unet[f"{block}.0.out_layers.3.weight"][0] // model_channels
            depth_down.append(depth(block))
            if depth(block) and not context:
                context = unet[f"{block}.1.transformer_blocks.0.attn2.to_k.weight"][1]
        depth_up.append(depth(f"output_blocks.{i}"))
    return original_unet(model_channels, multipliers, layers, depth_down, depth_up, depth("middle_block"), context)


@pytest.mark.parametrize("channels, layers, mid_block, suggested", [
    ((320, 640, 1280, 1280), 2, True, ""), ((320, 640, 1280, 1280), 1, True, ""), ((320, 640, 1280), 1, False, ""),
    ((320, 320), 2, False, ""), ((320, 640, 320), 1, True, ""), ((320,), 2, False, ""),
    ((320, 352), 2, False, "320,320"), ((320, 480, 192), 1, False, "320,640,320"), ((320, 544), 2, True, "320,640")])
def test_comfyuis_rules_take_what_export_says(teacher, channels, layers, mid_block, suggested):
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        unet = UNet2DConditionModel(**student_config(sd15, channels, layers, mid_block=mid_block))
    model = SimpleNamespace(unet=unet, vae=teacher.vae, text_encoder=teacher.text_encoder)
    weights = export.original_weights(model)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items() if name.startswith("model.")}
    objection = export.comfyui_objection(unet.config)
    assert (read_by_comfyui(shapes) == shapes) == (suggested == "") == (objection == "")
    assert objection.endswith(f"--channels {suggested} loads") or not suggested
    if suggested:
        better = dict(unet.config) | {"block_out_channels": tuple(map(int, suggested.split(",")))}
        assert export.comfyui_objection(SimpleNamespace(**better)) == ""


def test_gaps_are_where_stable_diffusion_cpp_expects_them(teacher, tmp_path):
    """The blocks of UnetModelBlock's constructor in its src/unet.hpp, tiny_unet."""
    unet = slice_unet(teacher.unet, student_config(teacher.unet, (32, 64, 128), 1, mid_block=False))
    folder, file = save_pipeline(tmp_path / "p", unet=unet), tmp_path / "s.safetensors"
    done = run("v3/export.py", "--model", folder, "--single-file", file, "--gaps")
    assert done.returncode == 0, done.stderr
    blocks = {".".join(name.split(".")[2:5]) for name in shapes_in(file) if "put_blocks" in name}
    down = ["0.0", "1.0", "1.1", "3.0", "4.0", "4.1", "6.0", "7.0", "7.1"]
    up = ["0.0", "0.1", "1.0", "1.1", "2.1", "3.0", "3.1", "4.0", "4.1", "5.2", "6.0", "6.1", "7.0", "7.1"]
    assert blocks == {f"input_blocks.{block}" for block in down} | {f"output_blocks.{block}" for block in up}
    with safe_open(file, "pt") as weights:
        last = weights.get_tensor("model.diffusion_model.output_blocks.5.2.conv.weight")
        assert torch.equal(last, unet.up_blocks[1].upsamplers[0].conv.weight)
    assert "--gaps is for sd_tiny" in refusal("v3/export.py", "--model", TEACHER, "--single-file", tmp_path / "t.safetensors",
                                              "--gaps")


# --- ONNX -------------------------------------------------------------------------------------------------------------


WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "diffusers", "transformers", "safetensors"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CARD = "---\ninference:\n  parameters:\n    num_inference_steps: 4\n    guidance_scale: 1.0\n---\n# a student of V-4\n"


def test_what_draws_onnx_needs_four_packages():
    tree = ast.parse((ROOT / "v3" / "draw_onnx.py").read_text("utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "PIL", "tokenizers"}


@pytest.mark.parametrize("shape, card", [("one level", CARD), pytest.param("three levels", "", marks=SLOW),
                                         pytest.param("whole", "", marks=SLOW)])
def test_onnx_draws_what_the_pipeline_draws(teacher, tmp_path, shape, card):
    pytest.importorskip("onnx", reason="pip install -r v3/requirements.txt")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -r v3/requirements.txt")
    folder, out = save_student(teacher, tmp_path / "student", shape), tmp_path / "onnx"
    (folder / "README.md").write_text(card, "utf-8")
    done = run("v3/export.py", "--model", folder, "--onnx", out)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"(\w+)\.onnx: differs from PyTorch by at most (\S+),", done.stdout)
    assert [name for name, _ in printed] == ["text_encoder", "unet", "vae_decoder"]
    assert all(float(difference) < 1e-3 for _, difference in printed)

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    session = onnxruntime.InferenceSession(out / "unet.onnx", providers=["CPUExecutionProvider"])
    for n, timestep in ((1, 999), (5, 3)):
        sample, captions = torch.randn(n, 4, 8, 8), torch.randn(n, 24, 128)
        with torch.no_grad():
            expected = pipeline.unet(sample, timestep, captions).sample
        found = session.run(None, {"sample": sample.numpy(), "timestep": np.array(timestep),
                                   "encoder_hidden_states": captions.numpy()})[0]
        assert np.abs(expected.numpy() - found).max() < 1e-3

    drawing = json.loads((out / "drawing.json").read_text("utf-8"))
    how = (drawing["steps"], drawing["guidance"])
    assert how == ((4, 1.0) if card else (25, 5.0))
    noise = [np.random.default_rng(seed).standard_normal((4, 8, 8), np.float32) for seed in (0, 1)]
    expected = pictures(pipeline, *how, latents=torch.from_numpy(np.stack(noise)))
    for seed, prompt in enumerate(PROMPTS):
        arguments = ("v3/draw_onnx.py", "--model", out, "--prompt", prompt, "--seed", seed, "--out", tmp_path / "p.png")
        done = run(*arguments) if seed else run_apart("-c", WITHOUT_TORCH, *arguments)
        assert done.returncode == 0, done.stderr
        found = np.asarray(Image.open(tmp_path / "p.png")).astype(float)
        assert np.abs(found - expected[seed]).max() < 2
    assert np.abs(expected[0] - expected[1]).max() > 20  # it listens to noise and prompt


@pytest.mark.parametrize("sampler, spacing", [("ddim", "leading"), ("ddim-trailing", "trailing")])
def test_what_a_single_file_cannot_say_names_the_students_own_timesteps(teacher, sampler, spacing):
    lines = export.not_in_the_file(teacher, {"sampler": sampler, "steps": 25, "guidance": 5.0})
    assert lines[-1] == f"not in the file: draw with DDIM, {spacing}, 25 steps, guidance 5"


def test_draw_onnx_never_visits_the_timestep_before_the_first(teacher, tmp_path, monkeypatch):
    """With networks that give nothing but zeros."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -r v3/requirements.txt")
    export.write_drawing(teacher, {}, tmp_path)
    visited = []

    class Session:
        def __init__(self, file, providers):
            self.outputs = np.zeros((1, 3, 32, 32) if "vae" in file else (1, 4, 8, 8), np.float32)

        def get_inputs(self):
            return [SimpleNamespace(shape=("batch", 4, 8, 8))]

        def run(self, _, inputs):
            visited.extend(int(value) for name, value in inputs.items() if name == "timestep")
            return [self.outputs]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    for steps in (4, 61):
        visited.clear()
        done = run("v3/draw_onnx.py", "--model", tmp_path, "--steps", steps, "--guidance", 1, "--out", tmp_path / "p.png")
        assert done.returncode == 0 and len(visited) == steps and min(visited) >= 0, done.stderr
    scheduler = DDIMScheduler.from_config(teacher.noise_scheduler.config)  # as a student of --progressive is drawn
    scheduler.set_timesteps(25)
    export.write_drawing(teacher, {"sampler": "ddim", "steps": 25, "guidance": 1.0}, tmp_path)
    visited.clear()
    done = run("v3/draw_onnx.py", "--model", tmp_path, "--out", tmp_path / "p.png")
    assert done.returncode == 0 and visited == scheduler.timesteps.tolist(), done.stderr


def test_the_exporter_gets_a_name_as_only_then_it_writes_more_than_2_gib(teacher, tmp_path, monkeypatch):
    """The one of torch 2.13 puts weights into files of their own where it is given a str, and raises where it is not."""
    pytest.importorskip("onnxruntime", reason="pip install -r v3/requirements.txt")
    given = []
    monkeypatch.setattr(torch.onnx, "export", lambda module, inputs, file, **_: given.append(file))
    monkeypatch.setattr(export, "largest_difference", lambda *_: (0.0, 0.0))
    export.write_networks(teacher, tmp_path)
    assert given == [str(tmp_path / f"{name}.onnx") for name in ("text_encoder", "unet", "vae_decoder")]


def test_draw_onnx_refuses_in_one_line(tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install -r v3/requirements.txt")
    assert "drawing.json" in refusal("v3/draw_onnx.py", "--model", tmp_path)
    (tmp_path / "drawing.json").write_text('{"steps": 4, "guidance": 1.0}', "utf-8")
    for place in (tmp_path / "none" / "a.png", tmp_path / "a", tmp_path / "a.txt"):  # known before it draws
        assert f"--out {place} must be a picture" in refusal("v3/draw_onnx.py", "--model", tmp_path, "--out", place)
    assert "--seed" in refusal("v3/draw_onnx.py", "--model", tmp_path, "--seed", "-1", "--out", tmp_path / "a.png")


# --- fp16, and what is refused ----------------------------------------------------------------------------------------


def test_half_is_a_pipeline_in_fp16(teacher, tmp_path):
    folder, out = save_student(teacher, tmp_path / "student", "two levels"), tmp_path / "half"
    (folder / "README.md").write_text(CARD, "utf-8")
    done = run("v3/export.py", "--model", folder, "--half", out)
    assert done.returncode == 0, done.stderr
    for path in out.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    assert len(list(out.rglob("*.safetensors"))) == 3 and (out / "README.md").read_text("utf-8") == CARD
    half = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    whole = StableDiffusionPipeline.from_pretrained(folder)
    assert type(half.scheduler) is type(whole.scheduler) and half.scheduler.config == whole.scheduler.config
    assert np.abs(pictures(half) - pictures(whole)).mean() < 1


@pytest.mark.slow
def test_all_three_at_once_are_of_the_same_weights(teacher, tmp_path):
    """--half, which rounds the weights, must not reach the others."""
    pytest.importorskip("onnxruntime", reason="pip install -r v3/requirements.txt")
    pytest.importorskip("onnx", reason="pip install -r v3/requirements.txt")
    folder = save_student(teacher, tmp_path / "run" / "student", "one level")
    done = run("v3/export.py", "--model", tmp_path / "run", "--half", tmp_path / "out" / "half", "--onnx",
               tmp_path / "out" / "onnx", "--single-file", tmp_path / "out" / "s.safetensors")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"half", "onnx", "s.safetensors"}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    with safe_open(tmp_path / "out" / "s.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.diffusion_model.input_blocks.0.0.weight"), unet.conv_in.weight)


def test_refusals_are_one_line(tmp_path):
    model = ("--model", TEACHER)
    assert "--half FOLDER" in refusal("v3/export.py", *model)
    assert "choose another --half" in refusal("v3/export.py", *model, "--half", tmp_path)
    assert "must end in .safetensors" in refusal("v3/export.py", *model, "--single-file", tmp_path / "s.ckpt")
    assert "name of its own" in refusal("v3/export.py", *model, "--half", tmp_path / "x", "--onnx", tmp_path / "x")
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "run" / "settings.json").write_text("{}", "utf-8")
    assert "--resume" in refusal("v3/export.py", "--model", tmp_path / "run", "--half", tmp_path / "h")
    assert "no diffusers pipeline folder" in refusal("v3/export.py", "--model", tmp_path, "--half", tmp_path / "h")
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        assert "pip install onnx onnxruntime" in refusal("v3/export.py", *model, "--onnx", tmp_path / "o")
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("option, name", [("--half", "h"), pytest.param("--single-file", "s.safetensors", marks=SLOW),
                                          pytest.param("--onnx", "o", marks=SLOW)])
def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk, option, name):
    if option == "--onnx":
        pytest.importorskip("onnx", reason="pip install -r v3/requirements.txt")
        pytest.importorskip("onnxruntime", reason="pip install -r v3/requirements.txt")
    disk, grow = small_disk
    arguments = ("v3/export.py", "--model", TEACHER, option, disk / name)
    assert "is full" in refusal(*arguments) and not list(disk.iterdir())
    grow()
    assert run(*arguments).returncode == 0 and [p.name for p in disk.iterdir()] == [name]
