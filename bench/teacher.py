"""What students of the embedded world learn at a resolution away from their teacher's own, before and after it is adapted.

    python bench/teacher.py --jobs 2     # three seeds: about an hour and a half on 2 cores; stopped, the same command goes on

Every version is trained from the teacher as it is, from one adapted by adapters of each of --ranks and from one adapted
whole, with equal steps and seeds; V-2.1 also for as long as V-2.2 takes with its store, once beside the making of the store
and once with the teacher's adaptation counted in as well. Writes table.md and sheet.png into --out.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from compare import METRICS, cell, is_done, seconds_of, write_sheet

from common.run import read_log
from common.settings import parse, start

BELIEVES_ALL = "V-2.2 that believes all"
VERSIONS = {  # name: script and options
    "V-1": ("v1/1.py", []),
    "V-2.1": ("v2/2.1.py", []),
    "V-2.2": ("v2/2.2.py", []),
    BELIEVES_ALL: ("v2/2.2.py", ["--no-weigh-teacher"]),
    "V-3": ("v3/train_student_kd.py", []),
}
SHOWN = (METRICS[1], METRICS[2], *METRICS[4:6])


@dataclass
class Settings:
    out: str = "checkpoints/compare-teachers"  # the folder of runs, table and picture
    resolution: int = 16  # pixels a side; the embedded teacher learned at 32
    steps: int = 400  # of every run, the adaptations too
    ranks: tuple[int, ...] = (4, 12)  # of the adapters
    seeds: int = 3  # runs of each kind
    samples: int = 1_000  # pictures of the last evaluation
    jobs: int = 1  # runs at a time, each with its share of the cores and a .log of its own


def run(command: list, out: Path, s: Settings):
    """A script of the repository's, from the beginning or going on."""
    resume = ["--resume"] if (out / "settings.json").is_file() else []
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // s.jobs))}
    print(*command, flush=True)
    with open(f"{out}.log", "a") as log:
        subprocess.run([sys.executable, *map(str, [*command, *resume])], check=True, cwd=ROOT, stdout=log, stderr=log,
                       env=os.environ | threads)


def adapt(options: list, out: Path, seed: int, s: Settings):
    if not out.is_dir():
        run(["checkpoints/adapt_teacher.py", "--mini", "--resolution", s.resolution, "--out", out, "--seed", seed, "--steps",
             s.steps, "--eval-every", 0, "--final-samples", s.samples, *options], Path(f"{out}-run"), s)


def train(version: str, teacher: Path, out: Path, seed: int, steps: int, s: Settings):
    if not is_done(out, steps):
        script, options = VERSIONS[version]
        run([script, "--mini", "--resolution", s.resolution, "--teacher", teacher, "--out", out, "--seed", seed, "--steps",
             steps, "--eval-every", 0, "--final-samples", s.samples, *options], out, s)


def row(name: str, outs: list[Path]) -> str:
    """Of the table: means and standard deviations over the seeds."""
    last = [[x for x in read_log(out) if "evaluation" in x][-1] for out in outs]
    cells = [cell([x["evaluation"][metric] for x in last]) for metric in SHOWN]
    seconds = [seconds_of(out) for out in outs]
    return (f"| {name} | {mean(x['step'] for x in last):,.0f} | {cell([t for t, _ in seconds])} | "
            f"{max(store for _, store in seconds):.0f} | " + " | ".join(cells) + " |")


def distance(out: Path) -> float:
    return [x for x in read_log(out) if "evaluation" in x][-1]["evaluation"][METRICS[1]]


def main(s: Settings):
    out, seeds = ROOT / s.out, range(s.seeds)
    out.mkdir(parents=True, exist_ok=True)
    kinds = {f"rank {rank}": ["--rank", rank] for rank in s.ranks} | {"whole": ["--full", "--lr", "5e-4"]}
    teachers = {"as it is": [ROOT / "checkpoints" / "mini-teacher"] * s.seeds}
    teachers |= {kind: [out / f"teacher {kind} seed{k}" for k in seeds] for kind in kinds}
    jobs = [(kinds[kind], teachers[kind][k], k) for k in seeds for kind in kinds]
    with ThreadPoolExecutor(s.jobs) as pool:
        list(pool.map(lambda job: adapt(*job, s), jobs))

    best, students = f"rank {s.ranks[-1]}", {}
    for version in VERSIONS:
        for kind in ("as it is", best) if version == BELIEVES_ALL else teachers:
            students[kind, version] = [out / f"{version} of {kind} seed{k}" for k in seeds]
    jobs = [(version, teachers[kind][k], students[kind, version][k], k, s.steps) for k in seeds for kind, version in students]
    with ThreadPoolExecutor(s.jobs) as pool:
        list(pool.map(lambda job: train(*job, s), jobs))

    # as much time as V-2.2 of the best adapters takes: without the adaptation (the second student on) and with it
    step = median(seconds_of(run)[0] for run in students[best, "V-2.1"]) / s.steps
    store = median(seconds_of(run)[1] for run in students[best, "V-2.2"])
    adaptation = median(seconds_of(Path(f"{run}-run"))[0] for run in teachers[best])
    longer, jobs = {}, []
    for what, kind, extra in (("store's", best, store), ("store's and adaptation's", "as it is", store + adaptation)):
        key = f"V-2.1 of {kind}, with the {what} time more"
        longer[key] = [out / f"{key} seed{k}" for k in seeds]
        steps = round(s.steps + extra / step)
        jobs += [("V-2.1", teachers[kind][k], longer[key][k], k, steps) for k in seeds]
    with ThreadPoolExecutor(s.jobs) as pool:
        list(pool.map(lambda job: train(*job, s), jobs))

    text = ["| | steps | seconds | store, s | " + " | ".join(SHOWN) + " |", "|---" * (4 + len(SHOWN)) + "|"]
    for kind, folders in teachers.items():
        if kind != "as it is":
            text.append(row(f"teacher, {kind}", [Path(f"{folder}-run") for folder in folders]))
        text += [row(f"{version} of {kind}", runs) for (of, version), runs in students.items() if of == kind]
    text += [row(name, runs) for name, runs in longer.items()]
    for kind, version in students:
        if version != "V-2.1":
            difference = [distance(a) - distance(b) for a, b in zip(students[kind, "V-2.1"], students[kind, version])]
            text.append(f"\nV-2.1 - {version}, of {kind}, seed by seed: {cell(difference)}")
    (out / "table.md").write_text("\n".join(text) + "\n", "utf-8")
    print("\n".join(text))
    shown = {}
    for version in ("V-2.1", "V-2.2"):
        shown[f"{version} raw"], shown[version] = students["as it is", version], students[best, version]
    write_sheet(shown, out / "sheet.png")


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, limits={name: (1, None) for name in ("seeds", "jobs", "ranks")}))
