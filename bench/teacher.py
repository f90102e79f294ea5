"""What students of the embedded world learn at a resolution away from their teacher's own, before and after it is adapted.

    python bench/teacher.py --jobs 2     # three seeds: two hours on 2 slow cores; stopped, the same command goes on

V-2.1 and V-2.2 are trained from the teacher as it is, from one adapted by adapters of each of --ranks and from one adapted
whole, with equal steps and seeds; the other versions from the first and the one with the highest rank. V-2.1 also trains for
as long as V-2.2 takes with its store: once beside the making of the store, and once, from the teacher as it is, with the
adaptation counted in as well. Writes table.md and sheet.png into --out; `--table` does so with the runs that are done.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from compare import METRICS, STUDENT, V1_BLOCKS, cell, is_done, seconds_of, steps_begun_with, write_sheet

from common.run import read_log
from common.settings import parse, start

RAW = "the teacher as it is"
VERSIONS = {  # name: script and options
    "V-1": ("v1/1.py", STUDENT + V1_BLOCKS),
    "V-2.1": ("v2/2.1.py", STUDENT),
    "V-2.2": ("v2/2.2.py", STUDENT),
    "V-2.2 that believes all": ("v2/2.2.py", [*STUDENT, "--no-weigh-teacher"]),
    "V-3 with features": ("v3/train_student_kd.py", ["--feature-weight", 0.1, "--store", 0]),
}
FIRST = ("V-2.1", "V-2.2", "V-2.2 that believes all")
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
    table: bool = False  # train nothing, write the table of what is done


@dataclass
class Job:
    """A student's training: the version, the kind of its teacher, the seed and the steps. `teacher` is its folder."""

    version: str
    kind: str
    seed: int
    steps: int
    teacher: Path
    out: Path


def run(command: list, out: Path, s: Settings):
    """A script of the repository's in the folder `out`, from the beginning or going on."""
    resume = ["--resume"] if (out / "settings.json").is_file() else []
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // s.jobs))}
    common = ["--mini", "--resolution", s.resolution, "--eval-every", 0, "--final-samples", s.samples]
    print(out.name, flush=True)
    with open(f"{out}.log", "a") as log:
        subprocess.run([sys.executable, *map(str, [*command, *common, *resume])], check=True, cwd=ROOT, stdout=log, stderr=log,
                       env=os.environ | threads)


def train(job: Job, how: list, lock: Lock, s: Settings):
    """Adapt the student's teacher, `how` as the options say, unless that has been done, and train the student."""
    with lock:
        if not job.teacher.is_dir():
            run(["checkpoints/adapt_teacher.py", "--out", job.teacher, "--seed", job.seed, "--steps", s.steps, *how],
                Path(f"{job.teacher}-run"), s)
    if not is_done(job.out, job.steps):
        script, options = VERSIONS[job.version]
        own = ["--teacher", job.teacher, "--out", job.out, "--seed", job.seed, "--steps", job.steps]
        run([script, *own, *options], job.out, s)


def evaluation(out: Path) -> dict:
    """A run's last."""
    return [x for x in read_log(out) if "evaluation" in x][-1]["evaluation"]


def row(name: str, outs: list[Path]) -> str:
    """Of the table: means and standard deviations over the seeds."""
    cells = [cell([evaluation(out)[metric] for out in outs]) for metric in SHOWN]
    steps = max(x["step"] for x in read_log(outs[0]))
    seconds = [seconds_of(out) for out in outs]
    return (f"| {name} | {len(outs)} | {steps:,} | {cell([t for t, _ in seconds])} | {max(t for _, t in seconds):.0f} | "
            + " | ".join(cells) + " |")


