"""What people look at: sheets of images, curves, tables, and the saved student with its model card."""

import contextlib
import functools
import html
import os
import re
import shutil
import textwrap
from pathlib import Path

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from common.files import full_disk_is_one_line, make_readable, put_in_place
from common.sampling import make_scheduler
from common.settings import first_line, require

CELL_PX, LABEL_PX, MARGIN_PX = 112, 46, 64  # of a sheet: an image with its margin, the caption below, a row's name
UNLOADED = ("*.bin", "*.bin.index.json", "*.msgpack", "*.h5", "*.onnx*", "*.ckpt")  # files of a pipeline that are left out
SHOWN = 4  # pictures beside a model card
NO_METRIC = ("parameters", "samples", "seconds an image")  # of an evaluation's scores
ENOUGH = {"FID": 2048, "FD(effnet-lite0)": 1280}  # a Frechet distance of fewer samples than dimensions is far too high
HIGHER_IS_BETTER = ("right", "place", "coverage")  # ends of names


def save_sheet(path: Path, rows: dict[str, torch.Tensor], captions: list[str], columns: int = 8):
    """A PNG with a row of images for each name in `rows`, (N, 3, H, W) uint8, and the captions that they share below.

    Of a single row all images are shown, in lines of `columns`, each with its own caption.
    """
    if len(rows) == 1:
        (pictures,) = rows.values()
        margin, pitch, below = 0, CELL_PX + LABEL_PX, 0
    else:
        columns = min(columns, *(len(images) for images in rows.values()))
        pictures = torch.cat([images[:columns] for images in rows.values()])
        margin, pitch, below = MARGIN_PX, CELL_PX, LABEL_PX
        captions = captions[:columns]
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (margin + columns * CELL_PX, lines * pitch + below), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
        tile = tile.resize((CELL_PX - 4, CELL_PX - 4), Image.Resampling.NEAREST)
        sheet.paste(tile, (margin + i % columns * CELL_PX, i // columns * pitch))
    if margin:
        for i, name in enumerate(rows):
            draw.text((4, i * pitch + CELL_PX // 2), textwrap.fill(name, 9), fill="black")
    for i, caption in enumerate(captions[: len(pictures)]):
        wrapped = "\n".join(textwrap.wrap(caption, 18, max_lines=3))
        top = i // columns * pitch + CELL_PX if len(rows) == 1 else lines * CELL_PX
        draw.text((margin + i % columns * CELL_PX, top - 3), wrapped, fill="black")
    sheet.save(path)


def comparable(log: list[dict]) -> list[dict]:
    """The evaluations of a log with as many samples as the first one: a Frechet distance falls with the count alone."""
    evaluations = [line for line in log if "evaluation" in line]
    return [line for line in evaluations if line["evaluation"]["samples"] == evaluations[0]["evaluation"]["samples"]]


def save_curves(path: Path, log: list[dict]):
    """A PNG of the loss and of every metric of the evaluations against the step, three panels a row; the teacher is dotted."""
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    evaluations = comparable(log)
    names = [name for name in (evaluations[0]["evaluation"] if evaluations else ()) if name not in NO_METRIC]
    count = 1 + len(names)
    lines = -(-count // 3)
    figure = Figure(figsize=(4 * min(3, count), 3 * lines), layout="constrained")
    panels = list(figure.subplots(lines, min(3, count), squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    panels[0].set(title="loss", xlabel="step")
    if losses:
        steps, raw = zip(*losses)
        smooth, mean = [], 0.0
        for number, value in enumerate(raw, 1):
            mean += max(0.1, 1 / number) * (value - mean)  # of all so far, then of about the last ten
            smooth.append(mean)
        panels[0].plot(steps, raw, alpha=0.3)
        panels[0].plot(steps, smooth, color="C0")
        panels[0].set_yscale("log")
    for panel, name in zip(panels[1:], names):
        panel.plot([line["step"] for line in evaluations], [line["evaluation"][name] for line in evaluations], marker="o")
        if name in (teacher := evaluations[0].get("teacher", {})):
            panel.axhline(teacher[name], linestyle=":", color="gray", label="teacher")
            panel.legend()
        panel.set(title=label(name), xlabel="step", xlim=(0, 1.05 * max(1, log[-1]["step"])))
    figure.savefig(path, dpi=80)


def label(name: str, samples: int | None = None) -> str:
    """A score's name as people read it, with an arrow towards the better, and `!` where `samples` are too few for it."""
    short = name.replace("(effnet-lite0)", "*")
    if name in ("parameters", "samples"):
        return short
    arrow = "↑" if name.endswith(HIGHER_IS_BETTER) else "↓"
    few = samples is not None and samples < ENOUGH.get(name.removesuffix(" to reconstructions"), 0)
    return f"{short} {arrow}{' !' if few else ''}"


def cell(name: str, value) -> str:
    """A score as people read it: four significant digits; `-` where there is none."""
    if value is None or value != value:
        return "-"
    if name == "parameters":
        return f"{value / 1e6:.2f} M"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def scores_table(columns: dict[str, dict]) -> str:
    """Aligned text: a score a line, a column for each name, the scores' meaning below."""
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    samples = next((scores["samples"] for scores in columns.values() if "samples" in scores), None)
    rows = {label(name, samples): {title: cell(name, scores.get(name)) for title, scores in columns.items()} for name in names}
    text = table(rows)
    if "*" in text:
        text += "\n* of EfficientNet-lite0's features, not Inception's"
    if "!" in text:
        text += f"\n! fewer samples than the features have dimensions: compare it at {samples:,} samples only"
    return text


def table(rows: dict[str, dict]) -> str:
    """Aligned text, one line a row, `-` where a row has nothing. Long titles of columns stand in several lines."""
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    columns = []
    for title in titles:
        texts = [row.get(title, "-") for row in rows.values()]
        texts = [text if isinstance(text, str) else cell(title, text) for text in texts]
        width = max(map(len, [*texts, *title.split()]))
        columns.append((textwrap.wrap(title, width), [text.rjust(width) for text in texts], width))
    head = max(len(title) for title, *_ in columns)
    first = max(map(len, rows))
    lines = []
    for i in range(head):
        parts = []
        for title, _, width in columns:
            above = [""] * (head - len(title)) + title
            parts.append(above[i].rjust(width))
        lines.append("  ".join([" " * first, *parts]))
    for i, name in enumerate(rows):
        lines.append("  ".join([name.ljust(first), *(texts[i] for _, texts, _ in columns)]))
    return "\n".join(lines)


def summary(student, teacher, *sources) -> str:
    """What a run trains, and on what, in two or three lines."""
    parameters = sum(p.numel() for p in student.parameters())
    share = parameters / teacher.parameters
    lines = [f"student: {parameters / 1e6:.2f} M parameters, {share:.1%} of the teacher's U-Net"]
    return "\n".join(lines + [source.describe() for source in sources])


def save_student(unet, teacher, folder: Path, card: ModelCard, scheduler=None, images: torch.Tensor | None = None):
    """Write the student as a stock pipeline folder: its U-Net in fp32, the teacher's other files bit for bit, the card with
    the `images` that it shows, and the `scheduler` that it is drawn with, if that is not the teacher's.

    Raises SystemExit where the teacher's files are no longer there.
    """
    scheduler = scheduler or teacher.noise_scheduler
    source, partial = teacher.folder(), folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with full_disk_is_one_line(folder.parent, "with --resume; the trained weights are kept", remove=partial):
        teacher.pipeline(unet, scheduler).save_config(partial)
        unet.save_pretrained(partial / "unet")
        scheduler.save_pretrained(partial / "scheduler")
        for part in ("vae", "text_encoder", "tokenizer"):
            require((source / part).is_dir(), f"the teacher's {source / part} is gone; put it back and go on with --resume")
            copy_weights(source / part, partial / part)
        make_readable(partial)
        card.save(partial / "README.md")
        for i, image in enumerate([] if images is None else images[:SHOWN]):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            picture.resize((256, 256), Image.Resampling.NEAREST).save(partial / f"sample-{i}.png")
    put_in_place(partial, folder)


def finish(folder: Path, title: str, student, teacher, evaluation, val_set, *, warning: str = "", sampler: str = "",
           inference: dict | None = None, push_to_hub: str = ""):
    """Save the student in `<folder>/student`, print the closing table, and the `warning` once more, and upload the student
    where a hub repository is named. A student that needs a `sampler` of its own (`common.sampling.SAMPLERS`), or other
    parameters of the pipeline, says so."""
    scores = evaluation.scores
    title = f"{title}: {scores['parameters'] / 1e6:.2f} M student"
    card = model_card(title, teacher.name, val_set, scores, evaluation.teacher_scores, evaluation.how, warning,
                      inference=inference, sampler=sampler, captions=evaluation.captions[:SHOWN])
    scheduler = make_scheduler(sampler, teacher.noise_scheduler) if sampler else None
    save_student(student, teacher, folder / "student", card, scheduler, evaluation.images)
    print(f"\nThe student lies in {folder / 'student'}, samples and curves beside it. {evaluation.how}:\n")
    print(scores_table({"teacher": evaluation.teacher_scores, "student": scores}))
    if warning:
        print(warning)
    if push_to_hub:
        with hub_error_is_one_line(push_to_hub, "; the student itself is saved"):
            HfApi().create_repo(push_to_hub, exist_ok=True)
            HfApi().upload_folder(repo_id=push_to_hub, folder_path=folder / "student")
        print(f"uploaded to {push_to_hub}")


@contextlib.contextmanager
def hub_error_is_one_line(repository: str, comfort: str = ""):
    try:
        yield
    except Exception as error:  # what the client raises changes with the library that it speaks HTTP through
        raise SystemExit(f"error: --push-to-hub {repository} failed ({first_line(error)}){comfort}") from None


def check_hub(repository: str, accelerator, teacher, val_set):
    """Where a hub `repository` is named: raises SystemExit for a missing login or a card that the hub refuses, which should
    show before the training and not after it."""
    if not repository or not accelerator.is_main_process:
        return
    with hub_error_is_one_line(repository):
        HfApi().whoami()
        scores = {"parameters": 0, "metric": 0.0}
        model_card("a student", teacher.name, val_set, scores, {}, "").validate()


def copy_weights(source: Path, target: Path):
    """Copy one part of a pipeline, without files that nothing loads: pickles, other frameworks' weights, a second precision.
    Rights and times are left: shares refuse them, and in a copied read-only folder nothing could be replaced."""
    target.mkdir(parents=True)
    for file in filter(Path.is_file, source.iterdir()):
        plain = file.name.replace(".fp16.", ".")  # the name that is looked for without a variant
        second = plain != file.name and (source / plain).is_file()
        if not second and not any(map(file.match, UNLOADED)):
            shutil.copyfile(file, target / plain)


def licence_of(name: str) -> str | None:
    """What the card of a teacher, a folder or a hub id, says of its licence; None where it says nothing."""
    return card_of(name).get("license")


def card_of(name: str) -> dict:
    """The metadata of a model's card, a folder's or a hub id's; {} where there is no card, a broken one, or no network."""
    try:
        return ModelCard.load(Path(name) / "README.md" if Path(name).exists() else card_on_hub(name)).data.to_dict()
    except Exception:
        return {}


@functools.cache
def card_on_hub(name: str) -> Path:
    """Fetched once in a process, as the page asks at every keystroke."""
    return Path(hf_hub_download(name, "README.md"))


def drawn_with(name: str) -> dict:
    """The options of `common.sampling.sample` that the card of a saved student, a folder or a hub id, names: {} for one that
    needs none of its own."""
    card = card_of(name)
    said = card.get("inference")
    parameters = said.get("parameters") if isinstance(said, dict) else None  # others' cards say `inference: true`
    if "guidance_scale" not in (parameters or {}):
        return {}
    options, steps = {"guidance": parameters["guidance_scale"]}, parameters.get("num_inference_steps")
    return options | ({"sampler": card.get("sampler", "ddim-trailing"), "steps": steps} if steps else {})


def model_card(title: str, teacher_name: str, val_set, scores: dict, teacher_scores: dict, how: str, warning: str = "",
               kind: str = "student", tag: str = "", inference: dict | None = None, sampler: str = "",
               captions: list[str] = ()) -> ModelCard:
    """The README.md of a saved student (or other `kind` of model), with the metadata block that the Hugging Face hub reads:
    only what is known, and a `tag` of its own. `inference`: the pipeline's parameters that it should be drawn with, by
    `sampler`. `captions`: of the pictures beside it, which the hub shows as a gallery."""
    on_hub = not Path(teacher_name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", teacher_name)
    teacher, data = (Path(os.path.abspath(place)).name for place in (teacher_name, val_set.root))  # "." has no name
    licence = licence_of(teacher_name)
    numbers = {name: round(value, 5) for name, value in scores.items()
               if isinstance(value, float) and value == value and name != "seconds an image"}
    results = [EvalResult(task_type="text-to-image", dataset_type=data, dataset_name=f"{data} ({val_set.split or 'held out'})",
                          metric_type=name, metric_name=name, metric_value=value) for name, value in numbers.items()]
    metadata = ModelCardData(
        model_name=title, library_name="diffusers", pipeline_tag="text-to-image", license=licence,
        base_model=teacher_name if on_hub else None, tags=["stable-diffusion", tag or "distillation"], eval_results=results,
        **({"inference": {"parameters": inference}} if inference else {}), **({"sampler": sampler} if sampler else {}),
        **({"widget": [{"text": caption, "output": {"url": f"sample-{i}.png"}} for i, caption in enumerate(captions)]}
           if captions else {}))
    samples = scores.get("samples")
    lines = []
    for name, value in scores.items():
        lines.append(f"| {label(name, samples)} | {cell(name, teacher_scores.get(name))} | {cell(name, value)} |")
    gallery = "".join(f'<img src="sample-{i}.png" width="128" title="{html.escape(caption)}">\n'
                      for i, caption in enumerate(captions))
    said = (f"The weights derive from {teacher}'s and keep its licence, {licence}." if licence else
            f"The weights derive from {teacher}'s; its licence, which its card does not name, holds for them too.")
    call = ""
    if inference:
        arguments = ", ".join(f"{name}={value}" for name, value in inference.items())
        call = f"    image = pipeline(prompt, {arguments}).images[0]\n"
    rows, note = "\n".join(lines), f"\n{warning[0].upper()}{warning[1:]}.\n" if warning else ""
    return ModelCard(f"""---
{metadata.to_yaml()}
---
# {title}

A {kind} of {scores['parameters'] / 1e6:.2f} M U-Net parameters, made from `{teacher}` at {val_set.size_px} px on `{data}`.

    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained("this folder", safety_checker=None)
{call}
{gallery}
Measured with {how}:

| | teacher | {kind} |
|---|---|---|
{rows}
{note}
{said}
""")
