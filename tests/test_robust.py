"""Broken input is one clear line or is skipped and counted; caches mend themselves."""

import errno
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, process, refusal, run, run_apart, script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from common import cache, files
from common.cache import TrainingPairs, cached_array, damaged
from common.coco import CocoCaptions
from common.files import make_readable, put_in_place, read_tensors, write_atomically
from common.images import load_image
from common.report import copy_weights
from common.teacher import load_teacher
from data.draw_mini import draw_mini

CASES = int(os.environ.get("FUZZ_CASES", 200))
fuzz = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))


def jpeg(mode="RGB", size=(40, 30), format="JPEG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzzed set")
    (root / "train").mkdir()
    (root / "annotations").mkdir()
    (root / "train" / "a.jpg").write_bytes(jpeg())
    return root


def open_set(root):
    """The set, or the line that refuses it."""
    try:
        return CocoCaptions(root, "train", 32)
    except SystemExit as refused:
        assert str(refused).startswith("error: ") and "\n" not in str(refused)
        return None


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a.jpg"),
                      lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=6)
IMAGES = st.lists(st.fixed_dictionaries({}, optional={"id": VALUES, "file_name": VALUES, "width": VALUES}) | VALUES, max_size=4)
CAPTIONS = st.lists(
    st.fixed_dictionaries({}, optional={"id": VALUES, "image_id": VALUES, "caption": VALUES}) | VALUES, max_size=4)


@fuzz
@given(st.fixed_dictionaries({}, optional={"images": IMAGES | VALUES, "annotations": CAPTIONS | VALUES}) | VALUES)
@example({"annotations": []})
@example({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x" * 10_000}]})
def test_any_annotations_give_a_set_or_one_line(folder, content):
    (folder / "annotations" / "captions_train.json").write_text(json.dumps(content))
    found = open_set(folder)
    assert found is None or len(found) == len(found.captions) > 0 and all(c and all(c) for c in found.captions)


@fuzz
@given(st.binary(max_size=60))
def test_any_bytes_as_annotations_give_one_line(folder, content):
    (folder / "annotations" / "captions_train.json").write_bytes(content)
    assert open_set(folder) is None


WHOLE = [jpeg(), jpeg("CMYK"), jpeg("L"), jpeg("P", format="PNG"), jpeg("RGBA", format="PNG"), jpeg("I;16", format="PNG"),
         jpeg(size=(1, 1)), jpeg("LA", format="PNG"), jpeg(size=(3, 400)), jpeg(format="GIF"), jpeg(format="WEBP")]


@fuzz
@given(st.sampled_from(WHOLE), st.integers(0, 2**16), st.integers(0, 2**16), st.binary(max_size=4))
def test_any_picture_bytes_give_a_picture_or_none(folder, whole, cut, at, patch):
    """Cut short, and with a few bytes overwritten."""
    content = bytearray(whole[: cut % (2 * len(whole))])
    place = at % (len(content) + 1)
    content[place : place + len(patch)] = patch
    (folder / "train" / "a.jpg").write_bytes(content)
    (folder / "annotations" / "captions_train.json").write_text(json.dumps(
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}))
    picture = CocoCaptions(folder, "train", 32)[0]
    assert picture is None or picture.shape == (3, 32, 32) and picture.dtype == torch.uint8


@pytest.mark.parametrize("content", WHOLE)
def test_every_kind_of_picture_loads(content):
    assert load_image(io.BytesIO(content), 32).shape == (32, 32, 3)


def test_a_decompression_bomb_is_no_picture(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (folder / "train" / "a.jpg").write_bytes(jpeg(size=(100, 100)))
    (folder / "annotations" / "captions_train.json").write_text(json.dumps(
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}))
    assert CocoCaptions(folder, "train", 32)[0] is None


def test_too_many_broken_pictures_stop_with_one_line(small_set):
    dataset = CocoCaptions(small_set, "train", 32)
    dataset.require_share(0.0)
    for name in ("a.jpg", "b.jpg"):
        dataset.skip("cannot be decoded", name)
    dataset.require_share(2 / 50)
    with pytest.raises(SystemExit, match="2 of 50 .*a.jpg .cannot be decoded"):
        dataset.require_share(0.03)


def test_a_picture_outside_the_folder_is_not_read(folder, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    name = os.path.relpath(tmp_path / "secret.jpg", folder / "train")
    (folder / "train" / "a.jpg").write_bytes(jpeg())
    (folder / "annotations" / "captions_train.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": name}, {"id": 2, "file_name": "a.jpg"}],
        "annotations": [{"id": i, "image_id": i, "caption": "x"} for i in (1, 2)]}))
    dataset = CocoCaptions(folder, "train", 32)
    assert dataset.files == ["a.jpg"] and dataset.skipped["missing file"] == 1


