"""Write a student, or any Stable Diffusion 1.x pipeline folder, in forms that other programs load. Each option is one:

    python v3/export.py --model checkpoints/v2.2 --half student-fp16                        # a pipeline folder in fp16
    python v3/export.py --model checkpoints/v2.2 --single-file student.safetensors          # CompVis' original layout
    python v3/export.py --model checkpoints/v2.2 --onnx student-onnx                        # for v3/draw_onnx.py, without torch

The single file numbers its blocks without gaps, whatever the levels and layers (--gaps: as stable-diffusion.cpp wants them).
It has names and tensors only: the numbers of groups, heads and steps and the noise schedule are not in it. diffusers takes them
from a folder: StableDiffusionPipeline.from_single_file("student.safetensors", config="checkpoints/v2.2/student",
local_files_only=True). Other programs assume SD-1.5's, and some load few shapes; what stands in the way is printed.
"""

import importlib.util
import json
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

from common.files import full_disk_is_one_line, make_folder, make_readable, model_place, put_in_place, write_atomically
from common.report import drawn_with
from common.sampling import make_scheduler
from common.settings import parse, require, start
from common.teacher import Teacher, load_teacher

# isort: split
from diffusers import StableDiffusionPipeline
from safetensors.torch import save
from tokenizers import Tokenizer


@dataclass
class Settings:
    model: str = "checkpoints/v2.2"  # a run's folder, a pipeline folder or a hub id
    half: str = ""  # the pipeline folder to write, in fp16
    single_file: str = ""  # the .safetensors file to write, in the layout of CompVis' Stable Diffusion
    gaps: bool = False  # number --single-file's blocks as stable-diffusion.cpp expects of sd_tiny (320,640,1280)
    onnx: str = ""  # the folder to write, of ONNX files and what it takes to draw with them


# --- the single file --------------------------------------------------------------------------------------------------

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_ENDS = {"conv_in": "conv_in", "mid_block.resnets.0": "mid.block_1", "mid_block.attentions.0": "mid.attn_1",
            "mid_block.resnets.1": "mid.block_2", "conv_norm_out": "norm_out", "conv_out": "conv_out"}


