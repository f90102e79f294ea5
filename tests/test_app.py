"""The page: which models it finds, what it draws, turns, and, in a real browser, what a person does with it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TEACHER, refusal, run, script

from common.report import model_card, save_student
from common.sampling import make_scheduler
from common.slicing import slice_unet, student_config

pytest.importorskip("gradio", reason="pip install -r v3/requirements.txt")
app = script("v3/app.py")
inference = script("v3/inference.py")

# Runs a script and lets it reach this machine alone: anything else is an error and is written down.
GUARDED = """
import runpy, sys
def guard(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.bind", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1"):
        print("OUTSIDE", host, file=sys.stderr, flush=True)
        raise OSError("no network in this test")
sys.addaudithook(guard)
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory):
    """A folder with two untrained students: `plain`, and `quick`, whose card asks for four steps without guidance."""
    folder = tmp_path_factory.mktemp("runs")
    student = slice_unet(teacher.unet, student_config(teacher.unet, (64, 96), 1))
    for name, how in (("plain", None), ("quick", {"num_inference_steps": 4, "guidance_scale": 1.0})):
        (folder / name).mkdir()
        val_set = SimpleNamespace(root=Path("mini"), split="val", size_px=32)
        card = model_card(name, teacher.name, val_set, {"parameters": 1}, {}, "nothing", inference=how)
        scheduler = make_scheduler("ddim-trailing" if how else "ddpm", teacher.noise_scheduler)
        save_student(student, teacher, folder / name / "student", card, scheduler)
    return folder


# --- without a browser ----------------------------------------------------------------------------------------------


def test_finished_runs_and_teachers_are_found_the_newest_first(tmp_path):
    places = ["teacher", "old/student", "compare/v2-0/student", "exported", "writing/student.partial"]
    for age, place in enumerate(places):
        (tmp_path / place).mkdir(parents=True)
        index = tmp_path / place / "model_index.json"
        index.write_text("{}", "utf-8")
        os.utime(index, (age, age))
    (tmp_path / "begun" / "samples").mkdir(parents=True)
    (tmp_path / "exported" / "README.md").write_text("---\ntags: [stable-diffusion, distillation]\n---\n", "utf-8")
    (tmp_path / "teacher" / "README.md").write_text("---\ntags: [stable-diffusion, adapted-to-16px]\n---\n", "utf-8")
    teachers, students = app.find_models(tmp_path)
    assert teachers == [str(tmp_path / "teacher")]
    assert students == [str(tmp_path / place) for place in ("exported", "compare/v2-0/student", "old/student")]
    assert [app.name_of(place) for place in [*teachers, *students]] == ["teacher", "exported", "v2-0", "old"]
    assert app.find_models(tmp_path / "nowhere") == ([], [])


def test_the_page_starts_with_what_is_named_and_then_the_newest(runs, tmp_path, monkeypatch):
    def start_with(**settings) -> list[str]:
        page = app.make_page(app.Settings(**settings), torch.device("cpu"), torch.float32)
        (models,) = [block for block in page.blocks.values() if getattr(block, "multiselect", False)]
        assert len(models.choices) == len({place for _, place in models.choices})
        return [app.name_of(place) for place in models.value]

    assert start_with(folder=str(tmp_path / "empty")) == ["mini-teacher"]
    assert start_with(folder=str(runs)) == ["mini-teacher", "quick", "plain"]
    monkeypatch.chdir(runs)
    assert start_with(folder=str(runs), model="plain") == ["mini-teacher", "plain", "quick"]
    assert start_with(folder=".", teacher="./quick/student", model="plain") == ["quick", "plain"]


def test_a_student_that_was_trained_anew_is_loaded_anew(runs):
    place, cpu = str(runs / "plain" / "student"), (torch.device("cpu"), torch.float32)
    before = app.load(place, *cpu)
    assert app.load(place, *cpu) is before
    os.utime(runs / "plain" / "student" / "model_index.json", (1, 1))
    assert app.load(place, *cpu) is not before


@pytest.mark.parametrize("sampler, steps, guidance", [
    ("ddim", 9, 3.0), ("ddim-trailing", 4, 1.0), ("ddpm", 5, 3.0), ("dpm++", 4, 3.0), ("euler", 4, 3.0)])
