"""Draw with what `v3/export.py --onnx` wrote, without PyTorch: pip install onnxruntime tokenizers numpy pillow

    python v3/draw_onnx.py --model student-onnx --prompt "a cat on the grass" --out cat.png

Nothing else of this repository is needed: this file and that folder may be copied elsewhere. DDIM (arXiv 2010.02502), eta 0.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from tokenizers import Tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default="student-onnx", help="the folder that --onnx wrote")
    parser.add_argument("--prompt", default="a cat on the grass")
    parser.add_argument("--negative", default="", help="what not to draw")
    parser.add_argument("--steps", type=int, help="of DDIM, in place of those in drawing.json")
    parser.add_argument("--guidance", type=float, help="its scale, in place of that in drawing.json; 1: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="picture.png")
    options = parser.parse_args()
    if not (options.model / "drawing.json").is_file():
        raise SystemExit(f"error: {options.model} is no folder that v3/export.py --onnx wrote (it has no drawing.json)")
    folder, extension = Path(options.out).absolute().parent, Path(options.out).suffix.lower()
    if not folder.is_dir() or Image.registered_extensions().get(extension) not in Image.SAVE:
        raise SystemExit(f"error: --out {options.out} must be a picture, such as a.png, in a folder that is there")
    if options.seed < 0:
        raise SystemExit("error: --seed must be at least 0")
    drawing = json.loads((options.model / "drawing.json").read_text("utf-8"))
    steps, guidance = options.steps or drawing["steps"], options.guidance or drawing["guidance"]
    files = [str(options.model / f"{name}.onnx") for name in ("text_encoder", "unet", "vae_decoder")]
    text_encoder, unet, vae_decoder = (InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files)

    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    texts = [options.negative, options.prompt] if guidance > 1 else [options.prompt]
    input_ids = np.array([tokenizer.encode(text).ids for text in texts])  # (n, tokens)
    captions = text_encoder.run(None, {"input_ids": input_ids})[0]
    alphas = drawing["alphas_cumprod"]
    if not 1 <= steps <= len(alphas):
        raise SystemExit(f"error: --steps must lie in 1..{len(alphas)}")
    latents = np.random.default_rng(options.seed).standard_normal((1, *unet.get_inputs()[0].shape[1:]), np.float32)
    timesteps = np.round(np.arange(len(alphas), 0, -len(alphas) / steps)).astype(np.int64) - 1  # "trailing" (arXiv 2305.08891)
    if steps == drawing["steps"]:
        timesteps = np.array(drawing.get("timesteps", timesteps))  # those that the student was made for
    for t in timesteps[:steps]:  # of 61 and other steps rounding makes one more
        inputs = {"sample": latents.repeat(len(texts), 0), "timestep": np.array(t), "encoder_hidden_states": captions}
        noise_preds = unet.run(None, inputs)[0]  # (n, 4, h, w)
        noise_pred = noise_preds[:1] + guidance * (noise_preds[1:] - noise_preds[:1]) if guidance > 1 else noise_preds
        before = t - len(alphas) // steps
        alpha, next_alpha = alphas[t], alphas[before] if before >= 0 else drawing["last_alpha"]
        clean = (latents - (1 - alpha) ** 0.5 * noise_pred) / alpha**0.5  # the predicted picture's latents
        latents = (next_alpha**0.5 * clean + (1 - next_alpha) ** 0.5 * noise_pred).astype(np.float32)
    pixels = vae_decoder.run(None, {"latents": latents})[0][0].transpose(1, 2, 0)  # (H, W, 3) in -1..1
    Image.fromarray((pixels * 127.5 + 127.5).clip(0, 255).round().astype(np.uint8)).save(options.out)


if __name__ == "__main__":
    main()
