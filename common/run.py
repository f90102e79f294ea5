"""A run's folder: settings, log, checkpoints that survive a kill, sample sheets, curves, and the closing table."""

import dataclasses
import json
import os
import re
import shutil
import signal
import textwrap
import time
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.cache import full_disk_is_one_line, write_atomically
from common.settings import check


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises SystemExit where the named device is not there."""
    check({"--device must be auto, cuda, cuda:N, mps or cpu": re.fullmatch(r"auto|cuda(:\d+)?|mps|cpu", name),
           f"--device {name}: this torch finds no such device; choose --device cpu, or install torch for it":
               name in ("auto", "cpu") or name == "mps" and torch.backends.mps.is_available()
               or name.startswith("cuda") and int(name[5:] or 0) < torch.cuda.device_count()})
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on CUDA devices that have it, else fp16 there; fp32 on MPS and CPUs."""
    if name != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def make_folder(folder: Path, option: str):
    """Make it and what lies above it. Raises SystemExit where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: {option}: {folder} cannot be made ({error.strerror}); choose another folder") from None


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that are whole."""
    path, lines = Path(folder) / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the line that a kill cut off
            pass
    return lines


def comparable(lines: list[dict]) -> list[dict]:
    """The evaluations in a log that have the first one's sample count: a Frechet distance falls with the count alone."""
    evaluations = [x for x in lines if "evaluation" in x]
    return [x for x in evaluations if x["evaluation"]["samples"] == evaluations[0]["evaluation"]["samples"]]


class Run:
    """The output folder of one training. Raises SystemExit where it holds another run, or other settings.

    Of several processes only the `main` one looks at it and writes to it.
    """

    def __init__(self, folder: str, settings, resume: bool, main: bool = True):
        self.folder, self.reported, self.loss_max, self.main = Path(folder), {}, None, main
        self.settings = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("resume", "out")}
        path = self.folder / "settings.json"
        # without a checkpoint there is no run yet: what stopped it may be mended by other settings
        self.begun = path.is_file() and any(x for kind in ("state-*.pt", "checkpoint-*") for x in self.folder.glob(kind))
        if not main or not self.begun:
            return
        if not resume:
            raise SystemExit(f"error: {folder} holds a run already; go on with --resume, or choose another --out")
        before = json.loads(path.read_text("utf-8"))
        changed = [k for k, v in json.loads(json.dumps(self.settings)).items() if before.get(k) != v]
        if changed:
            raise SystemExit(f"error: {folder} was started with other settings ({', '.join(changed)}); "
                             "resume it with the same ones")

    def start(self):
        """Make the folder and write the settings."""
        if not self.main:
            return
        make_folder(self.folder / "samples", "--out")
        write_atomically(self.folder / "settings.json", json.dumps(self.settings, indent=2).encode())
        if not self.begun:
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)

    def cut_log(self, step: int):
        """Forget what was logged after `step`: it will be logged again."""
        kept = [json.dumps(line) + "\n" for line in read_log(self.folder) if line["step"] <= step]
        write_atomically(self.folder / "metrics.jsonl", "".join(kept).encode())

    def steps(self, learner, s, title: str, evaluate):
        """Yield the steps that are left to train. After each one: log what was `report`ed, save a checkpoint, call
        `evaluate(steps done, pictures)`, each at its interval in the settings `s`. Ctrl-C and SIGTERM save first.
        `learner` is a `common.training.Learner` or has its methods.

        Raises SystemExit after a signal (exit code 130 or 143), and after `s.max_bad_steps` steps in a row whose
        gradients were not finite.
        """
        start = learner.restore(self.folder) if s.resume else 0
        if start and self.main:
            self.cut_log(start)
        earlier = max((x.get("seconds", 0.0) for x in read_log(self.folder)), default=0.0) if start else 0.0
        signals = []

        def on_signal(number, _):
            signals.append(number)
            signal.signal(number, signal.SIG_DFL)  # a second one stops at once

        def due(done):
            return s.eval_every and done and done % s.eval_every == 0 and done < s.steps

        def small_evaluation(done):
            row = evaluate(done, s.eval_samples)
            bar.write(f"step {done:,}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "parameters"))

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        spent = 0.0
        try:
            with full_disk_is_one_line(self.folder, "with --resume; the last checkpoint is kept"), \
                    tqdm(total=s.steps, initial=start, desc=title, unit="step", disable=not self.main) as bar:
                if due(start) and not any(x["step"] == start and "evaluation" in x for x in read_log(self.folder)):
                    small_evaluation(start)  # the stop came between the checkpoint and its evaluation
                for step in range(start, s.steps):
                    began, done = time.perf_counter(), step + 1
                    yield step
                    bar.update()
                    if done % s.log_every == 0 or done == s.steps:
                        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in self.reported.items()}
                        skipped, in_a_row = learner.bad_steps()
                        spent += time.perf_counter() - began
                        speed = (done - start) * learner.batch_size / spent
                        self.log(step=done, **values, loss_max=self.loss_max.item(), skipped_steps=skipped,
                                 seconds=earlier + spent, images_per_s=speed)
                        self.loss_max = None
                        bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{speed:.0f}")
                        if in_a_row >= s.max_bad_steps:
                            learner.save(self.folder, done)
                            raise SystemExit(
                                f"error: no finite gradient in the last {in_a_row} steps; the weights from before them are "
                                "saved. Try again in another folder with a lower --lr, or in bf16 or fp32")
                    else:
                        spent += time.perf_counter() - began
                    signal_number = learner.agree(signals[0] if signals else 0, done)
                    if signal_number or done % s.save_every == 0 or done == s.steps:
                        learner.save(self.folder, done)
                    if signal_number:
                        bar.close()
                        if self.main:
                            print(f"stopped at step {done:,}; go on with --resume")
                        raise SystemExit(128 + signal_number)
                    if due(done):
                        small_evaluation(done)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def report(self, **values):
        """What the log shall say of this step: numbers, or scalar tensors, which are only read where a line is due. Of the
        steps without a line it keeps the highest loss."""
        self.reported, loss = values, values["loss"].detach()
        self.loss_max = loss if self.loss_max is None else torch.maximum(self.loss_max, loss)

    def log(self, **values):
        if not self.main:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}) + "\n")

    def sheet(self, step: int, rows: dict[str, torch.Tensor], captions: list[str], columns: int = 8):
        """`samples/step_*.png`: one row of pictures for each name, captions under them."""
        tall = torch.cat([pictures[:columns] for pictures in rows.values()])
        save_sheet(self.folder / "samples" / f"step_{step:06d}.png", tall, captions[:columns], columns)

    def curves(self):
        """`curves.png`: the loss, and every metric of the evaluations, against the step."""
        from matplotlib.figure import Figure

        lines = read_log(self.folder)
        train, evaluations = [x for x in lines if "loss" in x], comparable(lines)
        names = ["loss"] + [n for n in (evaluations[0]["evaluation"] if evaluations else {}) if n != "samples"]
        figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
            points = train if name == "loss" else [x for x in evaluations if name in x["evaluation"]]
            axis.plot([x["step"] for x in points], [x[name] if name == "loss" else x["evaluation"][name] for x in points])
            axis.set(title=name, xlabel="step")
        figure.savefig(self.folder / "curves.png", dpi=80)