def test_it_draws_what_inference_draws(teacher, sampler, steps, guidance):
    how = {"sampler": sampler, "steps": steps, "guidance": guidance}
    *before, (done, pictures, seconds) = app.draw(teacher, "a cat on the grass", 2, 5, how)
    assert [(step, images) for step, images, _ in before] == [(step, []) for step in range(4, steps, 4)]
    assert done == steps and seconds > 0
    pipeline = inference.load(str(TEACHER), sampler, torch.device("cpu"), torch.float32)
    wanted, _ = inference.draw(pipeline, ["a cat on the grass"] * 2, 32, "", how, inference.Settings(seed=5))
    for picture, want in zip(pictures, wanted, strict=True):
        difference = np.asarray(picture).astype(int) - np.asarray(want)
        assert np.abs(difference).max() <= 1
    assert np.abs(np.asarray(wanted[0]).astype(int) - np.asarray(wanted[1])).max() > 50


def test_two_models_start_from_the_same_noise(teacher, runs):
    """A model's own slice is itself: the same pictures; and the card of the quick one is followed."""
    how = app.how_to_draw(str(runs / "quick" / "student"), sampler="auto", steps=0, guidance=0)
    assert how == {"sampler": "ddim-trailing", "steps": 4, "guidance": 1.0} and app.passes(how) == 4
    own = app.how_to_draw(str(runs / "plain" / "student"), sampler="euler", steps=6, guidance=2.0)
    assert own == {"sampler": "euler", "steps": 6, "guidance": 2.0} and app.passes(own) == 12
    models = [app.load(str(runs / name / "student"), torch.device("cpu"), torch.float32) for name in ("plain", "quick")]
    (_, [one], _), (_, [two], _) = (list(app.draw(model, "a dog", 1, 3, how))[-1] for model in models)
    assert np.array_equal(one, two)


def test_a_long_request_lets_a_short_one_pass():
    begun, stop = threading.Event(), threading.Event()

    def endless():
        while not stop.is_set():
            begun.set()
            yield

    longer = threading.Thread(target=lambda: list(app.in_turns(endless())))
    longer.start()
    assert begun.wait(60)
    try:
        assert list(app.in_turns(iter("abc"))) == ["a", "b", "c"]
        assert longer.is_alive()
    finally:
        stop.set()
        longer.join(60)
    assert not longer.is_alive()


def test_a_figure_says_what_it_is_and_runs_nothing_that_was_typed():
    how = {"sampler": "ddim", "steps": 25, "guidance": 5.0}
    picture = app.to_pil_image(torch.zeros(3, 32, 32))
    text = app.figure("runs/<b>/student", how, '"><script>', 1, 25, [picture], 1.2345, 1_170_000)
    assert "<script" not in text and "&lt;b&gt;" in text
    assert "25 ddim steps, guidance 5" in text and "1,234 ms" in text and "1.17 M" in text
    begun = app.figure("a", how, "b", step=4)
    assert "<img" not in begun and "value=4 max=25" in begun


def test_mistakes_get_one_line(tmp_path):
    assert "is not there" in refusal("v3/app.py", "--model", tmp_path / "nowhere", "--device", "cpu")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal("v3/app.py", "--folder", tmp_path, "--port", port, "--device", "cpu")
    assert f"port {port} is in use" in line and "--port" in line


# --- in a browser ---------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """A function that starts the page on the runs in a folder, with all other hosts out of reach, and gives its address."""
    started, folder = [], tmp_path_factory.mktemp("served")

    def start(*arguments, script=ROOT / "v3" / "app.py") -> str:
        errors = (folder / f"errors-{len(started)}").open("w+", encoding="utf-8")
        command = [sys.executable, "-c", GUARDED, str(script), "--port", str(free_port()), "--device", "cpu",
                   *map(str, arguments)]
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GRADIO_SERVER_NAME")}
        clean |= {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}  # where nothing answers
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder, env=clean)
        started.append((server, errors))
        for line in server.stdout:
            if line.startswith("open http://127.0.0.1:"):
                return line.split()[1]
        errors.seek(0)
        raise AssertionError(errors.read()[-3000:])

    yield start
    for server, errors in started:
        server.terminate()
        server.wait()
        server.stdout.close()
        errors.seek(0)
        said = errors.read()
        errors.close()
        assert "OUTSIDE" not in said and "Traceback" not in said, said[-3000:]


