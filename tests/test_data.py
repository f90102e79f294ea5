"""The drawn set, COCO loading on odd files, the caches, and the download."""

import functools
import hashlib
import http.client
import http.server
import json
import re
import shutil
import threading
import zipfile
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import ROOT, make_small_set, process
from PIL import Image

from common.cache import TeacherStore, TrainingPairs
from common.coco import CocoCaptions, images, load_image
from common.sampling import encode_captions, encode_images
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


def test_pycocotools_reads_a_drawn_set(small_set):
    from pycocotools.coco import COCO

    coco = COCO(str(small_set / "annotations" / "instances_val.json"))
    assert coco.getImgIds() == list(range(49, 65)) and coco.loadCats([17])[0]["name"] == "cat"
    train = json.loads((small_set / "annotations" / "captions_train.json").read_text("utf-8"))
    assert len(train["images"]) == 48 and len(train["annotations"]) == 5 * 48


@pytest.mark.slow
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


def pairs_of(dataset, teacher, folder, rank=0, processes=1, **options) -> TrainingPairs:
    options = dict(batch_size=8, seed=0, caption_gb=1) | options
    return TrainingPairs(dataset, teacher, folder, process(rank, processes), **options)


@pytest.mark.usefixtures("kept_in_fp32")
def test_cache_equals_encoding_on_the_fly(small_set, teacher, tmp_path):
    data = CocoCaptions(small_set, "train", 32)
    cached = pairs_of(data, teacher, tmp_path, flip=True)
    some = 30 * 24 * 128 * 2 / 1e9  # 30 captions
    partly = pairs_of(data, teacher, tmp_path / "b", caption_gb=some, flip=True)
    live = pairs_of(data, teacher, None, caption_gb=0)
    indices, choices, mirrored = np.array([0, 5, 47]), np.array([2, -1, 63]), np.array([False, True, False])
    latents, states = live.batch(indices, choices, mirrored)
    want = encode_images(teacher.vae, torch.stack([data[0], data[5].flip(2), data[47]]))
    torch.testing.assert_close(latents, want)
    texts = [data.captions[0][2], "", data.captions[47][3]]
    torch.testing.assert_close(states, encode_captions(teacher.text_encoder, teacher.tokenizer, texts))
    for pairs in (cached, partly):
        found = pairs.batch(indices, choices, mirrored)
        torch.testing.assert_close(found[0], latents, atol=5e-3, rtol=2e-3)
        torch.testing.assert_close(found[1], states, atol=5e-3, rtol=2e-3)


def test_a_mended_picture_is_read(small_set, teacher, tmp_path):
    shutil.copytree(small_set, tmp_path / "set")
    file = sorted((tmp_path / "set" / "train").iterdir())[5]
    whole = file.read_bytes()
    for content, count in ((whole[:200], 47), (whole, 48)):
        file.write_bytes(content)
        data = CocoCaptions(tmp_path / "set", "train", 32)
        assert len(pairs_of(data, teacher, tmp_path / "cache")) == count


def test_a_step_draws_the_same_batch_whoever_draws_it(small_set, teacher, tmp_path):
    """Again, in parts, or as several processes: noise, pictures and captions are those of (seed, step)."""
    data, chain = CocoCaptions(small_set, "train", 32), torch.tensor([100, 900])
    whole = pairs_of(data, teacher, tmp_path).draw(3, 0.3, chain=chain)
    again = pairs_of(data, teacher, tmp_path).draw(3, 0.3, chain=chain)
    shares = [pairs_of(data, teacher, tmp_path, rank=rank, processes=2).draw(3, 0.3, chain=chain, part=part, parts=2)
              for rank in range(2) for part in range(2)]
    for field in ("latents", "encoder_hidden_states", "noise", "timesteps"):
        assert torch.equal(getattr(whole, field), getattr(again, field))
        assert torch.equal(getattr(whole, field), torch.cat([getattr(share, field) for share in shares]))
    assert set(whole.timesteps.tolist()) == {100, 900} and whole.dropout == 0.3 and whole.teacher_pred is None
    other = pairs_of(data, teacher, tmp_path, seed=1).draw(3, 0.3)
    assert not torch.equal(other.noise, whole.noise) and not torch.equal(other.latents, whole.latents)


def test_captions_are_dropped_at_their_rate(small_set, teacher, tmp_path):
    pairs = pairs_of(CocoCaptions(small_set, "train", 32), teacher, tmp_path, batch_size=48)
    for rate, low, high in ((0.0, 0, 0), (0.3, 40, 75), (1.0, 192, 192)):  # of 192: 57.6 expected, six sigmas are 38
        dropped = sum(torch.equal(states, pairs.empty[0])
                      for step in range(4) for states in pairs.draw(step, rate).encoder_hidden_states)
        assert low <= dropped <= high


