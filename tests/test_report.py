"""What people look at: the model card that the hub reads, the closing table, curves, sheets."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, TEACHER, run, script
from matplotlib.figure import Figure
from PIL import Image

from common import report

SCORES = {"parameters": 1_230_000, "samples": 8, "FD(effnet-lite0)": 12.345678, "one object right": float("nan"),
          "seconds an image": 0.5}
TEACHERS = {"parameters": 13_000_000, "FD(effnet-lite0)": 3.0}


def card_of(teacher_name, data) -> tuple[dict, str]:
    """A card's metadata and its whole text."""
    val_set = SimpleNamespace(root=Path(data), split="val", size_px=32)
    card = report.model_card("V-9: 1.23 M student", str(teacher_name), val_set, SCORES, TEACHERS, "8 samples")
    text = str(card)
    return yaml.safe_load(text.split("---\n")[1]), text


def test_the_embedded_teachers_student_keeps_its_licence_and_names_no_path():
    metadata, text = card_of(TEACHER, ROOT / "data" / "mini")
    assert metadata["license"] == "cc-by-sa-4.0" and "keep its licence, cc-by-sa-4.0" in text
    assert "base_model" not in text and str(ROOT) not in text
    assert "`mini-teacher`" in text and "`mini`" in text and "1.23 M" in text and "32 px" in text
    (model,) = metadata["model-index"]
    found = {metric["type"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    assert found == {"FD(effnet-lite0)": 12.34568}  # what is a number, and no time


def test_a_local_teacher_without_a_card_gives_neither_licence_nor_base_model(tmp_path):
    (tmp_path / "private" / "my teacher").mkdir(parents=True)
    metadata, text = card_of(tmp_path / "private" / "my teacher", tmp_path / "private" / "my data")
    assert "license" not in metadata and "base_model" not in metadata and "base_model" not in text
    assert "its licence, which its card does not name, holds for them too" in text
    assert str(tmp_path) not in text and "private" not in text and "`my teacher`" in text


@pytest.mark.parametrize("said", ["true", "false", "{parameters: }", "{parameters: {num_inference_steps: 20}}"])
def test_a_card_that_others_wrote_says_nothing_of_how_to_draw(tmp_path, said):
    """As diffusers' own training scripts write it."""
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\ninference: {said}\n---\n", "utf-8")
    assert report.drawn_with(str(tmp_path)) == {}


@pytest.mark.parametrize("name", ["checkpoints/mini-teacher", "./checkpoints/mini-teacher"])
def test_a_relative_path_is_no_hub_id(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    metadata, text = card_of(name, "data/mini")
    assert "base_model" not in metadata and metadata["license"] == "cc-by-sa-4.0" and "checkpoints/" not in text


def test_a_folder_that_is_named_by_a_dot_has_its_own_name(monkeypatch, tmp_path):
    (tmp_path / "holiday").mkdir()
    monkeypatch.chdir(tmp_path / "holiday")
    metadata, text = card_of(".", ".")
    assert "made from `holiday` at 32 px on `holiday`." in text
    assert metadata["model-index"][0]["results"][0]["dataset"] == {"name": "holiday (val)", "type": "holiday"}


def test_a_teacher_of_the_hub_is_the_base_model_and_gives_its_licence(monkeypatch, tmp_path):
    asked, readme = [], tmp_path / "README.md"
    readme.write_text("---\nlicense: creativeml-openrail-m\n---\n", "utf-8")

    def fetch(name):
        asked.append(name)
        return readme

    monkeypatch.setattr(report, "card_on_hub", fetch)
    metadata, text = card_of("somebody/sd", "data/coco2017")
    assert metadata["base_model"] == "somebody/sd" and metadata["license"] == "creativeml-openrail-m"
    assert asked == ["somebody/sd"] and "creativeml-openrail-m" in text


def test_a_hub_without_a_card_gives_the_base_model_only(monkeypatch):
    def fetch(name):
        raise OSError("no network")

    monkeypatch.setattr(report, "card_on_hub", fetch)
    metadata, text = card_of("somebody/sd", "data/coco2017")
    assert metadata["base_model"] == "somebody/sd" and "license" not in metadata
    assert "its licence, which its card does not name" in text


@pytest.mark.parametrize("metadata", ["title: mine: the best", "- a list", "tags: [", ""])
def test_a_card_whose_metadata_cannot_be_read_says_nothing(tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# A teacher\n", "utf-8")
    assert report.drawn_with(str(tmp_path)) == {} and report.licence_of(str(tmp_path)) is None
    assert script("checkpoints/adapt_teacher.py").adapted_to(SimpleNamespace(folder=lambda: tmp_path)) == 0


def test_a_card_shows_its_pictures(monkeypatch):
    monkeypatch.setattr(report, "licence_of", lambda name: None)
    captions = ['a "cat"', "a dog"]
    val_set = SimpleNamespace(root=Path("data"), split="val", size_px=32)
    card = report.model_card("V-9", "nowhere", val_set, SCORES, TEACHERS, "8 samples", captions=captions)
    metadata = yaml.safe_load(str(card).split("---\n")[1])
    assert metadata["widget"] == [{"text": 'a "cat"', "output": {"url": "sample-0.png"}},
                                  {"text": "a dog", "output": {"url": "sample-1.png"}}]
    assert '<img src="sample-0.png" width="128" title="a &quot;cat&quot;">' in str(card)


def test_the_closing_table_stands_on_end_and_says_what_is_better():
    text = report.scores_table({"teacher": TEACHERS, "student": SCORES}).splitlines()
    assert text == [
        "                    teacher  student",
        "parameters          13.00 M   1.23 M",
        "FD* ↓ !                   3    12.35",
        "samples                   -        8",
        "one object right ↑        -        -",
        "seconds an image ↓        -      0.5",
        "* of EfficientNet-lite0's features, not Inception's",
        "! fewer samples than the features have dimensions: compare it at 8 samples only",
    ]


def test_a_fid_of_few_samples_is_marked_and_one_of_many_is_not():
    assert report.label("FID", 2047) == "FID ↓ !" and report.label("FID", 2048) == "FID ↓"
    assert report.label("KID to reconstructions", 5) == "KID to reconstructions ↓"


def test_long_titles_take_several_lines_and_not_the_width():
    columns = {"teacher, 50 passes": TEACHERS} | {f"student, {passes} passes": SCORES for passes in (1, 2, 4, 8)}
    lines = report.scores_table(columns).splitlines()
    assert max(map(len, lines)) <= 80


def test_curves_have_a_panel_a_metric_three_a_row_and_the_teachers_line(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    log = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    scores = {"parameters": 1, "samples": 9, "FD(effnet-lite0)": 5.0, "KID": 0.1, "PD": 3.0, "seconds an image": 0.1}
    log += [{"step": step, "evaluation": scores, "teacher": {"FD(effnet-lite0)": 2.0}} for step in (4, 8)]
    report.save_curves(tmp_path / "curves.png", log)
    loss, *panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == ["FD* ↓", "KID ↓", "PD ↓"] and loss.get_yscale() == "log"
    raw, smooth = loss.lines
    assert list(raw.get_ydata()) == [1 / step for step in range(1, 9)] and smooth.get_ydata()[1] == 0.75
    line, dotted = panels[0].lines
    assert list(line.get_xdata()) == [4, 8] and line.get_marker() == "o" and set(dotted.get_ydata()) == {2.0}
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (960, 480)


def test_a_sheet_names_its_rows(tmp_path):
    images = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    report.save_sheet(tmp_path / "sheet.png", {"teacher": images, "student": images}, ["a", "b", "c"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (report.MARGIN_PX + 3 * report.CELL_PX, 2 * report.CELL_PX + report.LABEL_PX)
        for row in range(2):
            place = (0, row * report.CELL_PX, report.MARGIN_PX, (row + 1) * report.CELL_PX)
            assert sheet.crop(place).convert("L").getextrema() != (255, 255)


def test_the_table_of_a_comparison_that_has_only_begun_holds_the_runs_that_are_done(tmp_path):
    out = tmp_path / "compare"
    done = run("bench/teacher.py", "--table", "--out", out, "--steps", "20")
    assert done.returncode == 0 and len((out / "table.md").read_text("utf-8").splitlines()) == 2, done.stderr
    finished, begun = out / "V-2.1 of the teacher as it is seed0", out / "V-2.2 of the teacher as it is seed0"
    for folder, step in ((finished, 20), (begun, 10)):
        (folder / "student").mkdir(parents=True)
        scores = dict.fromkeys(script("bench/compare.py").METRICS, 2.0)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "seconds": 9.0, "evaluation": scores}) + "\n", "utf-8")
    (finished / "samples").mkdir()
    row = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    report.save_sheet(finished / "samples" / "step_000020.png", {"teacher": row, "student": row}, ["a cat"] * 8)
    done = run("bench/teacher.py", "--table", "--out", out, "--steps", "20")
    assert done.returncode == 0 and [line.split("|")[1] for line in done.stdout.splitlines()[2:]] == [
        " V-2.1 of the teacher as it is "], done.stderr
    script("bench/compare.py").write_sheet({"V-2.1": [finished], "V-2.2": [begun]}, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height == 2 * report.CELL_PX + report.LABEL_PX


@pytest.mark.slow
def test_the_bench_times_every_part_of_the_embedded_world(small_set, cache, monkeypatch, capsys):
    speed = script("bench/speed.py")
    usual = speed.v22_settings
    monkeypatch.setattr(speed, "v22_settings", lambda s: replace(usual(s), data=str(small_set), cache_folder=str(cache)))
    speed.main(speed.Settings(batch=2, rounds=1, pictures=2))
    printed = capsys.readouterr().out
    assert "GFLOP/s" in printed and "largest difference to the pipeline's pictures" in printed
    assert [ours for ours in speed.AGAINST if f"{ours} against {speed.AGAINST[ours]}: " not in printed] == ["evaluation"]