@pytest.fixture(scope="module")
def address(serve, runs):
    """Of a page that shows the embedded teacher and the two students."""
    return serve("--folder", runs)


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements.txt")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if not path:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root's Chromium has no other
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """A function that opens an address as a new person would, and waits for the pictures that are drawn first."""
    contexts, asked = [], []

    def open_page(address: str):
        contexts.append(chromium.new_context())
        contexts[-1].on("request", lambda request: asked.append(request.url))
        contexts[-1].set_default_timeout(120_000)
        page = contexts[-1].new_page()
        page.goto(address)
        finished(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}


def finished(page) -> list[str]:
    """The pictures, by their source, when no model is drawing any more."""
    page.locator(".pictures img").first.wait_for()
    page.wait_for_function("!document.querySelector('.pictures progress')")
    return sources(page)


def sources(page) -> list[str]:
    return page.locator(".pictures img").evaluate_all("images => images.map(image => image.src)")


def changed(page, before: list[str]) -> list[str]:
    """The pictures, once they are others, and all there."""
    page.wait_for_function(
        """before => {
            const now = [...document.querySelectorAll('.pictures img')].map(image => image.src);
            return now.length == before.length && now.every((source, i) => source != before[i]);
        }""", arg=before)
    return finished(page)


def choose_only(page, *names):
    """Takes all other models out of the choice."""
    page.locator(".token .token-remove").first.wait_for()
    for token in reversed(page.locator(".token").all()):
        if token.inner_text().strip() not in names:
            token.locator(".token-remove").click()


def test_the_guard_sees_what_goes_outside(tmp_path):
    (tmp_path / "out.py").write_text("import socket\nsocket.create_connection(('example.com', 80))\n", "utf-8")
    done = subprocess.run([sys.executable, "-c", GUARDED, str(tmp_path / "out.py")], capture_output=True, text=True)
    assert done.returncode == 1 and "OUTSIDE example.com" in done.stderr


@pytest.mark.slow
def test_a_space_starts_by_itself(serve, runs, tmp_path):
    done = run("v3/space.py", "--model", runs / "quick", "--out", tmp_path / "space")
    assert done.returncode == 0 and f"cd {tmp_path / 'space'} && python v3/app.py" in done.stdout, done.stderr[-2000:]
    metadata = yaml.safe_load((tmp_path / "space" / "README.md").read_text("utf-8").split("---\n")[1])
    assert metadata["sdk"] == "gradio" and metadata["license"] == "cc-by-sa-4.0"
    requirements = (tmp_path / "space" / "requirements.txt").read_text("utf-8")
    assert "torch>=" in requirements and "pytest" not in requirements
    address = serve(script=tmp_path / "space" / metadata["app_file"])
    page = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address).read().decode("utf-8")
    config, _ = json.JSONDecoder().raw_decode(page.split("window.gradio_config = ")[1])
    choices = [choice for part in config["components"] for choice in part["props"].get("choices", [])]
    places = [place for _, place in choices if Path(place).is_absolute()]
    assert [Path(place).relative_to(tmp_path / "space").as_posix() for place in places] == [
        "checkpoints/mini-teacher", "checkpoints/quick/student"]
    assert "exists" in refusal("v3/space.py", "--model", runs / "quick", "--out", tmp_path / "space")


@pytest.mark.slow
def test_a_space_of_models_of_one_name_and_of_a_plain_folder(runs, tmp_path):
    """Whatever they are called, the page finds one teacher and two students."""
    shutil.copytree(runs / "quick", tmp_path / "other" / "quick")
    shutil.copytree(runs / "quick" / "student", tmp_path / "student-fp16")
    for first, second, names in ((runs / "quick", tmp_path / "other" / "quick", ["quick", "quick-2"]),
                                 (tmp_path / "student-fp16", runs / "plain", ["plain", "student-fp16"])):
        out = tmp_path / f"space of {names[0]}"
        done = run("v3/space.py", "--model", first, "--compare", second, "--out", out)
        assert done.returncode == 0, done.stderr[-2000:]
        teachers, students = app.find_models(out)
        assert [Path(place).name for place in teachers] == ["mini-teacher"]
        assert sorted(Path(place).parent.name for place in students) == names


