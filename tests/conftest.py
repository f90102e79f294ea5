"""What several tests use: the repository's root on the path, the drawn set, the embedded teacher, tiny folders."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch
from PIL import Image

import common  # noqa: F401
from common.teacher import load_teacher
from data.draw_mini import Painter, annotations, draw_mini, plan_set


def script(path: str):
    """A version's script as a module; their names are no identifiers."""
    sys.path.insert(0, str((ROOT / path).parent))
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").replace(".", "_"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


def lines(out: Path) -> list[dict]:
    """A run's metrics.jsonl, of which every line must be whole."""
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def mini():
    return draw_mini()


@pytest.fixture(scope="session")
def teacher():
    return load_teacher(str(ROOT / "checkpoints" / "mini-teacher"), torch.device("cpu"))


def make_small_set(root: Path) -> Path:
    """A COCO-format folder of 48 training and 16 validation scenes."""
    (root / "annotations").mkdir(parents=True)
    scenes, painter = plan_set(64), Painter()
    for split, part, first in (("train", scenes[:48], 1), ("val", scenes[48:], 49)):
        (root / split).mkdir()
        captions, _ = annotations(part, first)
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(captions))
        for image, (scene, _) in zip(captions["images"], part):
            Image.fromarray(painter.paint(scene)).save(root / split / image["file_name"])
    return root


@pytest.fixture(scope="session")
def small_set(tmp_path_factory):
    return make_small_set(tmp_path_factory.mktemp("small set"))


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