def unet_places(unet, gaps: bool = False) -> dict[str, str]:
    """The original name of every part of a U-Net. Each resnet, with its attention, is a block of its own, and so is a
    downsampler; an upsampler belongs to the block before it.

    `gaps`: three blocks a level, even where there is one layer, and an upsampler has its own: what a conversion with SD-1.5's
    numbers written into it makes of sd_tiny, and what stable-diffusion.cpp expects (src/unet.hpp, tiny_unet).
    """
    places = dict(UNET)
    pitch = 3 if gaps else unet.config.layers_per_block + 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{1 + pitch * i + j}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{1 + pitch * i + j}.1"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{pitch * (i + 1)}.0.op"
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{pitch * i + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{pitch * i + j}.1"
        behind = 2 if hasattr(block, "attentions") and not (gaps and i == 0) else 1
        places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{pitch * (i + 1) - 1}.{behind}"
    return places


def vae_places(vae) -> dict[str, str]:
    """The original name of every part of an autoencoder, whose decoder counts its levels from the outermost."""
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(vae.config.block_out_channels)
    for part, way in (("encoder", "down"), ("decoder", "up")):
        for ours, theirs in VAE_ENDS.items():
            places[f"{part}.{ours}"] = f"{part}.{theirs}"
        for i, block in enumerate(vae.get_submodule(f"{part}.{way}_blocks")):
            level = i if part == "encoder" else levels - 1 - i
            for j in range(len(block.resnets)):
                places[f"{part}.{way}_blocks.{i}.resnets.{j}"] = f"{part}.{way}.{level}.block.{j}"
            places[f"{part}.{way}_blocks.{i}.{way}samplers.0"] = f"{part}.{way}.{level}.{way}sample"
    return places


def located(name: str, places: dict[str, str]) -> tuple[str, str]:
    """(the original name of the part that the weight `name` is in, the rest of its name)."""
    part = next(part for part in places if name.startswith(f"{part}."))
    return places[part], name.removeprefix(f"{part}.")


def renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name  # within a transformer the names are the original ones


def original_weights(model: Teacher, gaps: bool = False) -> dict[str, torch.Tensor]:
    """All weights, contiguous, under the names of CompVis' Stable Diffusion."""
    weights = {}
    places = unet_places(model.unet, gaps)
    for name, weight in model.unet.state_dict().items():
        place, rest = located(name, places)
        weights[f"model.diffusion_model.{place}.{renamed(rest, RESNET)}"] = weight.contiguous()
    places = vae_places(model.vae)
    for name, weight in model.vae.state_dict().items():
        place, rest = located(name, places)
        if place.endswith("attn_1") and weight.ndim == 2:
            weight = weight[:, :, None, None]  # there a convolution of one pixel
        weights[f"first_stage_model.{place}.{renamed(rest, VAE)}"] = weight.contiguous()
    for name, weight in model.text_encoder.state_dict().items():
        name = name.removeprefix("text_model.")  # which transformers 5.6 dropped
        weights[f"cond_stage_model.transformer.text_model.{name}"] = weight.contiguous()
    return weights


def not_in_the_file(model: Teacher, how: dict) -> list[str]:
    """What the single file cannot say and other programs take as in SD-1.5: a line for each point where it differs."""
    unet, vae = model.unet.config, model.vae.config
    differs = {"GroupNorm groups": (unet.norm_num_groups, 32), "attention heads": (unet.attention_head_dim, 8),
               "autoencoder's scaling factor": (vae.scaling_factor, 0.18215),
               "autoencoder's widths": (tuple(vae.block_out_channels), (128, 256, 512, 512)),
               "text encoder's layers": (model.text_encoder.config.num_hidden_layers, 12)}
    lines = [f"not in the file: {name}, {ours} here, {theirs} in SD-1.5" for name, (ours, theirs) in differs.items()
             if ours != theirs]
    if how:
        spacing = "trailing" if how.get("sampler") == "ddim-trailing" else "leading"
        few = f"DDIM, {spacing}, {how['steps']} steps, " if "steps" in how else ""
        lines.append(f"not in the file: draw with {few}guidance {how['guidance']:g}")
    return lines


def comfyui_objection(config) -> str:
    """Why ComfyUI does not load a U-Net of this config; "" where it does. Its comfy/supported_models.py knows SD-1.x by two
    widths, and its comfy/model_detection.py divides a level's width by the first one's, without a remainder."""
    widths, captions = list(config.block_out_channels), config.cross_attention_dim
    first = widths[0]
    if (first, captions) != (320, 768):
        return f"it expects a first level of 320 channels and captions 768 wide, here {first} and {captions}"
    loads = [first * max(1, round(width / first)) for width in widths]
    if loads == widths:
        return ""
    ours, theirs = (",".join(map(str, channels)) for channels in (widths, loads))
    return f"it reads each width as a multiple of the first and so misreads {ours}; a student with --channels {theirs} loads"


def is_sd_tiny(config) -> bool:
    """Whether it has the levels that stable-diffusion.cpp builds for a U-Net without a middle block."""
    first = config.block_out_channels[0]
    widths = (first, 2 * first, 4 * first)
    return tuple(config.block_out_channels) == widths and config.layers_per_block == 1 and config.mid_block_type is None


# --- ONNX -------------------------------------------------------------------------------------------------------------


class Function(nn.Module):
    """A function of a network and tensors as the module that torch.onnx.export takes."""

    def __init__(self, network: nn.Module, function):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *inputs):
        return self.function(self.network, *inputs)


def encode(text_encoder, input_ids):
    return text_encoder(input_ids)[0]  # (n, tokens, width)


def predict(unet, sample, timestep, encoder_hidden_states):
    return unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def decode(vae, latents):
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]  # (n, 3, H, W) in -1..1


@torch.no_grad()
def largest_difference(network: nn.Module, path: Path, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Between PyTorch's output and ONNX Runtime's: absolute, and as a share of the largest output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = network(*inputs.values())
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    difference = (expected - torch.from_numpy(found)).abs().max()
    return difference.item(), (difference / expected.abs().max()).item()


def write_networks(model: Teacher, folder: Path):
    """Write the three networks, for pictures of the trained size and any batch.

    Raises SystemExit where ONNX Runtime computes something else than PyTorch.
    """
    tokens, width = model.tokenizer.model_max_length, model.unet.config.cross_attention_dim
    side = model.unet.config.sample_size

    def inputs(n: int, timestep: int) -> dict[str, tuple]:
        """For each file: its network, what it computes, and random inputs."""
        generator = torch.Generator().manual_seed(n)
        latents = torch.randn(n, 4, side, side, generator=generator)
        captions = torch.randn(n, tokens, width, generator=generator)
        input_ids = torch.randint(len(model.tokenizer), (n, tokens), generator=generator)
        return {"text_encoder": (model.text_encoder, encode, {"input_ids": input_ids}),
                "unet": (model.unet, predict, {"sample": latents, "timestep": torch.tensor(timestep),
                                               "encoder_hidden_states": captions}),
                "vae_decoder": (model.vae, decode, {"latents": latents})}

    checks = inputs(3, 999)  # other values, and another batch, than were traced
    for name, (network, function, values) in inputs(2, 1).items():
        path = folder / f"{name}.onnx"
        module = Function(network, function).eval()
        batched = {key: {0: "batch"} for key, value in values.items() if value.ndim}
        # By tracing: for the embedded teacher's U-Net it took 4.5 s, PyTorch's newer exporter 74 s and onnxscript besides;
        # both agreed with PyTorch within 3e-6.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, tuple(values.values()), str(path), dynamo=False, input_names=list(values),
                              output_names=["output"], dynamic_axes=batched | {"output": {0: "batch"}})
        difference, share = largest_difference(module, path, checks[name][2])
        print(f"{path.name}: differs from PyTorch by at most {difference:.1e}, {share:.1e} of the largest output")
        require(share < 1e-3, f"{path.name} computes something else than PyTorch; onnxruntime may be too old: pip install -U "
                "onnx onnxruntime")


