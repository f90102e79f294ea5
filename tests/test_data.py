"""The drawn set, COCO loading on odd files, the caches, and the download."""

import functools
import hashlib
import http.server
import json
import re
import shutil
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common.cache import TeacherStore, TrainingPairs
from common.coco import CocoCaptions, load_image
from common.sampling import encode_captions, encode_pictures
from data import download_coco
from data.draw_mini import CATEGORIES, SIZE_PX, Painter, annotations, article, draw_mini, plan_set


def test_annotations_are_the_same_on_every_machine():
    captions, instances = annotations(plan_set(2_000), 1)
    digest = hashlib.sha256(json.dumps([captions, instances], sort_keys=True).encode()).hexdigest()
    assert digest == "d73590c06434922335ee86a5fc661ee37972bb04bb053bec9b509c6bc13a6bfa"


def test_pixels_are_the_reference_pictures_within_two_levels():
    painter = Painter()
    for i, (scene, _) in enumerate(plan_set(6)):
        want = np.asarray(Image.open(ROOT / "tests" / "reference" / f"scene_{i}.png")).astype(int)
        assert np.abs(painter.paint(scene) - want).max() <= 2


def test_scenes_are_distinct_and_boxes_right():
    scenes = plan_set(29_000)
    keys = {(s["background"], s["horizon"], *s["objects"]) for s, _ in scenes}
    assert len(keys) == 29_000
    assert len(CATEGORIES) >= 60
    two = sum(len(s["objects"]) == 2 for s, _ in scenes) / len(scenes)
    assert abs(two - 1 / 3) < 0.01
    painter = Painter()
    for scene, _ in scenes[:200]:  # outside the boxes a picture is its bare background
        bare = painter.paint({**scene, "objects": []}).astype(int)
        changed = np.abs(painter.paint(scene).astype(int) - bare).max(2) > 0
        inside = np.zeros((SIZE_PX, SIZE_PX), bool)
        for _, x, y, w, h in scene["objects"]:
            assert 0 <= x and x + w <= SIZE_PX and 0 <= y and y + h <= SIZE_PX
            inside[y : y + h, x : x + w] = True
            assert changed[y : y + h, x : x + w].any()
        assert not (changed & ~inside).any()


def test_captions_are_true():
    for scene, captions in plan_set(500):
        names = [CATEGORIES[c][0] for c, *_ in scene["objects"]]
        assert len(set(captions)) == 5
        assert all(name in caption for name in names for caption in captions)
        for caption in captions if len(names) == 2 else []:
            left, right = (re.search(rf"\b{article(name)}\b", caption).start() for name in names)
            if "left of" in caption or "on the left" in caption:
                assert left < right
            if "right of" in caption:
                assert right < left


def test_pycocotools_reads_the_set(mini):
    from pycocotools.coco import COCO

    coco = COCO(str(mini / "annotations" / "instances_val.json"))
    assert len(coco.getImgIds()) == 5_000
    assert coco.loadCats([17])[0]["name"] == "cat"
    train = json.loads((mini / "annotations" / "captions_train.json").read_text())
    assert len(train["images"]) >= 20_000 and len(train["annotations"]) == 5 * len(train["images"])


def test_odd_pictures_are_read_or_skipped_and_counted(tmp_path):
    folder = tmp_path / "with a space é" / "train"
    folder.mkdir(parents=True)
    gradient = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    Image.fromarray(gradient).save(folder / "gray.png")
    Image.fromarray(np.stack([gradient] * 4, 2), "CMYK").save(folder / "cmyk.jpg")
    upright = Image.new("RGB", (64, 48))
    upright.paste((255, 0, 0), (0, 0, 32, 48))  # left half red
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise: the left half is then the top
    upright.save(folder / "turned.jpg", exif=exif, quality=95)
    upright.save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:300])
    upright.save(folder / "silent.jpg")
    names = ["gray.png", "cmyk.jpg", "turned.jpg", "cut.jpg", "silent.jpg", "absent.jpg"]
    content = {"images": [{"id": i, "file_name": n} for i, n in enumerate(names)],
               "annotations": [{"id": i, "image_id": i, "caption": " " if n == "silent.jpg" else n}
                               for i, n in enumerate(names)]}
    (folder.parent / "annotations").mkdir()
    (folder.parent / "annotations" / "captions_train.json").write_text(json.dumps(content))
    data = CocoCaptions(folder.parent, "train", 32)
    assert data.files == ["gray.png", "cmyk.jpg", "turned.jpg", "cut.jpg"]
    assert data.skipped == {"missing file": 1, "no caption": 1}
    assert [x is None for x in (data[i] for i in range(4))] == [False, False, False, True]
    turned = load_image(folder / "turned.jpg", 32).astype(int)
    assert turned[4, 16, 0] > 200 and turned[28, 16, 0] < 50


@pytest.mark.parametrize("text", ["{", "[]", '{"annotations": []}'])
def test_broken_annotations_are_one_line(tmp_path, text):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "annotations" / "captions_train.json").write_text(text)
    with pytest.raises(SystemExit, match="error: .*captions_train.json"):
        CocoCaptions(tmp_path, "train", 32)


def test_missing_data_names_both_ways_on(tmp_path):
    with pytest.raises(SystemExit, match="(?s)download_coco.py.*--mini"):
        CocoCaptions(tmp_path, "train2017", 64)


