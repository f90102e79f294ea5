"""Train every version on the embedded world under equal conditions and compare what comes out.

    python bench/compare.py --quick      # one seed, small evaluations: a quarter of an hour on 2 cores
    python bench/compare.py --jobs 2     # three seeds: an hour on 2 cores; stopped, the same command goes on

Same student, batch and seeds, once with equal steps and once with equal training time: the baseline's time on this
machine, into which V-2.2 has to fit its teacher, at every step or, with --store, the making of the store in each of its
runs. V-2.1's step is the baseline's, so one set of its runs serves both. Writes table.md, curves.png and sheet.png into
--out.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from common.mini import CAPTION_ACCURACY
from common.report import CELL_PX, MARGIN_PX, comparable
from common.run import read_log
from common.settings import parse, start

STUDENT = ["--channels", "64"]  # of every version: the teacher's outermost level, whole
V1_BLOCKS = ["--feature-blocks", "down_blocks.0.attentions.0,down_blocks.0.attentions.1,up_blocks.0.attentions.0,up_blocks.0"]
VERSIONS = {  # name: script and options
    "baseline": ("v2/2.1.py", ["--random-start", "--lr", "4e-3"]),  # ends better there than at 2e-3, which suits the slice
    "V-1": ("v1/1.py", V1_BLOCKS),
    "V-2.1": ("v2/2.1.py", []),
    "V-2.2": ("v2/2.2.py", []),
}
METRICS = ("FD(effnet-lite0)", "FD(effnet-lite0) to reconstructions", "KID(effnet-lite0) to reconstructions",
           "PD(effnet-lite0)", *CAPTION_ACCURACY)


@dataclass
class Settings:
    out: str = "checkpoints/compare"  # the folder of runs, table and pictures
    steps: int = 250  # of the runs with equal steps
    seeds: int = 3  # runs of each kind
    samples: int = 1_000  # pictures of the last evaluation
    evaluations: int = 4  # points of the curves
    store: int = 0  # V-2.2's: with fewer steps than one pass over the pictures, the teacher is cheaper at every step
    options: str = ""  # of every script, such as "--channels 64,48 --batch-size 32"
    quick: bool = False  # one seed, 250 steps at most, 300 pictures
    jobs: int = 1  # runs at a time, each with its share of the cores; with more than one, each prints into its own .log


def seconds_of(out: Path) -> tuple[float, float]:
    """Seconds of a run's training steps, and of its store."""
    found = read_log(out)
    training = max(x.get("seconds", 0) for x in found)
    store = max(x.get("store_seconds", 0) for x in found)
    return training, store


def is_done(out: Path, steps: int) -> bool:
    """Whether a run has come to its end."""
    evaluated = any(x["step"] == steps and "evaluation" in x for x in read_log(out))
    return evaluated and (out / "student").is_dir()


def train(version: str, out: Path, seed: int, steps: int, s: Settings):
    """Run a version to its end, or find that it has been."""
    if is_done(out, steps):
        return
    script, options = VERSIONS[version]
    store = ["--store", str(s.store)] if version == "V-2.2" else []
    resume = ["--resume"] if (out / "settings.json").is_file() else []
    print(f"\n{version}, seed {seed}, {steps:,} steps: {out.name}", flush=True)
    command = [sys.executable, str(ROOT / script), "--mini", "--out", str(out), "--seed", str(seed), "--steps", str(steps),
               "--eval-every", str(-(-steps // s.evaluations)), "--final-samples", str(s.samples), *STUDENT,
               *s.options.split(), *options, *store, *resume]
    if s.jobs == 1:
        subprocess.run(command, check=True, cwd=ROOT)
        return
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // s.jobs))}
    with open(f"{out}.log", "a") as log:
        subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=log, env=os.environ | threads)


def train_all(runs: list[tuple], s: Settings):
    """`train` each (version, out, seed, steps), `s.jobs` at a time."""
    with ThreadPoolExecutor(s.jobs) as pool:
        list(pool.map(lambda run: train(*run, s), runs))


def cell(values: list[float]) -> str:
    """Mean +- standard deviation."""
    return f"{mean(values):.4g} ± {stdev(values):.2g}" if len(values) > 1 else f"{mean(values):.4g}"


def write_table(rows: dict[str, list[Path]], path: Path, title: str):
    """Markdown: one row a version, over the seeds; below, what tells one version from another at the same seed."""
    text = [f"### {title}", "", "| | steps | seconds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 3) + "|"]
    scores = {}
    for name, runs in rows.items():
        last = [[x for x in read_log(out) if "evaluation" in x][-1] for out in runs]
        scores[name] = [x["evaluation"][METRICS[1]] for x in last]
        steps, seconds = mean(x["step"] for x in last), cell([sum(seconds_of(out)) for out in runs])
        cells = [cell([x["evaluation"][metric] for x in last]) for metric in METRICS]
        text.append(f"| {name} | {steps:,.0f} | {seconds} | " + " | ".join(cells) + " |")
    differences = []
    for a, b in (("baseline", "V-2.1"), ("V-2.1", "V-2.2"), ("V-2.1", "V-1")):  # of a seed, they see the same batches
        difference = cell([x - y for x, y in zip(scores[a], scores[b])])
        differences.append(f"{a} - {b} {difference}")
    text += ["", f"{METRICS[1]}, seed by seed: " + "; ".join(differences)]
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n".join(text) + "\n\n")
    print("\n" + "\n".join(text))


def write_curves(rows: dict[str, list[Path]], path: Path):
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 3), (METRICS[1], METRICS[2], METRICS[4])):
        for name, runs in rows.items():
            points = {}
            for out in runs:
                for x in comparable(read_log(out)):
                    points.setdefault(x["step"], []).append(x["evaluation"][metric])
            axis.plot(list(points), [mean(v) for v in points.values()], marker="o", label=name)
        axis.set(title=metric, xlabel="step")
    axis.legend()
    figure.savefig(path, dpi=90)


