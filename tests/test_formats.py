"""Folders of people's own pictures: captions in .txt files, metadata.jsonl or metadata.csv, and what may be wrong with them."""

import csv
import json
import os
import random

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import ROOT, lines, refusal, run, run_apart, script
from PIL import Image

from common.coco import CocoCaptions
from common.metrics import Evaluator

data = script("v3/data.py")
import coco_dataset

VERSIONS = ["v1/1.py", "v2/2.1.py", "v2/2.2.py", "v3/train_student_kd.py", "v4/4.py", "checkpoints/adapt_teacher.py",
            "common/evaluate.py"]
CAPTIONS = {"a.png": ["a red square", "something red"], "sub/b é.png": ['a cat, "Tom"'], "sub/deeper/c.png": ["日本の猫"]}


def put(path, colour=(200, 40, 40), kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), colour).save(path, kind)


def write_captions(root, kind: str, captions: dict[str, list[str]]):
    """As a user would, in one of the three ways."""
    if kind == ".txt":
        for name, texts in captions.items():
            (root / name).with_suffix(".txt").write_text("\n".join(texts), "utf-8")
    elif kind == "metadata.jsonl":
        rows = [json.dumps({"file_name": name, "text": texts}, ensure_ascii=False) for name, texts in captions.items()]
        (root / kind).write_text("\n".join(rows), "utf-8")
    else:
        with open(root / kind, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "width", "text"])
            table.writerows([name, 40, text] for name, texts in captions.items() for text in texts)


def make_set(root, kind: str, captions: dict[str, list[str]]):
    for k, name in enumerate(captions):
        put(root / name, (7 * k % 256, 90, 31 * k % 256))
    write_captions(root, kind, captions)
    return root


def opened(root, **options) -> CocoCaptions:
    return CocoCaptions(root, "train2017", 32, **options)


def refused(root, **options) -> str:
    with pytest.raises(SystemExit) as error:
        opened(root, **options)
    line = str(error.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


KINDS = pytest.mark.parametrize("kind", [".txt", "metadata.jsonl", "metadata.csv"])


# ---- the formats ----


@KINDS
def test_every_format_gives_the_same_pictures_and_captions(tmp_path, kind):
    root = make_set(tmp_path / "my pictures", kind, CAPTIONS)
    dataset = opened(root)
    assert kind in dataset.format and dataset.skipped == {}
    assert dict(zip(dataset.files, dataset.captions)) == CAPTIONS and dataset.image_ids == dataset.files == list(CAPTIONS)
    assert dataset.path(1) == root / "sub" / "b é.png" and dataset[2].shape == (3, 32, 32)


@KINDS
def test_marks_windows_line_ends_and_names_of_any_script(tmp_path, kind):
    make_set(tmp_path, kind, CAPTIONS)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".txt", ".jsonl", ".csv"):
            text = path.read_text("utf-8").replace("\r\n", "\n")
            path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    dataset = opened(tmp_path)
    assert dict(zip(dataset.files, dataset.captions)) == CAPTIONS and dataset.skipped == {}


@KINDS
def test_a_picture_or_caption_that_is_missing_is_counted(tmp_path, kind):
    make_set(tmp_path, kind, CAPTIONS | {"empty.png": [" "], "gone.png": ["gone"], "../outside.png": ["not ours"]})
    (tmp_path / "gone.png").unlink()
    put(tmp_path / "without.png")
    dataset = opened(tmp_path)
    assert dataset.files == list(CAPTIONS)
    # a .txt speaks of the pictures that are there, metadata of those that it names
    wanted = {"no caption": 2} if kind == ".txt" else {"missing file": 2, "no caption": 1}
    assert dataset.skipped == wanted
    with pytest.raises(SystemExit, match=f"error: {sum(wanted.values())} of . pictures of .* cannot be used: .*empty.png"):
        dataset.require_share(0.05)


def test_usual_extensions_in_any_case_and_hidden_files(tmp_path):
    kinds = {"jpg": "JPEG", "JPEG": "JPEG", "PNG": "PNG", "webp": "WEBP", "bmp": "BMP", "Gif": "GIF", "TIF": "TIFF",
             "tiff": "TIFF"}
    for extension, kind in kinds.items():
        put(tmp_path / f"of {extension}.{extension}", kind=kind)
        (tmp_path / f"of {extension}.TXT").write_text("a picture", "utf-8")
    for name in (".DS_Store", "._of jpg.jpg", "._of jpg.txt", "Thumbs.db", "notes.txt", "film.mp4", ".git/a.jpg", ".git/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\xff")
    dataset = opened(tmp_path)
    assert dataset.files == sorted(f"of {extension}.{extension}" for extension in kinds) and dataset.skipped == {}
    assert all(picture is not None for picture in dataset)