def count_up(calls):
    def produce(start):
        for i in range(start, 50, 10):
            calls.append(i)
            yield list(range(i, i + 10)), i + 10, np.full((10, 4), i, np.float16)
    return produce


def test_what_only_the_checksum_finds_is_damaged(tmp_path):
    cached_array(tmp_path, "x", (50, 4), count_up([]), "row")
    path = tmp_path / "x.npy"
    content = path.read_bytes()
    assert damaged(tmp_path) == []
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert damaged(tmp_path) == [path]


def test_pictures_in_the_cache_that_cannot_be_read_are_damaged(tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file({"images": torch.ones(2, 3)}, whole)
    cut.write_bytes(whole.read_bytes()[:-4])
    assert torch.equal(read_tensors(whole)["images"], torch.ones(2, 3))
    assert read_tensors(cut) is None and read_tensors(tmp_path / "none.safetensors") is None
    assert damaged(tmp_path) == [cut]
    done = run("common/cache.py", tmp_path)
    assert done.returncode == 0 and "1 damaged files" in done.stdout and not cut.exists() and whole.exists()
    assert refusal("common/cache.py", tmp_path / "other") == f"error: there is no folder {tmp_path / 'other'}"


@pytest.mark.parametrize("damage", ["cut", pytest.param("changed", marks=pytest.mark.slow), "gone", "no record",
                                    "spoilt record", "other shape"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    calls = []
    want = np.array(cached_array(tmp_path, "x", (50, 4), count_up(calls), "row")[0])
    assert len(calls) == 5
    path, record = tmp_path / "x.npy", tmp_path / "x.json"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-8])
    elif damage == "changed":  # what only the checksum finds, on demand
        assert damaged(tmp_path) == []
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert damaged(tmp_path) == [path]
        done = run_apart("-m", "common.cache", tmp_path)
        assert done.returncode == 0 and f"{path} is damaged" in done.stdout and "1 damaged files" in done.stdout, done.stderr
        assert not path.exists() and damaged(tmp_path) == []
    elif damage == "gone":
        path.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "spoilt record":
        record.write_bytes(bytes(record.stat().st_size))
        assert damaged(tmp_path) == []
    else:
        np.save(path, np.zeros((50, 2), np.float16))
    found, _ = cached_array(tmp_path, "x", (50, 4), count_up(calls), "row")
    assert np.array_equal(found, want) and len(calls) == 10
    cached_array(tmp_path, "x", (50, 4), count_up(calls), "row")
    assert len(calls) == 10


@pytest.mark.slow
def test_two_runs_that_start_at_once_make_one_cache(tmp_path):
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport time, numpy as np\nfrom pathlib import Path\n"
               "from common.cache import cached_array\n"
               "def produce(start):\n    for i in range(start, 50):\n"
               "        print('made', flush=True)\n        time.sleep(0.01)\n"
               "        yield [i], i + 1, np.full((1, 4), i, np.float16)\n"
               f"a, _ = cached_array(Path({str(tmp_path)!r}), 'x', (50, 4), produce, 'row')\n"
               "assert (a[:, 0] == np.arange(50)).all()\n")
    runs = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    made = [run.communicate()[0].count("made") for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and sorted(made) == [0, 50]


def test_a_teacher_in_pickles_is_refused(teacher, tmp_path):
    folder = tmp_path / "teacher"
    for name in ("unet", "vae", "text_encoder"):
        getattr(teacher, name).save_pretrained(folder / name, safe_serialization=False)
    teacher.tokenizer.save_pretrained(folder / "tokenizer")
    teacher.noise_scheduler.save_pretrained(folder / "scheduler")
    with pytest.raises(SystemExit, match="error: the teacher"):
        load_teacher(str(folder), torch.device("cpu"))


@pytest.mark.slow
def test_workers_may_be_spawned_and_paths_hold_spaces_and_letters(small_set, tmp_path):
    root = tmp_path / "Bilder für später"
    os.rename(small_set, root)
    try:
        program = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch\n"
                   "from common.coco import CocoCaptions, images\n"
                   "if __name__ == '__main__':\n    torch.multiprocessing.set_start_method('spawn')\n"
                   f"    found = [i for _, indices, _ in images(CocoCaptions({str(root)!r}, 'train', 32), 16, workers=2) "
                   "for i in indices]\n    assert found == list(range(48))\n")
        (tmp_path / "program.py").write_text(program, "utf-8")
        done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        os.rename(root, small_set)


def test_a_full_disk_is_one_line_and_the_run_goes_on_after(small_set, teacher, small_disk):
    disk, grow = small_disk
    dataset = CocoCaptions(small_set, "train", 32)
    options = dict(batch_size=8, seed=0, caption_gb=1)
    with pytest.raises(SystemExit, match="disk .* is full"):
        TrainingPairs(dataset, teacher, disk, process(), **options)
    grow()
    assert len(TrainingPairs(dataset, teacher, disk, process(), **options)) == 48