@pytest.mark.slow
def test_a_person_draws_and_changes_the_seed(address, visit):
    page = visit(address)
    names = page.locator(".pictures b").all_inner_texts()
    assert names == ["mini-teacher", "quick", "plain"]
    first = finished(page)
    assert len(set(first)) == 3
    said = page.locator(".pictures figcaption").all_inner_texts()
    assert "25 ddim steps, guidance 5" in said[0] and "13.04 M" in said[0] and " ms" in said[0]
    assert "4 ddim-trailing steps, guidance 1" in said[1]
    choose_only(page, "mini-teacher", "plain")
    page.get_by_label("Caption").fill("a dog in the snow")
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function("document.querySelectorAll('.pictures figure').length == 2")
    dog = finished(page)
    assert len(dog) == 2 and not set(dog) & set(first)
    page.get_by_label("Seed of the noise").fill("7")
    page.get_by_label("Seed of the noise").press("Enter")
    seven = changed(page, dog)
    page.get_by_role("button", name="Next seed").click()
    changed(page, seven)
    assert page.get_by_label("Seed of the noise").input_value() == "8"
    page.get_by_label("Four pictures each").check()
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function("document.querySelectorAll('.pictures img').length == 8")
    # enlarged without blur
    assert page.locator(".pictures img").first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    page.get_by_label("Caption").fill(" ")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("Type a caption first.").wait_for()


@pytest.mark.slow
def test_a_quick_student_draws_as_one_types(address, visit):
    page = visit(address)
    page.get_by_text("Press Enter to draw").wait_for()
    choose_only(page, "quick")
    page.get_by_text("Draws as you type").wait_for()
    page.wait_for_function("document.querySelectorAll('.pictures figure').length == 1")
    before = finished(page)
    page.get_by_label("Caption").press_sequentially(" by the sea at night")
    changed(page, before)
    page.wait_for_function(
        "document.querySelector('.pictures img').alt == document.querySelector('textarea, input[type=text]').value")
    # the last letters' picture stays: it is what the button draws too
    typed = sources(page)
    page.get_by_label("Caption").fill("a boat")  # without a keystroke, as one pastes
    boat = changed(page, typed)
    page.get_by_label("Seed of the noise").fill("1")
    other = changed(page, boat)
    page.get_by_label("Seed of the noise").fill("0")
    assert changed(page, other) == boat


@pytest.mark.slow
def test_a_long_request_of_one_person_does_not_stop_another(address, visit):
    patient, hasty = visit(address), visit(address)
    choose_only(hasty, "quick")
    hasty.get_by_text("Draws as you type").wait_for()
    hasty.wait_for_function("document.querySelectorAll('.pictures figure').length == 1")
    before = finished(hasty)
    patient.get_by_label("number input for Steps (0: the model's)").fill("200")
    patient.get_by_role("button", name="Draw").click()
    patient.wait_for_function("document.querySelector('.pictures progress')?.value > 0", polling=100)  # frames may stop behind
    hasty.get_by_label("Caption").fill("a boat")
    changed(hasty, before)
    assert patient.locator(".pictures progress").count() == 3 and not sources(patient)
    assert len(finished(patient)) == 3
    assert "200 ddim steps" in patient.locator(".pictures figcaption").first.inner_text()


@pytest.mark.slow
def test_more_than_a_queue_of_work_is_refused(serve, visit, tmp_path):
    """On a page that finds no runs and shows the embedded teacher alone."""
    address = serve("--folder", tmp_path / "empty", "--at-once", "1", "--waiting", "1")
    first, second, third = (visit(address) for _ in range(3))
    assert first.locator(".pictures b").all_inner_texts() == ["mini-teacher"]
    first.get_by_label("number input for Steps (0: the model's)").fill("200")
    first.get_by_label("Four pictures each").check()
    first.get_by_role("button", name="Draw").click()
    first.wait_for_function("document.querySelector('.pictures progress')?.value > 0", polling=100)
    second.get_by_role("button", name="Draw").click()
    second.get_by_text("queue: 1/1").wait_for()
    third.get_by_role("button", name="Draw").click()
    third.get_by_text("This application is currently busy").first.wait_for()