def test_linked_folders_are_read_once(tmp_path):
    make_set(tmp_path / "elsewhere", ".txt", CAPTIONS)
    make_set(tmp_path / "set", ".txt", {"own.png": ["a dog"]})
    try:
        os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "linked", target_is_directory=True)
        os.symlink(tmp_path / "set", tmp_path / "elsewhere" / "around", target_is_directory=True)
    except OSError:
        pytest.skip("Windows makes links for administrators only")
    linked = [f"linked/{name}" for name in CAPTIONS]
    assert sorted(opened(tmp_path / "set").files) == sorted([*linked, "own.png"])


def test_pictures_of_one_name_share_its_captions_and_their_side(tmp_path):
    captions = {f"{k}.{extension}": [f"picture {k}"] for k in range(40) for extension in ("bmp", "png")}
    make_set(tmp_path, ".txt", captions)
    assert dict(zip(opened(tmp_path).files, opened(tmp_path).captions)) == captions
    for part in ((0, 0.5), (0.5, 1)):
        files = opened(tmp_path, part=part).files
        stems = [name[:-4] for name in files]
        assert 10 < len(files) < 70 and all(stems.count(stem) == 2 for stem in stems)


def test_metadata_may_say_text_caption_or_captions(tmp_path):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "caption": "two", "text": None},
            {"file_name": "c.png", "captions": ["three", " ", 3, "four"]}, {"file_name": "d.png", "size": 5},
            {"file_name": "a.png", "text": "another"}]
    for row in rows:
        put(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    dataset = opened(tmp_path)
    assert dataset.captions == [["one", "another"], ["two"], ["three", "four"]] and dataset.skipped == {"no caption": 1}


def test_a_csvs_captions_may_hold_commas_quotes_and_lines(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "b, c.png")
    text = 'caption,file_name\r\n"a ""red"" cat, asleep\r\non a sofa",a.png\r\n\r\nplain,"b, c.png"\r\nshort\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    dataset = opened(tmp_path)
    assert dict(zip(dataset.files, dataset.captions)) == {"a.png": ['a "red" cat, asleep on a sofa'], "b, c.png": ["plain"]}
    assert dataset.skipped == {"missing file": 1}


def test_one_picture_may_be_named_in_two_ways(tmp_path):
    put(tmp_path / "sub" / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n./sub/a.png,one\nsub//a.png,two\n", "utf-8")
    dataset = opened(tmp_path)
    assert dataset.files == ["sub/a.png"] and dataset.captions == [["one", "two"]]


# ---- what cannot be used is one line ----


@pytest.mark.parametrize("line", ["{", "3", '["a.png"]', "null", '{"text": "no name"}', '{"file_name": 5}', "[" * 100_000])
def test_a_line_that_is_no_json_is_named(tmp_path, line):
    put(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n\n' + line + "\n", "utf-8")
    assert "metadata.jsonl, line 3: no JSON object with a file_name" in refused(tmp_path)


@pytest.mark.parametrize("text, wrong", [
    ("", "line 1: no column file_name"), ("image;text\na.png;x\n", "line 1: no column file_name"),
    ("file_name,text\na.png,x\na.png,1girl, solo\n", "line 3: more fields than columns"),
    ('file_name,text\na.png,"x"\na.png,"y" z\n', "line 3: no CSV"), ('file_name,text\na.png,"x\n', "line 2: no CSV")])
def test_what_is_no_csv_is_named(tmp_path, text, wrong):
    put(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text, "utf-8")
    assert f"metadata.csv, {wrong}" in refused(tmp_path)


def test_a_text_in_another_encoding_is_named(tmp_path):
    make_set(tmp_path, ".txt", CAPTIONS)
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert "a.txt is not text in UTF-8" in refused(tmp_path)


@pytest.mark.parametrize("first, second", [
    (".txt", "metadata.jsonl"), (".txt", "metadata.csv"), ("metadata.jsonl", "metadata.csv"), ("COCO", ".txt"),
    ("COCO", "metadata.csv")])
def test_two_formats_at_once_are_both_named(tmp_path, first, second):
    for kind in (first, second):
        if kind == "COCO":
            (tmp_path / "annotations").mkdir()
            (tmp_path / "annotations" / "captions_train2017.json").write_text("{}", "utf-8")
        else:
            make_set(tmp_path, kind, CAPTIONS)
    line = refused(tmp_path)
    assert first in line and second in line and "keep one of them" in line


@pytest.mark.parametrize("kind", [".txt", "metadata.jsonl", "metadata.csv"])
def test_no_caption_at_all_is_one_line(tmp_path, kind):
    make_set(tmp_path, kind, {name: [""] for name in CAPTIONS})
    assert "has 0 usable pictures (captions in" in refused(tmp_path) and "3 no caption, such as a.png" in refused(tmp_path)


@pytest.mark.parametrize("path", [*VERSIONS, "v3/data.py"])
def test_a_folder_of_no_format_is_one_line_that_names_them_all(tmp_path, path):
    put(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "about.txt").write_text("holiday", "utf-8")
    place = "--sheet" if path == "common/evaluate.py" else "--out"
    line = refusal(path, "--data", tmp_path / "pictures", place, tmp_path / "x.png")
    for name in ("COCO", ".txt", "metadata.jsonl", "metadata.csv", "download_coco.py"):
        assert name in line
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("path", [*VERSIONS, "v3/data.py"])
def test_the_repositorys_own_data_is_found_from_elsewhere(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert refusal(path, "--data", "docs").startswith(f"error: {ROOT / 'docs'} holds no captioned pictures")


# ---- what is held out ----


@KINDS
def test_adding_pictures_moves_none_to_the_other_side(tmp_path, kind):
    captions = {f"folder {k % 3}/{k}.png": [f"picture {k}"] for k in range(300)}
    make_set(tmp_path, kind, dict(list(captions.items())[::2]))

    def sides(share=0.2):
        return [set(opened(tmp_path, part=part).files) for part in ((0, share), (share, 1))]

    held_out, rest = sides()
    assert held_out | rest == set(list(captions)[::2]) and not held_out & rest
    assert 12 < len(held_out) < 50  # 30 expected, four sigmas are 20
    make_set(tmp_path, kind, captions)
    more_held_out, more_rest = sides()
    assert held_out < more_held_out and rest < more_rest and len(more_held_out | more_rest) == 300
    wider, _ = sides(0.4)
    assert more_held_out < wider


def test_a_share_that_leaves_a_side_too_few_pictures_is_one_line(tmp_path):
    make_set(tmp_path, ".txt", CAPTIONS)
    assert "has 0 usable pictures in the 1% of this side (change it with --val-share)" in refused(tmp_path, part=(0, 0.01))
    assert "and needs 2; left out: none" in refused(tmp_path, part=(0, 0))
    assert "--val-share" in refused(tmp_path, part=(0.999, 1))
    assert len(opened(tmp_path, part=(0, 1))) == 3


def test_the_embedded_world_and_coco_are_not_parted(small_set):
    whole = CocoCaptions(small_set, "train", 32)
    assert whole.format == "COCO's annotations" and len(whole) == 48
    assert CocoCaptions(small_set, "train", 32, part=(0.5, 1)).fingerprint() == whole.fingerprint()


def test_the_fingerprint_of_a_coco_set_is_what_it_always_was(tmp_path):
    names = ["é.png", "b.jpg", "c.jpg"]
    for folder in ("annotations", "train"):
        (tmp_path / folder).mkdir()
    for k, name in enumerate(names):
        (tmp_path / "train" / name).write_bytes(b"x" * (k + 1))
        os.utime(tmp_path / "train" / name, ns=(0, 10**18 + 100 * k))
    content = {"images": [{"id": 7 - k, "file_name": name} for k, name in enumerate(names)],
               "annotations": [{"image_id": 7 - k, "caption": c} for k in range(3) for c in (f" a  cat {k}", "café")]}
    (tmp_path / "annotations" / "captions_train.json").write_text(json.dumps(content), "utf-8")
    assert CocoCaptions(tmp_path, "train", 32).fingerprint() == "cb328d0f525494b876111b73"  # by the code of COCO alone


@KINDS
def test_the_fingerprint_of_own_pictures_sees_captions_and_sides_and_no_format(tmp_path, kind):
    root = make_set(tmp_path, kind, CAPTIONS)
    first = opened(root).fingerprint()
    assert opened(root).fingerprint() == CocoCaptions(root, "other", 32).fingerprint() == first
    write_captions(root, kind, CAPTIONS | {"a.png": ["a blue square"]})
    assert opened(root).fingerprint() != first


def test_a_trial_takes_pictures_from_all_over_the_set(tmp_path):
    names = [f"{k:04}.png" for k in range(2500)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    write_captions(tmp_path, "metadata.jsonl", {name: [f"picture {name}"] for name in names})
    for reach, kept in ((1, names[::2]), (600, names[::2]), (700, names), (10**9, names), (0, names)):
        assert opened(tmp_path, reach=reach).files == kept
    trial = opened(tmp_path, reach=1)
    assert trial.describe(1250, "training") == "1,250 training pictures, one in 2 of the set: these steps need no more"
    assert trial.fingerprint() != opened(tmp_path).fingerprint()  # a cache of its own
    for name in names[1000:1100]:
        (tmp_path / name).unlink()
    trial = opened(tmp_path, reach=1)
    assert trial.skipped == {"missing file": 50}
    with pytest.raises(SystemExit, match="50 of 1,250 pictures"):
        trial.require_share(0.03)


# ---- whole scripts ----


@pytest.mark.parametrize("path", VERSIONS)
def test_every_script_says_which_format_it_found(tmp_path, path):
    root = make_set(tmp_path / "my pictures", "metadata.csv", {f"{k}.png": [f"picture {k}"] for k in range(40)})
    place = [] if path == "common/evaluate.py" else ["--out", tmp_path / "x"]
    done = run(path, "--data", root, "--val-share", "0.3", "--teacher", tmp_path / "no teacher", "--device", "cpu", *place)
    assert done.returncode == 1 and "no teacher" in done.stderr.splitlines()[-1]  # which is loaded after that
    assert f"data: {root}, captions in metadata.csv" in done.stdout.splitlines()


def test_shards_hold_the_training_side_of_own_pictures(tmp_path):
    captions = {f"sub/{k}.png": [f"picture {k}", "another"] for k in range(40)}
    root = make_set(tmp_path / "my pictures", ".txt", captions)
    done = run("v3/data.py", "--data", root, "--val-share", "0.3", "--shard-size", "10", "--out", tmp_path / "shards")
    assert done.returncode == 0 and f"data: {root}, captions in .txt files" in done.stdout, done.stderr
    found = list(coco_dataset.samples(coco_dataset.find_shards(str(tmp_path / "shards"))))
    held_out = opened(root, part=(0, 0.3)).files
    assert len(found) + len(held_out) == 40
    for sample in found:
        name = json.loads(sample["json"])["image_id"]
        assert name not in held_out and sample["png"] == (root / name).read_bytes()
        assert coco_dataset.sample_captions(sample) == captions[name]
        assert coco_dataset.decode_sample(sample, 32, random.Random(0)) is not None


def test_more_samples_than_pictures_are_as_many_as_there_are(tmp_path, teacher):
    root = make_set(tmp_path / "my pictures", "metadata.jsonl", {f"{k}.png": [f"a cat number {k}"] for k in range(40)})
    val_set = opened(root, limit=5_000, part=(0, 0.3))
    sampling = dict(sampler="ddim", steps=1, guidance=1.0, seed=0, size_px=32, batch=100)
    evaluator = Evaluator("effnet-lite0", val_set, teacher, tmp_path / "cache", Accelerator(cpu=True), sampling)
    evaluation = evaluator.evaluate(teacher.unet, 500)
    assert 2 <= len(val_set) < 40 and len(evaluation.images) == evaluation.scores["samples"] == len(val_set)
    assert evaluation.captions == [f"a cat number {name[:-4]}" for name in val_set.files]
    assert np.isfinite(list(evaluation.scores.values())).all()


@pytest.mark.slow
def test_200_own_pictures_at_the_true_size(tmp_path):
    """SD-1.5's size and layout, Inception's and AlexNet's too, random weights: as a user would type it."""
    stand_in = script("bench/stand_in.py")
    stand_in.make_metric_networks(tmp_path / "torch" / "hub" / "checkpoints")
    stand_in.make_teacher(tmp_path / "sd15")
    root = make_set(tmp_path / "my-pictures", ".txt", {f"{k}.png": [f"picture {k}"] for k in range(200)})
    held_out = len(opened(root, part=(0, 0.05)))
    assert 2 <= held_out < 25
    done = run_apart("v2/2.2.py", "--data", root, "--teacher", tmp_path / "sd15", "--device", "cpu", "--steps", "2",
                     "--batch-size", "2", "--store", "0", "--no-cache", "--eval-every", "1", "--sample-steps", "2",
                     "--out", tmp_path / "run", "--cache-folder", tmp_path / "cache",
                     env=os.environ | {"TORCH_HOME": str(tmp_path / "torch")})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"data: {root}, captions in .txt files beside the pictures" in done.stdout
    assert f"{200 - held_out} training pictures" in done.stdout
    rows = [line["evaluation"] for line in lines(tmp_path / "run") if "evaluation" in line]
    assert [row["samples"] for row in rows] == [held_out] * 2 and {"FID", "KID", "LPIPS"} <= set(rows[-1])
    assert np.isfinite(list(rows[-1].values())).all()
    card = (tmp_path / "run" / "student" / "README.md").read_text("utf-8")
    assert "name: my-pictures (held out)" in card and f"{held_out} samples" in card
