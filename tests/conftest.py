"""What several tests use: scripts as modules and as runs, drawn sets, the embedded teacher, folders of the session's own."""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# One thread a process, of which two test at once; and runs that are compared add up in the same order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import common  # noqa: F401

# isort: split
import diffusers
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState

import data.draw_mini as drawing
from common import precision
from common.teacher import load_teacher

TEACHER = ROOT / "checkpoints" / "mini-teacher"


@contextlib.contextmanager
def path_of(script: Path):
    """sys.path as it is while the script runs, and afterwards as it was."""
    before = list(sys.path)
    sys.path.insert(0, str(script.parent))
    try:
        yield
    finally:
        sys.path[:] = before


def script(path: str):
    """A version's script as a module; their names are no identifiers."""
    name = path.replace("/", "_").replace(".", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        with path_of(ROOT / path):
            spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def v3_in_path(monkeypatch):
    """For workers that are not forked (macOS, Windows, Python 3.14): they import anew the modules of what they are given."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "v3")])


def run(path: str, *arguments) -> SimpleNamespace:
    """`python path arguments` in this process, which has loaded the libraries already: returncode, stdout, stderr.

    Any other end than a SystemExit is a failure of the test. Accelerate keeps the device of the process's first run, which on
    a machine with a GPU need not be this one's, and is made to forget it.
    """
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    code, printed, errors = 0, io.StringIO(), io.StringIO()
    libraries = [library.utils.logging for library in (diffusers, transformers)]
    verbosity = [logging.get_verbosity() for logging in libraries]
    with path_of(ROOT / path), warnings.catch_warnings(), mock.patch.object(sys, "argv", [path, *map(str, arguments)]), \
            contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                code = print(code, file=sys.stderr) or 1
        finally:
            for logging, level in zip(libraries, verbosity):
                logging.set_verbosity(level)
                logging.enable_progress_bar()
    return SimpleNamespace(returncode=code, stdout=printed.getvalue(), stderr=errors.getvalue())


def run_apart(*arguments, **options) -> subprocess.CompletedProcess:
    """`python arguments` in a process of its own."""
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, **options)


def process(rank: int = 0, processes: int = 1) -> SimpleNamespace:
    """What Accelerate says to one of several processes on the CPU, as far as what draws batches asks it."""
    return SimpleNamespace(device=torch.device("cpu"), process_index=rank, num_processes=processes)


def refusal(path: str, *arguments) -> str:
    """The line with which a script refuses what it was given."""
    done = run(path, *arguments)
    last = done.stderr.rstrip("\n").splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: "), done.stdout + done.stderr
    return last


def lines(out: Path) -> list[dict]:
    """A run's metrics.jsonl, of which every line must be whole."""
    return [json.loads(x) for x in (out / "metrics.jsonl").read_bytes().decode("utf-8").splitlines()]


@pytest.fixture(scope="session")
def mini():
    """The whole drawn set, which takes half a minute: for slow tests."""
    return drawing.draw_mini()


@pytest.fixture(scope="session")
def teacher():
    return load_teacher(str(TEACHER), torch.device("cpu"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The session's own --cache-folder."""
    return tmp_path_factory.mktemp("cache")


def make_small_set(root: Path) -> Path:
    """48 training and 16 validation scenes, drawn as data/mini is, so that `--mini --data` takes them too."""
    with mock.patch.dict(drawing.SPLITS, train=48, val=16), contextlib.redirect_stderr(io.StringIO()):
        return drawing.draw_mini(root)


@pytest.fixture(scope="session")
def small_set(tmp_path_factory):
    return make_small_set(tmp_path_factory.mktemp("drawn") / "small set")


@pytest.fixture
def kept_in_fp32(monkeypatch):
    """What is computed once is computed in fp32, on CPUs that multiply bf16 too: for comparisons with others' fp32."""
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 100 KB, and a function that makes it large enough."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)],
                                                 capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root on Linux")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    subprocess.run(["umount", str(disk)], check=True)