def write_drawing(model: Teacher, how: dict, folder: Path):
    """Write what v3/draw_onnx.py takes besides: the tokenizer, which pads and cuts by itself, and DDIM's numbers."""
    tokens = model.tokenizer.model_max_length
    tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens, pad_id=model.tokenizer.pad_token_id, pad_token=model.tokenizer.pad_token)
    tokenizer.save(str(folder / "tokenizer.json"))
    steps, scheduler = how.get("steps", 25), make_scheduler(how.get("sampler", "ddim-trailing"), model.noise_scheduler)
    scheduler.set_timesteps(steps)
    drawing = {"steps": steps, "guidance": how.get("guidance", 5.0), "timesteps": scheduler.timesteps.tolist(),
               "alphas_cumprod": scheduler.alphas_cumprod.tolist(), "last_alpha": scheduler.final_alpha_cumprod.item()}
    (folder / "drawing.json").write_text(json.dumps(drawing), "utf-8")


# --- the fp16 folder --------------------------------------------------------------------------------------------------


def write_half(model: Teacher, folder: Path):
    """Write a pipeline folder in fp16. The model's own weights are fp16 afterwards."""
    source = model.folder()
    pipeline = StableDiffusionPipeline.from_pretrained(  # reads what is missing: the scheduler, of its own class
        source, vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, unet=model.unet,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.to(torch.float16).save_pretrained(folder)
    make_readable(folder)
    for file in (*source.glob("README.md"), *source.glob("sample-*.png")):  # the card may say how to draw
        shutil.copy(file, folder)


def write(option: str, target: Path, model: Teacher, how: dict, gaps: bool):
    """Write what `option` names, whole or not at all. Raises SystemExit where the disk is full."""
    parent = make_folder(target.absolute().parent, option)
    partial = parent / f"{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        with full_disk_is_one_line(parent, "what was written of it is removed"):
            if option == "--single-file":
                write_atomically(target, save(original_weights(model, gaps), {"format": "pt"}))
                return
            partial.mkdir()
            if option == "--onnx":
                write_networks(model, partial)
                write_drawing(model, how, partial)
            else:
                write_half(model, partial)
            put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(s: Settings):
    named = {"--single-file": s.single_file, "--onnx": s.onnx, "--half": s.half}  # --half last: it changes the weights
    targets = {option: Path(name) for option, name in named.items() if name}
    require(targets, "give what to write: --half FOLDER, --single-file FILE.safetensors or --onnx FOLDER")
    for option, target in targets.items():
        require(not target.exists(), f"{target} is there already; choose another {option} or remove it")
    require(len(set(targets.values())) == len(targets), "give each of --half, --single-file and --onnx a name of its own")
    require(not s.single_file or s.single_file.endswith(".safetensors"), "--single-file must end in .safetensors")
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    require(not s.onnx or not missing, f"--onnx needs {' and '.join(missing)}: pip install onnx onnxruntime")
    place = model_place(s.model)
    unfinished = (Path(place) / "settings.json").is_file() and not (Path(place) / "unet").is_dir()
    require(not unfinished, f"{s.model} has no student/ yet; let its run end first: the same command with --resume")
    model = load_teacher(place, torch.device("cpu"), what="the model")
    require(not s.gaps or is_sd_tiny(model.unet.config), "--gaps is for sd_tiny uncut (python v3/train_student_kd.py --size "
            "sd_tiny --channels 320,640,1280); stable-diffusion.cpp loads no other student")
    index = model.folder() / "model_index.json"
    require(not s.half or index.is_file(), f"{s.model} is no diffusers pipeline folder (it has no model_index.json)")
    model.unet.to(memory_format=torch.contiguous_format)
    how = drawn_with(place)
    for option, target in targets.items():
        write(option, target, model, how, s.gaps)
    if s.single_file:
        for line in not_in_the_file(model, how):
            print(line)
        gaps = "it stops at the first gap" if s.gaps else ""
        objection = gaps or comfyui_objection(model.unet.config)
        print(f"warning: ComfyUI does not load this file: {objection}" if objection else "ComfyUI's rules take this file")
    print("written:", ", ".join(map(str, targets.values())))


if __name__ == "__main__":
    start(main, parse(Settings, __doc__))
