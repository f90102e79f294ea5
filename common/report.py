"""What people look at: sheets of images, curves, tables, and the saved student with its model card."""

import re
import shutil
import textwrap
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from common.files import full_disk_is_one_line
from common.settings import require

CELL_PX, LABEL_PX = 112, 46  # of a sheet: an image with its margin, the caption below


def save_sheet(path: Path, rows: dict[str, torch.Tensor], captions: list[str], columns: int = 8):
    """A PNG with a row of images for each name in `rows`, (N, 3, H, W) uint8, and the captions that they share below.

    Of a single row all images are shown, in lines of `columns`, each with its own caption.
    """
    columns = columns if len(rows) == 1 else min(columns, *(len(images) for images in rows.values()))
    pictures = torch.cat([images if len(rows) == 1 else images[:columns] for images in rows.values()])
    captions = captions[: len(pictures) if len(rows) == 1 else columns]
    lines = -(-len(pictures) // columns)
    pitch = CELL_PX + LABEL_PX if len(rows) == 1 else CELL_PX
    height = lines * pitch + (0 if len(rows) == 1 else LABEL_PX)
    sheet = Image.new("RGB", (columns * CELL_PX, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
        tile = tile.resize((CELL_PX - 4, CELL_PX - 4), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * CELL_PX, i // columns * pitch))
    for i, caption in enumerate(captions):
        wrapped = "\n".join(textwrap.wrap(caption, 18, max_lines=3))
        top = i // columns * pitch + CELL_PX if len(rows) == 1 else lines * CELL_PX
        draw.text((i % columns * CELL_PX, top - 3), wrapped, fill="black")
    sheet.save(path)


def comparable(log: list[dict]) -> list[dict]:
    """The evaluations of a log with as many samples as the first one: a Frechet distance falls with the count alone."""
    evaluations = [line for line in log if "evaluation" in line]
    return [line for line in evaluations if line["evaluation"]["samples"] == evaluations[0]["evaluation"]["samples"]]


def save_curves(path: Path, log: list[dict]):
    """A PNG of the loss, and of every metric of the evaluations, against the step."""
    evaluations = comparable(log)
    series = {"loss": [(line["step"], line["loss"]) for line in log if "loss" in line]}
    for line in evaluations:
        for name, value in line["evaluation"].items():
            if name != "samples":
                series.setdefault(name, []).append((line["step"], value))
    figure = Figure(figsize=(4 * len(series), 3), layout="constrained")
    for axis, (name, points) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items()):
        axis.plot(*zip(*points))
        axis.set(title=name, xlabel="step")
    figure.savefig(path, dpi=80)


def table(rows: dict[str, dict]) -> str:
    """Aligned text, one line a row; numbers with four significant digits, `-` where a row has none."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))

    def cell(value):
        if value is None:
            return "-"
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

    cells = [["", *columns]]
    for name, row in rows.items():
        cells.append([name, *(cell(row.get(column)) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        right = [text.rjust(width) for text, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return "\n".join(lines)


def summary(student, teacher, *sources) -> str:
    """What a run trains, and on what, in two or three lines."""
    parameters = sum(p.numel() for p in student.parameters())
    share = parameters / teacher.parameters
    lines = [f"student: {parameters / 1e6:.2f} M parameters, {share:.1%} of the teacher's U-Net"]
    return "\n".join(lines + [source.describe() for source in sources])


def save_student(unet, teacher, folder: Path, card: ModelCard, scheduler=None):
    """Write the student as a stock pipeline folder: its U-Net in fp32, the teacher's other files bit for bit, the card, and
    the `scheduler` that it is drawn with, if that is not the teacher's.

    Raises SystemExit where the teacher's files are no longer there.
    """
    from diffusers import StableDiffusionPipeline

    scheduler = scheduler or teacher.noise_scheduler
    source, partial = teacher.folder(), folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with full_disk_is_one_line(folder.parent, "with --resume; the trained weights are kept", remove=partial):
        StableDiffusionPipeline(
            vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=unet,
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_config(partial)
        unet.save_pretrained(partial / "unet")
        scheduler.save_pretrained(partial / "scheduler")
        for part in ("vae", "text_encoder", "tokenizer"):
            require((source / part).is_dir(), f"the teacher's {source / part} is gone; put it back and go on with --resume")
            copy_weights(source / part, partial / part)
        card.save(partial / "README.md")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def finish(folder: Path, title: str, student, teacher, evaluation, teacher_scores: dict, *, how: str, data: Path,
           val_split: str, resolution: int, warning: str = "", scheduler=None, inference: dict | None = None):
    """Save the student in `<folder>/student` and print the closing table, and the `warning` once more. A student that is
    drawn with another `scheduler` than the teacher's, or by other parameters of the pipeline, says so."""
    scores = evaluation.scores
    title = f"{title}: {scores['parameters'] / 1e6:.2f} M student"
    card = model_card(title, teacher.name, data, val_split, resolution, scores, teacher_scores, how, warning,
                      inference=inference)
    save_student(student, teacher, folder / "student", card, scheduler)
    print(f"\nThe student lies in {folder / 'student'}, samples and curves beside it. {how}:\n")
    print(table({"teacher": teacher_scores, "student": scores}))
    if warning:
        print(warning)


def copy_weights(source: Path, target: Path):
    """Copy one part of a pipeline, without files that nothing loads: pickles, other frameworks' weights, a second precision."""
    others = shutil.ignore_patterns("*.bin", "*.bin.index.json", "*.msgpack", "*.h5", "*.onnx*", "*.ckpt")
    shutil.copytree(source, target, ignore=others)
    for half in list(target.glob("*.fp16.*")):
        plain = half.with_name(half.name.replace(".fp16.", "."))
        if plain.is_file():
            half.unlink()
        else:  # under the name that is looked for without a variant
            half.rename(plain)


def licence_of(name: str) -> str | None:
    """What the card of a teacher, a folder or a hub id, says of its licence; None where it says nothing."""
    readme = Path(name) / "README.md"
    try:
        return ModelCard.load(readme if Path(name).is_dir() else name).data.license
    except Exception:  # no card, a broken one, no network
        return None


def drawn_with(name: str) -> dict:
    """The options of `common.sampling.sample` that the card of a saved student names: {} for one that needs none of its own."""
    readme = Path(name) / "README.md"
    if not readme.is_file():
        return {}
    said = ModelCard.load(readme).data.to_dict().get("inference")
    if not said:
        return {}
    parameters = said["parameters"]
    return {"sampler": "ddim-trailing", "steps": parameters["num_inference_steps"], "guidance": parameters["guidance_scale"]}


def model_card(title: str, teacher_name: str, data: str, val_split: str, resolution: int, scores: dict,
               teacher_scores: dict, how: str, warning: str = "", kind: str = "student", tag: str = "",
               inference: dict | None = None) -> ModelCard:
    """The README.md of a saved student (or other `kind` of model), with the metadata block that the Hugging Face hub reads:
    only what is known, and a `tag` of its own. `inference`: the pipeline's parameters that it should be drawn with."""
    on_hub = not Path(teacher_name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", teacher_name)
    teacher, data, licence = Path(teacher_name).name, Path(data).name, licence_of(teacher_name)
    numbers = {name: round(value, 5) for name, value in scores.items()
               if isinstance(value, float) and value == value and name != "seconds an image"}
    results = [EvalResult(task_type="text-to-image", dataset_type=data, dataset_name=f"{data} ({val_split})",
                          metric_type=name, metric_name=name, metric_value=value) for name, value in numbers.items()]
    metadata = ModelCardData(
        model_name=title, library_name="diffusers", pipeline_tag="text-to-image", license=licence,
        base_model=teacher_name if on_hub else None, tags=["stable-diffusion", tag or "distillation"], eval_results=results,
        **({"inference": {"parameters": inference}} if inference else {}))
    lines = [f"| {name} | {teacher_scores.get(name, '-')} | {value} |" for name, value in scores.items()]
    said = (f"The weights derive from {teacher}'s and keep its licence, {licence}." if licence else
            f"The weights derive from {teacher}'s; its licence, which its card does not name, holds for them too.")
    call = ""
    if inference:
        arguments = ", ".join(f"{name}={value}" for name, value in inference.items())
        call = f"    image = pipeline(prompt, {arguments}).images[0]\n"
    return ModelCard(f"""---
{metadata.to_yaml()}
---
# {title}

A {kind} of {scores['parameters'] / 1e6:.2f} M U-Net parameters, made from `{teacher}` at {resolution} px on `{data}`.

    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained("this folder", safety_checker=None)
{call}
Measured with {how}:

| | teacher | {kind} |
|---|---|---|
{chr(10).join(lines)}
{warning and f"{chr(10)}{warning[0].upper()}{warning[1:]}.{chr(10)}"}
{said}
""")
