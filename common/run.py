"""A run's folder: its settings, its log, its progress bar, and what happens when it is stopped."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from common.files import PATIENCE_S, full_disk_is_one_line, make_folder, read_text, write_atomically
from common.report import save_curves, save_sheet
from common.settings import first_line, require
from common.trainer import due


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that are whole."""
    path, lines = Path(folder) / "metrics.jsonl", []
    for text in read_text(path).splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the line that a kill cut off
            pass
    return lines


# What a resumed run may be told anew, since nothing that the student learns hangs on it (on shards the workers: see there);
# of data and teacher the place, as `create` compares what lies there; of --start the weights, which the checkpoint replaces.
MAY_CHANGE = ("data", "teacher", "start", "device", "workers", "cache_folder", "track", "push_to_hub", "save_every", "keep",
              "log_every", "max_bad_steps", "half", "again")


class Run:
    """The folder `out`. Of several processes only the main one looks at it and writes to it.

    `Run(...)` looks at the folder, `create` writes it, `begin` starts the clock. Each step then calls `log_step` and
    `stop_requested`, and `save` or `leave` where they are due.

    Raises SystemExit where it holds a run already and `resume` is not set, one of other settings than `MAY_CHANGE`, or a
    student alone.
    """

    def __init__(self, out: str, settings, resume: bool, accelerator):
        self.folder, self.accelerator, self.main = Path(out), accelerator, accelerator.is_main_process
        self.settings = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("resume", "out")}
        path = self.folder / "settings.json"
        # a folder without a checkpoint counts as empty, so a run that failed early can be started again with other settings
        self.begun = path.is_file() and any(self.folder.glob("checkpoint-*[0-9]"))
        self.ending = None  # what the run is to end with before its last step: an exit status, or a line for the user
        self.kernels = {}  # what `common.precision.fastest_kernels` chose
        self.teacher_before = ""  # where a resumed run's lay
        old = any(self.folder.glob("state-*.pt"))
        require(not old, f"{out} holds a run of this project's first version, which cannot be resumed; choose another --out")
        finished = (self.folder / "student").exists()  # its checkpoints may have been removed to make room
        require(self.begun or not finished, f"{out} holds a student, and no checkpoint to go on from; choose another --out")
        if not self.main or not self.begun:
            return
        require(resume, f"{out} holds a run already; go on with --resume, or choose another --out")
        try:
            before, now = json.loads(read_text(path)), json.loads(json.dumps(self.settings))
        except ValueError:
            raise SystemExit(f"error: {path} is damaged, so the run cannot be resumed; begin anew in another --out") from None
        self.kernels, self.teacher_before = before.get("kernels", {}), before.get("teacher")
        changed = [name for name, value in now.items() if before.get(name) != value and name not in MAY_CHANGE]
        same = ", ".join(f"{name} = {before.get(name)}" for name in changed)
        require(not changed, f"{out} was started with other settings ({', '.join(changed)}); resume it with the same ones: "
                f"{same}")

    def create(self, data: str, teacher: str, dtype: torch.dtype):
        """Make the folder and write the settings. `data` and `teacher` are fingerprints, that of the teacher in the precision
        `dtype`: a resumed run must find both unchanged. Raises SystemExit where it does not."""
        if not self.main:
            return
        make_folder(self.folder / "samples", "--out")
        self.lock = FileLock(self.folder / "lock", is_singleton=True)  # held as long as this object lives
        try:
            self.lock.acquire(timeout=PATIENCE_S)
        except Timeout:
            raise SystemExit(f"error: another run is writing to {self.folder}; choose another --out") from None
        inputs, path = {"data": data, "teacher": teacher, "dtype": str(dtype)}, self.folder / "inputs.json"
        before = json.loads(read_text(path)) if self.begun and path.is_file() else inputs
        back = f"changed since {self.folder} was started; put it back as it was, or begin anew in another --out"
        require(before["data"] == data, f"the data (its files' times, which cp -p and rsync -t keep, and with --shards the "
                f"numbers of processes and workers count too) {back}")
        compares = before["dtype"] == str(dtype)  # or the weights are rounded otherwise, and the place must do
        same = before["teacher"] == teacher if compares else self.teacher_before == self.settings.get("teacher")
        require(same, f"the teacher {back}")
        with full_disk_is_one_line(self.folder, "nothing is lost"):
            write_atomically(path, json.dumps(inputs).encode())
        self._write_settings()
        if not self.begun:
            for left in (self.folder / "metrics.jsonl", self.folder / "curves.png", *self.folder.glob("samples/step_*.png")):
                left.unlink(missing_ok=True)  # by a run that was stopped before its first checkpoint

    def _write_settings(self):
        content = json.dumps(self.settings | ({"kernels": self.kernels} if self.kernels else {}), indent=2).encode()
        with full_disk_is_one_line(self.folder, "nothing is lost"):
            write_atomically(self.folder / "settings.json", content)

    def note_kernels(self, kernels: dict):
        """Print and keep in settings.json what was chosen by measurement: a resumed run takes the same."""
        self.kernels = kernels
        if self.main:
            self._write_settings()
            times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in kernels["seconds"].items())
            print(f"precision: {kernels['dtype']}, {kernels['attention']} attention, the fastest of {times} a pass")

    def begin(self, title: str, first_step: int):
        """Start the clock and the bar; from here to the last step Ctrl-C and SIGTERM only ask the loop to stop. What was
        logged after `first_step` is forgotten: it will be logged again."""
        self.first_step, self.batch_size = first_step, self.settings["batch_size"]
        self.log_every, self.max_bad_steps = self.settings["log_every"], self.settings["max_bad_steps"]
        self.steps = steps = self.settings["steps"]
        kept = [line for line in read_log(self.folder) if line["step"] <= first_step] if first_step else []
        kept = [line for line in kept if line["step"] < steps or "loss" in line]  # the last evaluation is made again
        self.evaluated = {line["step"] for line in kept if "evaluation" in line}
        self.seconds_before = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        if first_step and self.main:
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self.folder / "metrics.jsonl", text.encode())
        self.loss_max, self.spent, self.last_tick = None, 0.0, time.perf_counter()
        self.bar = tqdm(total=steps, initial=first_step, desc=title, unit="step", disable=not self.main or first_step == steps)
        if self.accelerator.log_with:
            self._start_trackers()
        self.handlers = {}
        if first_step < steps:
            self.handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _start_trackers(self):
        """Of --track. Raises SystemExit where one cannot start."""
        kind = self.accelerator.log_with[0].value
        project, named = ("tensorboard", {}) if kind == "tensorboard" else ("light-sd-students", {"name": self.folder.name})
        try:
            self.accelerator.init_trackers(project, init_kwargs={kind: named})
        except Exception as error:  # a missing login, no network: each package's own errors
            raise SystemExit(f"error: --track {kind} cannot start: {first_line(error)}") from None

    def _on_signal(self, number, _):
        self.ending = self.ending or 128 + number
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    def log_step(self, done: int, trainer, **values):
        """Note what step number `done` gave: `loss` and other numbers, or scalar tensors, which are only read where a line is
        due. Of the steps without a line the highest loss is kept."""
        self.bar.update()
        loss = values["loss"].detach()
        self.loss_max = loss if self.loss_max is None else torch.maximum(self.loss_max, loss)
        now = time.perf_counter()
        self.spent += now - self.last_tick
        self.last_tick = now
        if not due(done, self.log_every) and done != self.steps:
            return
        tensors = {name: value.detach().float() for name, value in values.items() if isinstance(value, torch.Tensor)}
        means = self.accelerator.reduce(torch.stack(list(tensors.values())), "mean")
        values |= dict(zip(tensors, means.tolist()))
        loss_max = self.accelerator.gather(self.loss_max.view(1)).max().item()  # of all processes
        skipped, in_a_row = trainer.bad_steps()
        speed = (done - self.first_step) * self.batch_size / self.spent
        memory = self._gpu_memory()
        self.log(step=done, **values, loss_max=loss_max, skipped_steps=skipped,
                 seconds=self.seconds_before + self.spent, images_per_s=speed, **memory)
        self.loss_max = None
        shown = {"gpu": f"{memory['gpu_reserved_gib']:.1f} GiB"} if memory else {}
        shown |= {"skipped": skipped} if skipped else {}  # a share of the steps was a fault once that nobody saw
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{speed:.0f}", **shown)
        if in_a_row >= self.max_bad_steps:
            self.ending = (f"error: no finite gradient in the last {in_a_row} steps; the weights from before them are saved. "
                           "Try again in another folder with a lower --lr, or in bf16 or fp32")

    def _gpu_memory(self) -> dict[str, float]:
        """Peaks since the last call, GiB: what tensors held of the GPU, what torch had taken for them. {} without CUDA."""
        if self.accelerator.device.type != "cuda":
            return {}
        peaks = {"gpu_gib": torch.cuda.max_memory_allocated(), "gpu_reserved_gib": torch.cuda.max_memory_reserved()}
        torch.cuda.reset_peak_memory_stats()
        return {name: size / 2**30 for name, size in peaks.items()}

    def log(self, **values):
        """Add a line to metrics.jsonl, and to the trackers that Accelerate was given."""
        if not self.main:
            return
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
        with full_disk_is_one_line(self.folder, "with --resume; the last checkpoint is kept"), \
                open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")
        numbers = values.get("evaluation", values)
        self.accelerator.log({name: value for name, value in numbers.items() if isinstance(value, float)}, step=values["step"])

    def log_once(self, **values):
        """Log what was found out before the first step, unless an earlier start of this run has."""
        if not self.begun:
            self.log(step=0, **values)

    def record(self, step: int, evaluation):
        """Log an evaluation (`common.metrics.Evaluation`), write its sheet and draw the curves anew."""
        if self.main:
            self.log(step=step, evaluation=evaluation.scores, teacher=evaluation.teacher_scores, **self._gpu_memory())
            rows = {"teacher": evaluation.teacher_images, "student": evaluation.images}
            sheet = self.folder / "samples" / f"step_{step:06d}.png"
            with full_disk_is_one_line(self.folder, "with --resume; the last checkpoint is kept"):
                save_sheet(sheet, rows, evaluation.captions)
                save_curves(self.folder / "curves.png", read_log(self.folder))
            for tracker in self.accelerator.trackers:
                if tracker.name != "trackio":  # Accelerate's has no images
                    picture = np.asarray(Image.open(sheet))[None]  # (1, H, W, 3)
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"samples": picture}, step=step, **layout)
            if step < self.steps:
                shown = ", ".join(f"{k} {v:.4g}" for k, v in evaluation.scores.items() if k != "parameters")
                self.bar.write(f"step {step:,}: {shown}")
        self.last_tick = time.perf_counter()  # an evaluation is no training time

    def save(self, trainer):
        """Write a checkpoint."""
        trainer.save(self.folder)
        self.last_tick = time.perf_counter()
        if trainer.done_steps == self.steps and not self.ending:
            self._end()

    def stop_requested(self, done: int) -> bool:
        """Whether to save and leave after step number `done`. Several processes compare notes at every tenth step."""
        if self.accelerator.num_processes > 1:
            if done % 10 and done != self.steps:
                return False
            asked = torch.tensor([bool(self.ending)], device=self.accelerator.device)
            anyone = self.accelerator.gather(asked).any()
            if anyone and not self.ending:
                self.ending = 128 + signal.SIGTERM
        return bool(self.ending)

    def leave(self, done: int):
        """End the run before its end. Raises SystemExit."""
        self._end()
        self.accelerator.end_training()
        if isinstance(self.ending, int):
            self.accelerator.print(f"stopped at step {done:,}; go on with --resume")
        raise SystemExit(self.ending)

    def _end(self):
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