def write_table(jobs: list[Job], path: Path):
    """Markdown: a row for each kind of run that is done, over the seeds; below, what tells one from another seed by seed."""
    text = ["| | seeds | steps | seconds | store, s | " + " | ".join(SHOWN) + " |", "|---" * (5 + len(SHOWN)) + "|"]
    done, teachers = {}, {}
    for job in jobs:
        if is_done(job.out, job.steps):
            done.setdefault((job.kind, job.version, job.out.name.split(" seed")[0]), {})[job.seed] = job.out
            if job.kind != RAW:
                teachers.setdefault(job.kind, set()).add(Path(f"{job.teacher}-run"))
    text += [row(f"teacher, {kind}", sorted(runs)) for kind, runs in teachers.items()]
    text += [row(name, list(runs.values())) for (_, _, name), runs in sorted(done.items())]
    plain = {kind: runs for (kind, version, name), runs in done.items() if name == f"V-2.1 of {kind}"}
    for (kind, _, name), runs in sorted(done.items()):
        shared = sorted(plain.get(kind, {}).keys() & runs.keys())
        if shared and runs is not plain[kind]:
            difference = [evaluation(plain[kind][k])[SHOWN[0]] - evaluation(runs[k])[SHOWN[0]] for k in shared]
            text.append(f"\nV-2.1 of {kind} - {name}, seed by seed: {cell(difference)}")
    path.write_text("\n".join(text) + "\n", "utf-8")
    print("\n".join(text))


def main(s: Settings):
    out = ROOT / s.out
    out.mkdir(parents=True, exist_ok=True)
    best = f"rank {s.ranks[-1]}"
    how = {RAW: []} | {f"rank {rank}": ["--rank", rank] for rank in s.ranks[::-1]} | {"whole": ["--full", "--lr", "5e-4"]}

    def job(version: str, kind: str, seed: int, steps: int = s.steps, name: str = "") -> Job:
        teacher = ROOT / "checkpoints" / "mini-teacher" if kind == RAW else out / f"teacher {kind} seed{seed}"
        return Job(version, kind, seed, steps, teacher, out / f"{name or f'{version} of {kind}'} seed{seed}")

    first = [job(version, kind, seed) for seed in range(s.seeds) for kind in (RAW, best) for version in FIRST]
    others = [job(version, kind, 0) for kind in how if kind not in (RAW, best) for version in FIRST[:2]]
    others += [job(version, kind, seed) for seed in range(s.seeds) for kind in (RAW, best) for version in VERSIONS]
    others += [job(version, kind, seed) for seed in range(s.seeds) for kind in how for version in FIRST[:2]]
    locks = {(kind, seed): Lock() for kind in how for seed in range(s.seeds)}

    def train_all(jobs: list[Job]):
        if not s.table:
            with ThreadPoolExecutor(s.jobs) as pool:
                list(pool.map(lambda job: train(job, how[job.kind], locks[job.kind, job.seed], s), jobs))

    train_all(first)
    # as much time as V-2.2 of the best adapters takes: without the adaptation (the second student on) and with it
    done = [job for job in first if is_done(job.out, job.steps)]  # all of them, but for --table
    step_s = [seconds_of(job.out)[0] / s.steps for job in done if job.version == "V-2.1"]
    stores = [seconds_of(job.out)[1] for job in done if job.version == "V-2.2" and job.kind == best]
    adaptations = [seconds_of(Path(f"{job.teacher}-run"))[0] for job in done if job.kind == best]
    longer = []
    if step_s and stores:
        store, both = median(stores), median(stores) + median(adaptations)
        for kind, extra, what in ((best, store, "store's"), (RAW, both, "store's and adaptation's")):
            name = f"V-2.1 of {kind}, and the {what} time"
            for seed in range(s.seeds):
                again = steps_begun_with(out / f"{name} seed{seed}")
                longer.append(job("V-2.1", kind, seed, again or round(s.steps + extra / median(step_s)), name))
    train_all(longer)
    train_all(others)
    unique = {job.out: job for job in first + longer + others}
    write_table(list(unique.values()), out / "table.md")
    shown = {"V-2.2 that\nbelieves all": job(FIRST[2], RAW, 0).out, "V-2.2": job("V-2.2", RAW, 0).out,
             "teacher,\nadapted": Path(f"{job('V-2.2', best, 0).teacher}-run"), "V-2.2 of it": job("V-2.2", best, 0).out}
    write_sheet({name: [run] for name, run in shown.items()}, out / "sheet.png")


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, limits={name: (1, None) for name in ("seeds", "jobs", "ranks")}))
