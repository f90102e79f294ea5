"""The model card of a saved student: what the hub reads, and nothing that is not known to be true."""

import pytest
import yaml
from conftest import ROOT, TEACHER
from huggingface_hub import ModelCard

from common import report

SCORES = {"parameters": 1_230_000, "samples": 8, "FD(effnet-lite0)": 12.345678, "caption accuracy": float("nan"),
          "seconds an image": 0.5}
TEACHERS = {"parameters": 13_000_000, "FD(effnet-lite0)": 3.0}


def card_of(teacher_name, data) -> tuple[dict, str]:
    """A card's metadata and its whole text."""
    card = report.model_card("V-9: 1.23 M student", str(teacher_name), data, "val", 32, SCORES, TEACHERS, "8 samples")
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


@pytest.mark.parametrize("name", ["checkpoints/mini-teacher", "./checkpoints/mini-teacher"])
def test_a_relative_path_is_no_hub_id(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    metadata, text = card_of(name, "data/mini")
    assert "base_model" not in metadata and metadata["license"] == "cc-by-sa-4.0" and "checkpoints/" not in text


def test_a_teacher_of_the_hub_is_the_base_model_and_gives_its_licence(monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        return ModelCard("---\nlicense: creativeml-openrail-m\n---\n")

    monkeypatch.setattr(report.ModelCard, "load", load)
    metadata, text = card_of("somebody/sd", "data/coco2017")
    assert metadata["base_model"] == "somebody/sd" and metadata["license"] == "creativeml-openrail-m"
    assert asked == ["somebody/sd"] and "creativeml-openrail-m" in text


def test_a_hub_without_a_card_gives_the_base_model_only(monkeypatch):
    def load(name):
        raise OSError("no network")

    monkeypatch.setattr(report.ModelCard, "load", load)
    metadata, text = card_of("somebody/sd", "data/coco2017")
    assert metadata["base_model"] == "somebody/sd" and "license" not in metadata
    assert "its licence, which its card does not name" in text
