"""Make a folder that is a Hugging Face Space: the page of v3/app.py with a student and its teacher.

    python v3/space.py --model checkpoints/v4-mini --teacher checkpoints/mini-teacher --out space
    cd space && python v3/app.py                          # shows here what the Space will show

The folder holds all that the page needs, and a README.md whose metadata tells the hub what to start. To send it:

    hf auth login && hf repos create NAME --type space --space-sdk gradio && hf upload NAME space --type space
"""

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from common.files import full_disk_is_one_line, model_place, name_of, put_in_place
from common.report import copy_weights, licence_of
from common.settings import parse, require, start
from common.teacher import load_teacher


@dataclass
class Settings:
    teacher: str = "checkpoints/mini-teacher"  # a pipeline folder or a hub id
    model: str = "checkpoints/v2.2"  # a student: a run's folder or a pipeline folder
    compare: str = ""  # another one
    out: str = "space"  # the folder to make


def main(s: Settings):
    out = Path(s.out)
    require(importlib.util.find_spec("gradio"), "the page needs gradio; pip install -r v3/requirements.txt")
    require(not out.exists(), f"{out} exists; name another folder with --out")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with full_disk_is_one_line(out.parent, "nothing was made", remove=partial):
        shutil.copytree(ROOT / "common", partial / "common", ignore=shutil.ignore_patterns("__pycache__"))
        (partial / "v3").mkdir()
        for name in ("v3/app.py", "v3/app.css", "v3/inference.py", "LICENSE"):
            shutil.copy(ROOT / name, partial / name)
        requirements = (ROOT / "requirements.txt").read_text("utf-8").split("# dev")[0].splitlines(keepends=True)
        (partial / "requirements.txt").write_text("".join(requirements[1:]), "utf-8")  # the first is a comment
        licences = set()
        for number, name in enumerate(filter(None, (s.teacher, s.model, s.compare))):
            model = load_teacher(model_place(name), torch.device("cpu"), what="the model")  # or it says what is wrong
            place = model.folder()
            title = name_of(model_place(name))
            if (partial / "checkpoints" / title).exists():
                title += f"-{number}"
            target = partial / "checkpoints" / title / ("student" if number else "")  # by which the page tells them
            for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
                copy_weights(place / part, target / part)
            for file in filter(Path.is_file, (place / "model_index.json", place / "README.md", *place.glob("sample-*.png"))):
                shutil.copy(file, target / file.name)
            licences.add(licence_of(str(place)))
        metadata = [
            "title: Light Stable Diffusion students", "sdk: gradio", f"sdk_version: {version('gradio')}", "app_file: v3/app.py"]
        if len(licences) == 1 and None not in licences:
            metadata.append(f"license: {licences.pop()}")
        lines = ["---", *metadata, "---", "One caption, one noise, several models: `python v3/app.py` starts the page.", ""]
        (partial / "README.md").write_text("\n".join(lines), "utf-8")
        put_in_place(partial, out)
    # from within, as the page takes a checkpoints/ of the folder that it is started from
    print(f"the Space lies in {out}; cd {out} && python v3/app.py shows it here")


if __name__ == "__main__":
    start(main, parse(Settings, __doc__))