def write_sheet(rows: dict[str, list[Path]], path: Path):
    """One row a version that has one, from the runs' own sheets (teacher's row over the student's, captions below)."""
    sheets = {}
    for name, runs in rows.items():
        newest = max((runs[0] / "samples").glob("step_*.png"), default=None)
        if newest:
            sheets[name] = Image.open(newest)
    if not sheets:
        return
    first = next(iter(sheets.values()))
    captions = first.crop((0, 2 * CELL_PX, first.width, first.height))
    sheet = Image.new("RGB", (first.width, CELL_PX * (len(sheets) + 1) + captions.height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(["teacher", *sheets]):
        top = 0 if name == "teacher" else CELL_PX
        row = sheets.get(name, first).crop((MARGIN_PX, top, first.width, top + CELL_PX - 4))
        sheet.paste(row, (MARGIN_PX, number * CELL_PX))
        draw.text((4, number * CELL_PX + 48), name, fill="black")
    sheet.paste(captions, (0, sheet.height - captions.height))
    sheet.save(path)


def steps_begun_with(out: Path) -> int | None:
    """The steps of a run that was begun, which it keeps; None where there is none."""
    settings = out / "settings.json"
    return json.loads(settings.read_text("utf-8"))["steps"] if settings.is_file() else None


def main(s: Settings):
    if s.quick:
        s.steps, s.seeds, s.samples, s.evaluations = min(s.steps, 250), 1, min(s.samples, 300), 2
    out = ROOT / s.out
    out.mkdir(parents=True, exist_ok=True)
    equal_steps = {name: [out / f"{name}-{s.steps}-steps-seed{k}" for k in range(s.seeds)] for name in VERSIONS}
    train_all([(name, equal_steps[name][seed], seed, s.steps) for seed in range(s.seeds) for name in VERSIONS], s)
    budget = median(seconds_of(run)[0] for run in equal_steps["baseline"])  # one disturbed run shifts no median
    equal_time, runs = {"baseline": equal_steps["baseline"], "V-2.1": equal_steps["V-2.1"]}, []
    for name in ("V-2.2", "V-1"):
        training, store = (median(v) for v in zip(*map(seconds_of, equal_steps[name])))
        steps = max(10, round(s.steps * (budget - store) / training))
        equal_time[name] = [out / f"{name}-equal-time-to-{s.steps}-seed{k}" for k in range(s.seeds)]
        runs += [(name, run, seed, steps_begun_with(run) or steps) for seed, run in enumerate(equal_time[name])]
    train_all(runs, s)
    (out / "table.md").unlink(missing_ok=True)
    write_table(equal_steps, out / "table.md", f"Equal steps ({s.steps:,}), {s.seeds} seeds, {s.samples:,} samples")
    write_table(equal_time, out / "table.md", f"Equal time ({budget:,.0f} s), {s.seeds} seeds, {s.samples:,} samples")
    write_curves(equal_steps, out / "curves.png")
    write_sheet(equal_steps, out / "sheet.png")
    print(f"\ntable.md, curves.png and sheet.png are in {out}")


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, limits={name: (1, None) for name in ("seeds", "evaluations", "jobs")}))
