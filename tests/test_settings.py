"""What the scripts' Settings have in common, text files' encoding, and that importing changes nothing for others."""

import ast
import os
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_apart

from common.run import read_log
from common.settings import LIMITS, parse, require_limits

SCRIPTS = ("v1/1.py", "v2/2.1.py", "v2/2.2.py", "v3/train_student_kd.py", "v4/4.py")
FIELD = re.compile(r"^    (\w+): ([^=\n]+) = (.*?)(?:  # (.*))?$", re.M)
DIFFERENT = {  # on purpose: what each version has its own default or words for
    "out": "each version's own folder",
    "cache": "V-2.2's and V-3's stores need it",
    "feature_weight": "V-3's takes the teacher's passes and is off",
    "feature_blocks": "V-3 takes all that fit",
    "channels": "V-3's student has other levels",
    "random_start": "V-3's start is not sliced where the widths stay",
    "batch_size": "V-3's is that of all processes",
    "eval_batch": "V-3's is each process's",
    "workers": "V-3's shards take as many as there are",
    "learned_guidance": "V-4's comes from a teacher that always has it",
    "steps": "V-4 has fewer states to learn",
    "sampler": "V-4's three are the teacher's, and one more",
    "sample_steps": "of them",
    "guidance": "of them",
    "cache_folder": "V-4 keeps trajectories there",
}


@dataclass
class Paths:
    out: str = ""
    also: tuple[str, ...] = ()
    prompt: str = ""


def fields(path: str) -> dict[str, tuple[str, str, str | None]]:
    """{name: (type, default, comment)} of a script's Settings, as they are written."""
    source = (ROOT / path).read_text("utf-8").split("\nclass Settings:\n")[1].split("\n\n\n")[0]
    return {name: (kind, default, comment) for name, kind, default, comment in FIELD.findall(source)}


def test_fields_are_read():
    found = fields("v2/2.1.py")
    assert found["lr"] == ("float", "2e-4", "OneCycleLR's highest learning rate") and len(found) > 40


def test_a_setting_of_several_scripts_is_the_same_in_all_of_them():
    versions = {path: fields(path) for path in SCRIPTS}
    names = [name for found in versions.values() for name in found]
    shared, differing = {name for name in names if names.count(name) > 1}, {}
    for name in shared:
        written = {found[name] for found in versions.values() if name in found}
        if len(written) > 1:
            differing[name] = written
    assert differing.keys() - DIFFERENT.keys() == set(), differing
    assert DIFFERENT.keys() <= differing.keys()  # none is in the list that need not be
    assert len(shared) > 35


def text_files_without_encoding(path) -> list[str]:
    """Calls that open a text file in whatever encoding the machine has."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        constants = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name == "open" and isinstance(node.func, ast.Name):
            named = any(k.arg == "encoding" for k in node.keywords) or any("b" in mode for mode in constants)
        elif name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
            named = any(k.arg == "encoding" for k in node.keywords) or "utf-8" in constants
        else:
            continue
        if not named:
            found.append(f"{path.name}:{node.lineno}")
    return found


def test_every_text_file_is_opened_as_utf_8():
    paths = [*(ROOT / "common").glob("*.py"), *(ROOT / path for path in SCRIPTS), *(ROOT / "v3").glob("*.py")]
    assert [call for path in paths for call in text_files_without_encoding(path)] == []


def test_the_users_folder_is_found_where_the_shell_leaves_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script", "--out=~/run", "--also", "~/a,~b", "--prompt", "~ 20 cats"])
    found = parse(Paths, "")
    home = os.path.expanduser("~")
    assert (found.out, found.also, found.prompt) == (f"{home}/run", (f"{home}/a", "~b"), "~ 20 cats")


def test_a_log_is_read_as_utf_8_but_for_a_line_that_a_kill_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes('{"step": 1, "note": "é 日"}\n{"step": 2, "lo'.encode())
    assert read_log(tmp_path) == [{"step": 1, "note": "é 日"}]
    assert read_log(tmp_path / "none") == []


@pytest.mark.parametrize("name, value, said", [
    ("ema_decay", 1.0, "0..0.999999999"), ("seed", 2**32, "0..4294967295"), ("sample_steps", 1000, "1..999"),
    ("warmup", 1.0, "1e-06..0.999999"), ("val_share", 1.0, "0..0.9")])
def test_a_value_outside_of_its_limits_is_told_them(name, value, said):
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} must lie in {re.escape(said)}$"):
        require_limits(SimpleNamespace(**{name: value}), LIMITS)


LOOK = """
import json, os, signal, sys, warnings
def everywhere():
    return {"excepthook": sys.excepthook is sys.__excepthook__, "path": list(sys.path), "environment": dict(os.environ),
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]}
def libraries():
    import diffusers, torch, transformers
    loggings = [library.utils.logging for library in (diffusers, transformers)]
    return {"verbosity": [logging.get_verbosity() for logging in loggings], "filters": list(warnings.filters),
            "bars": [diffusers.utils.logging._tqdm_active, transformers.utils.logging.is_progress_bar_enabled()],
            "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "autograd": torch.is_grad_enabled()}
import torch
before = everywhere()
import common
assert everywhere() == before and before["excepthook"], (before, everywhere())
import accelerate, filelock, huggingface_hub, matplotlib.figure, tqdm, diffusers, transformers  # what these do is their affair
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel
before = everywhere() | libraries()
"""


@pytest.mark.slow
def test_importing_common_changes_nothing_for_others():
    """All of its modules but the command, which stands for itself."""
    modules = sorted(path.stem for path in (ROOT / "common").glob("*.py") if path.stem not in ("__init__", "evaluate"))
    ours = "".join(f"import common.{name}\n" for name in modules)
    done = run_apart("-c", LOOK + ours + "after = everywhere() | libraries()\nassert after == before, (before, after)\n")
    assert done.returncode == 0 and done.stdout == "" and len(modules) >= 14, done.stderr[-3000:]


@pytest.mark.slow
def test_torchvisions_operators_are_declared_where_it_cannot_load(tmp_path):
    """A torchvision whose import fails as that of a CUDA build does beside a CPU-only torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n", "utf-8")
    program = (f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nimport common, torch\n"
               "print(hasattr(torch.ops.torchvision, 'nms'), 'torchvision' in sys.modules)\n")
    done = run_apart("-c", program)
    assert done.returncode == 0 and done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.slow
def test_another_error_of_torchvision_is_not_hidden(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('the disk is on fire')\n", "utf-8")
    done = run_apart("-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nimport common\n")
    assert done.returncode == 1 and "the disk is on fire" in done.stderr