def test_what_does_not_fit_gives_the_disk_back(tmp_path, monkeypatch):
    def take_all_and_fail(path):
        assert path.is_file()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "reserve", take_all_and_fail)
    with pytest.raises(SystemExit, match=r"disk .* is full.* x takes 4e-07 GB \(--cache-gb\)"):
        cached_array(tmp_path, "x", (50, 4), count_up([]), "row", limit="--cache-gb")
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}


def test_a_kill_while_caching_costs_a_minute(tmp_path, monkeypatch):
    began, clock = [], iter(range(0, 10_000, 25))  # two rows take less than a minute, three take more
    monkeypatch.setattr("common.cache.time.perf_counter", lambda: next(clock))

    def produce(start):
        began.append(start)
        for i in range(start, 9):
            if len(began) == 1 and i == 5:
                raise MemoryError  # like a kill: nothing is noted on the way out
            yield [i], i + 1, np.full((1, 2), i)

    with pytest.raises(MemoryError):
        cached_array(tmp_path, "x", (9, 2), produce, "row")
    found, _ = cached_array(tmp_path, "x", (9, 2), produce, "row")
    assert began == [0, 3] and found[:, 0].tolist() == list(range(9))


@pytest.mark.slow
def test_ctrl_c_while_caching_is_one_line_and_loses_nothing(tmp_path):
    program = ("import numpy as np; from pathlib import Path; from common.cache import cached_array\n"
               "from common.settings import start\n"
               "def produce(start):\n"
               "    print('from', start)\n"
               "    for i in range(start, 6):\n"
               "        if i == stop: raise KeyboardInterrupt\n"
               "        yield [i], i + 1, np.full((1, 2), i)\n"
               "def main(folder):\n"
               "    print(cached_array(Path(folder), 'x', (6, 2), produce, 'row')[0][:, 0].tolist())\n"
               f"start(main, {str(tmp_path)!r})")
    stopped, again = (run_apart("-c", f"stop = {stop}\n{program}") for stop in (4, -1))
    assert stopped.returncode == 130 and "stopped; what was saved is kept" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert again.returncode == 0 and again.stdout.split("\n")[:2] == ["from 4", "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]"]


# ---- what Windows and network shares refuse ----


class HeldOpen(PermissionError):
    """As os.replace raises it on Windows, where another program holds a file of the folder open."""

    winerror = 5


def test_a_rename_that_windows_refuses_is_tried_again(tmp_path, monkeypatch):
    partial, final = tmp_path / "student.partial", tmp_path / "student"
    for folder, text in ((partial, "new"), (final, "old")):
        folder.mkdir()
        (folder / "a").write_text(text)
    rename, refusals = os.replace, 3

    def refuse(source, target):
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise HeldOpen
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    put_in_place(partial, final)
    assert [path.name for path in tmp_path.iterdir()] == ["student"] and (final / "a").read_text() == "new"
    monkeypatch.setattr(files, "PATIENCE_S", 0.2)
    partial.mkdir()
    (partial / "a").write_text("newer")
    refusals = 10**6
    with pytest.raises(SystemExit, match="student.* is held open by another program; close it and run again"):
        put_in_place(partial, final)
    assert (final / "a").read_text() == "new" and (partial / "a").read_text() == "newer"


def test_a_refusal_elsewhere_is_not_waited_for(tmp_path, monkeypatch):
    calls = []

    def refuse(*paths):
        calls.append(paths)
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        put_in_place(tmp_path / "a", tmp_path / "b")
    assert len(calls) == 1


def test_a_file_takes_no_folders_place(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "photos", b"new")
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "a.jpg"]


def test_weights_are_copied_where_rights_and_times_are_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    source = tmp_path / "vae"
    source.mkdir()
    (source / "model.fp16.safetensors").write_bytes(b"weights")
    source.chmod(0o555)
    for name in ("chmod", "utime"):
        monkeypatch.setattr(os, name, refuse)
    copy_weights(source, tmp_path / "copy")
    make_readable(tmp_path / "copy")
    monkeypatch.undo()
    source.chmod(0o755)
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == b"weights"
    assert os.access(tmp_path / "copy", os.W_OK) and (tmp_path / "copy").stat().st_mode & 0o200  # root may write everywhere


def test_a_checkout_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(SystemExit, match="^error: --data: .* cannot be written to; choose another folder"):
        draw_mini(tmp_path / "mini")


def test_stages_of_another_training_are_not_taken_for_ones_own(tmp_path):
    train = script("checkpoints/train_mini_teacher.py")
    (tmp_path / "settings.json").write_text('{"seed": 1}', "utf-8")
    with pytest.raises(SystemExit, match="other settings; choose another --work"):
        train.main(train.Settings(work=str(tmp_path)))