def save_sheet(path: Path, pictures: torch.Tensor, captions: list[str], columns: int = 8):
    """A PNG of (N, 3, H, W) uint8 pictures in rows of `columns`. With fewer captions than pictures the rows share them and
    they stand under the last row, else each row has its own."""
    cell, label = 112, 46
    shared = len(captions) < len(pictures)
    rows = -(-len(pictures) // columns)
    pitch = cell if shared else cell + label
    sheet = Image.new("RGB", (columns * cell, rows * pitch + (label if shared else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        tile = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((cell - 4,) * 2, Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * cell, i // columns * pitch))
    for i, caption in enumerate(captions):
        lines = "\n".join(textwrap.wrap(caption, 18, max_lines=3))
        top = rows * cell if shared else i // columns * pitch + cell
        draw.text((i % columns * cell, top - 3), lines, fill="black")
    sheet.save(path)


def save_student(unet, teacher, folder: Path, card: str):
    """Write the student as a stock pipeline folder, in fp32: its U-Net, the teacher's other parts, the model card."""
    from diffusers import StableDiffusionPipeline

    partial = Path(folder).with_name(f"{Path(folder).name}.partial-{os.getpid()}")
    StableDiffusionPipeline(
        vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=unet,
        scheduler=teacher.noise_scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(dtype=torch.float32).save_pretrained(partial)
    (partial / "README.md").write_text(card, "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def model_card(title: str, s, row: dict, teacher_row: dict, how: str) -> str:
    """The README.md of a saved student, with the metadata block that the Hugging Face hub reads."""
    drawn = s.mini
    metadata = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["stable-diffusion", "distillation"],
                "license": "cc-by-sa-4.0" if drawn else "creativeml-openrail-m",
                "base_model": None if drawn else s.teacher, "datasets": None if drawn else ["coco2017"]}
    results = [{"task": {"type": "text-to-image"}, "dataset": {"name": f"{s.data} ({s.val_split})", "type": "captions"},
                "metrics": [{"type": name, "value": round(value, 5), "name": name} for name, value in row.items()
                            if isinstance(value, float) and name != "seconds an image"]}]
    metadata = {k: v for k, v in metadata.items() if v} | {"model-index": [{"name": title, "results": results}]}
    licence = ("The pictures that it learned from are drawn from OpenMoji's glyphs (CC BY-SA 4.0)." if drawn else
               "The weights derive from Stable Diffusion 1.5 and keep its licence, CreativeML OpenRAIL-M.")
    lines = "\n".join(f"| {name} | {teacher_row.get(name, '-')} | {value} |" for name, value in row.items())
    return (f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n# {title}\n\nA student of {row['parameters'] / 1e6:.2f} M "
            f"U-Net parameters, distilled from `{s.teacher}` at {s.resolution} px on `{s.data}`.\n\n"
            f"    from diffusers import StableDiffusionPipeline\n    pipeline = StableDiffusionPipeline.from_pretrained("
            f"\"this folder\", safety_checker=None)\n\nMeasured with {how}:\n\n| | teacher | student |\n|---|---|---|\n"
            f"{lines}\n\n{licence}\n")


def table(rows: dict[str, dict]) -> str:
    """Aligned text, one line a row; numbers with four significant digits, `-` where a row has none."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    def cell(value):
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

    cells = [["", *columns]] + [[name, *(cell(row.get(c)) for c in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths)))
                     for line in cells)