def test_cache_equals_encoding_on_the_fly(small_set, teacher, tmp_path):
    data = CocoCaptions(small_set, "train", 32)
    device = torch.device("cpu")
    cached = TrainingPairs(data, teacher, tmp_path, caption_gb=1, device=device, flip=True)
    some = 30 * 24 * 128 * 2 / 1e9  # 30 captions
    partly = TrainingPairs(data, teacher, tmp_path / "b", caption_gb=some, device=device, flip=True)
    live = TrainingPairs(data, teacher, None, caption_gb=0, device=device)
    indices, choices, mirrored = np.array([0, 5, 47]), np.array([2, -1, 63]), np.array([False, True, False])
    latents, hidden = live.batch(indices, choices, mirrored)
    want = encode_pictures(teacher.vae, torch.stack([data[0], data[5].flip(2), data[47]]))
    torch.testing.assert_close(latents, want)
    texts = [data.captions[0][2], "", data.captions[47][3]]
    torch.testing.assert_close(hidden, encode_captions(teacher.text_encoder, teacher.tokenizer, texts))
    for pairs in (cached, partly):
        found = pairs.batch(indices, choices, mirrored)
        torch.testing.assert_close(found[0], latents, atol=5e-3, rtol=2e-3)
        torch.testing.assert_close(found[1], hidden, atol=5e-3, rtol=2e-3)


def test_a_mended_picture_is_read(small_set, teacher, tmp_path):
    shutil.copytree(small_set, tmp_path / "set")
    file = sorted((tmp_path / "set" / "train").iterdir())[5]
    whole = file.read_bytes()
    for content, count in ((whole[:200], 47), (whole, 48)):
        file.write_bytes(content)
        data = CocoCaptions(tmp_path / "set", "train", 32)
        assert len(TrainingPairs(data, teacher, tmp_path / "cache", caption_gb=1, device=torch.device("cpu"))) == count


def test_drawing_never_replaces_another_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    with pytest.raises(SystemExit, match="something else"):
        draw_mini(tmp_path / "photos")
    assert (tmp_path / "photos" / "a.jpg").read_text() == "mine"


def test_flip_mirrors_about_half_of_a_batch(small_set, teacher, tmp_path):
    data, device = CocoCaptions(small_set, "train", 32), torch.device("cpu")
    pairs = TrainingPairs(data, teacher, tmp_path, caption_gb=1, device=device, flip=True)
    latents, indices = pairs.draw(0, 48, 0.1, seed=0).latents, pairs.indices(0, 48, 0)
    plain, mirrored = ((latents == torch.from_numpy(kind[indices]).float()).flatten(1).all(1) for kind in pairs.latents)
    assert (plain ^ mirrored).all() and 12 <= mirrored.sum() <= 36
    store = TeacherStore(pairs, lambda noisy, *_: noisy, [0.1])
    assert store.draw(0, 1, 48, seed=0)[0].latents.shape == latents.shape


def test_download_resumes_checks_and_unpacks_safely(tmp_path, monkeypatch):
    served, out = tmp_path / "served", tmp_path / "out"
    served.mkdir()
    out.mkdir()
    with zipfile.ZipFile(served / "good.zip", "w") as archive:
        archive.writestr("val2017/a.txt", "x" * 100_000)
    body = (served / "good.zip").read_bytes()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
            asked.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:])

        def log_message(self, *_):
            pass

    asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    (out / "good.zip.part").write_bytes(body[:50])
    monkeypatch.setattr(download_coco, "ARCHIVES", {"zips/good.zip": hashlib.md5(body).hexdigest()})
    download_coco.main(["--out", str(out), "--base", base])
    assert asked == [50] and (out / "val2017" / "a.txt").read_text() == "x" * 100_000
    monkeypatch.setattr(download_coco, "ARCHIVES", {"zips/bad.zip": "0" * 32})
    with pytest.raises(SystemExit, match="damaged"):
        download_coco.main(["--out", str(out), "--base", base])
    monkeypatch.setattr(download_coco.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(SystemExit, match="make room"):
        download_coco.main(["--out", str(out), "--base", base])
    server.shutdown()


def test_archives_cannot_write_outside(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../evil.txt", "x")
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="leaves its folder"):
        download_coco.unpack(tmp_path / "evil.zip", tmp_path / "out")
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_the_store_holds_the_teachers_predictions_and_is_paid_once(small_set, teacher, tmp_path, monkeypatch, bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    pairs = TrainingPairs(CocoCaptions(small_set, "train", 32), teacher, tmp_path, caption_gb=1, device=torch.device("cpu"))
    calls = []

    def predict(noisy, timesteps, hidden):
        calls.append(len(noisy))
        with torch.no_grad():
            return teacher.unet(noisy, timesteps, hidden).sample

    TeacherStore(pairs, predict, [0.0, 1.0])
    assert sum(calls) == 2 * 48
    store = TeacherStore(pairs, predict, [0.0, 1.0])
    assert sum(calls) == 2 * 48  # the second run reads what the first one wrote
    for step, dropped in ((1, False), (9, True)):  # draw k serves the k-th part of ten steps
        batch, prediction = store.draw(step, 10, 8, seed=0)
        indices = pairs.indices(step, 8, 0)
        torch.testing.assert_close(batch.latents, torch.from_numpy(np.array(pairs.latents[0][indices])).float())
        assert all(torch.equal(h, pairs.empty[0]) for h in batch.hidden) == dropped
        noisy = teacher.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        want = predict(noisy, batch.timesteps, batch.hidden)
        if bf16:
            assert 1e-4 < (prediction - want).norm() / want.norm() < 0.02
        else:
            torch.testing.assert_close(prediction, want, atol=5e-3, rtol=2e-3)
    noise = torch.cat([store.fixed(0, np.array([i])).noise for i in range(48)])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert not torch.equal(store.fixed(0, np.array([3])).noise, store.fixed(1, np.array([3])).noise)