def test_a_batch_of_more_pictures_than_there_are_is_one_line(small_set, teacher, tmp_path):
    data = CocoCaptions(small_set, "train", 32)
    with pytest.raises(SystemExit, match="^error: --batch-size 49 is more than the 48 training pictures"):
        pairs_of(data, teacher, tmp_path, batch_size=49)
    with pytest.raises(SystemExit, match="^error: --batch-size must be a multiple of 3"):
        pairs_of(data, teacher, tmp_path, processes=3)


def test_drawing_never_replaces_another_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    with pytest.raises(SystemExit, match="something else"):
        draw_mini(tmp_path / "photos")
    assert (tmp_path / "photos" / "a.jpg").read_text() == "mine"


def test_flip_mirrors_about_half_of_a_batch(small_set, teacher, tmp_path):
    pairs = pairs_of(CocoCaptions(small_set, "train", 32), teacher, tmp_path, batch_size=48, flip=True)
    latents, indices = pairs.draw(0, 0.1).latents, pairs.indices(0)
    plain, mirrored = ((latents == torch.from_numpy(kind[indices]).float()).flatten(1).all(1) for kind in pairs.latents)
    assert (plain ^ mirrored).all() and 12 <= mirrored.sum() <= 36
    store = TeacherStore(pairs, lambda noisy, batch: noisy, [0.1], 1)
    assert store.draw(0).latents.shape == latents.shape


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


def test_an_answer_that_is_no_http_is_one_line(tmp_path, monkeypatch):
    def answer(*_, **__):
        raise http.client.BadStatusLine("hello")

    monkeypatch.setattr(download_coco.urllib.request, "urlopen", answer)
    with pytest.raises(SystemExit, match="BadStatusLine.*run again to go on"):
        download_coco.download("http://127.0.0.1/a.zip", tmp_path / "a.zip")


def test_a_set_that_is_made_again_is_the_same_set(small_set, tmp_path):
    """A run whose --out outlives its machine goes on where the data are downloaded or drawn once more."""
    found = CocoCaptions(small_set, "train", 32).fingerprint()
    assert CocoCaptions(make_small_set(tmp_path / "again"), "train", 32).fingerprint() == found
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo("val2017/a.txt", (2013, 11, 24, 1, 2, 4)), "x")
    for out in (tmp_path / "one", tmp_path / "two"):
        out.mkdir()
        download_coco.unpack(tmp_path / "a.zip", out)
        assert (out / "val2017" / "a.txt").stat().st_mtime == 1_385_254_924  # the same in UTC


def test_pictures_of_any_size_fit_into_a_containers_shared_memory(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    for size_px, batch in ((64, 128), (128, 128), (256, 32), (2048, 1)):
        dataset = CocoCaptions(tmp_path, "", size_px)
        dataset.files *= 128
        sizes = [(len(stacked), end) for stacked, _, end in islice(images(dataset, 128), 2)]
        assert sizes == [(batch, batch), (batch, 2 * batch)][: max(1, len(sizes))]


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
    pairs = pairs_of(CocoCaptions(small_set, "train", 32), teacher, tmp_path)
    calls = []

    def predict(noisy, batch):
        calls.append(len(noisy))
        with torch.no_grad():
            return teacher.unet(noisy, batch.timesteps, batch.encoder_hidden_states).sample

    TeacherStore(pairs, predict, [0.0, 1.0], 10)
    assert sum(calls) == 2 * 48
    store = TeacherStore(pairs, predict, [0.0, 1.0], 10)
    assert sum(calls) == 2 * 48  # the second run reads what the first one wrote
    assert store.seconds > 0
    for step, dropped in ((1, False), (9, True)):  # draw k serves the k-th part of ten steps
        batch = store.draw(step, 0.5)
        indices = pairs.indices(step)
        torch.testing.assert_close(batch.latents, torch.from_numpy(np.array(pairs.latents[0][indices])).float())
        assert all(torch.equal(states, pairs.empty[0]) for states in batch.encoder_hidden_states) == dropped
        assert batch.dropout == float(dropped)  # the draw's own rate
        noisy = teacher.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        want = predict(noisy, batch)
        if bf16:
            assert 1e-4 < (batch.teacher_pred - want).norm() / want.norm() < 0.02
        else:
            torch.testing.assert_close(batch.teacher_pred, want, atol=5e-3, rtol=2e-3)
        parts = [store.draw(step, part=part, parts=2) for part in range(2)]
        assert torch.equal(torch.cat([part.teacher_pred for part in parts]), batch.teacher_pred)
        assert torch.equal(torch.cat([part.noise for part in parts]), batch.noise)
    noise = torch.cat([store.fixed(0, np.array([i])).noise for i in range(48)])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert not torch.equal(store.fixed(0, np.array([3])).noise, store.fixed(1, np.array([3])).noise)
