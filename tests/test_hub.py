"""Loading a teacher by hub id and uploading a student, against servers on loopback that speak the hub's protocol."""

import json
import shutil

import pytest
from conftest import TEACHER, run_apart
from hub_servers import NOWHERE, environment_of, serve_repository, serve_uploads
from huggingface_hub import ModelCard

# the hub's client waits half a minute in all between its retries, which no setting shortens
IMPATIENT = "import time; time.sleep = lambda _: None\n"
LOAD = ("import sys; sys.path.insert(0, '.')\nimport common, torch\nfrom common.settings import start\n"
        "from common.teacher import load_teacher\n"
        "def main(name):\n"
        "    teacher = load_teacher(name, torch.device('cpu'))\n"
        "    print('loaded', sum(p.numel() for p in teacher.unet.parameters()))\n"
        "start(main, sys.argv[1])\n")
TRAIN = ("import runpy, sys; sys.argv[0] = 'v3/train_student_kd.py'; sys.path.insert(0, 'v3')\n"
         "runpy.run_path(sys.argv[0], run_name='__main__')\n")


@pytest.fixture
def hub():
    """(environment that points at the server, list of (method, path, range) requests, dict of what to break)."""
    with serve_repository(TEACHER) as (endpoint, requests, broken):
        yield environment_of(endpoint), requests, broken


def load(name, environment, home):
    return run_apart("-c", IMPATIENT + LOAD, name, env={**environment, "HF_HOME": str(home)})


@pytest.mark.slow
def test_a_hub_id_loads_and_goes_on_after_a_cut_connection(hub, tmp_path):
    environment, requests, broken = hub
    weights = "unet/diffusion_pytorch_model.safetensors"
    broken[weights] = True
    done = load("somebody/mini", environment, tmp_path)
    assert done.returncode == 0 and "loaded 13038884" in done.stdout, done.stderr[-1500:]
    ranges = [r for method, path, r in requests if method == "GET" and path.endswith(weights) and r]
    assert any(int(r.split("=")[1].split("-")[0]) > 0 for r in ranges)  # not from the start again


@pytest.mark.slow
def test_a_hub_id_of_fp16_files_alone_loads_and_one_without_any_names_the_plain_one(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TEACHER, folder)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    with serve_repository(folder) as (endpoint, _, _):
        done = load("somebody/mini", environment_of(endpoint), tmp_path / "home")
        assert done.returncode == 0 and "loaded 13038884" in done.stdout, done.stderr[-1500:]
        file = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
        file.rename(file.with_name("another.safetensors"))
        done = load("somebody/mini", environment_of(endpoint), tmp_path / "another home")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "vae: somebody/mini" in last and "file named diffusion_pytorch_model.safetensors" in last


@pytest.mark.slow
def test_another_familys_hub_id_is_refused_before_its_weights_are_downloaded(tmp_path):
    (tmp_path / "xl" / "unet").mkdir(parents=True)
    config = json.loads((TEACHER / "unet" / "config.json").read_text()) | {"use_linear_projection": True}
    (tmp_path / "xl" / "unet" / "config.json").write_text(json.dumps(config))
    (tmp_path / "xl" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"gigabytes")
    with serve_repository(tmp_path / "xl") as (endpoint, requests, _):
        done = load("somebody/mini", environment_of(endpoint), tmp_path / "home")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: the U-Net of somebody/mini is of another")
    assert not any("safetensors" in path for _, path, _ in requests)


@pytest.mark.slow
def test_a_hub_id_that_was_loaded_before_is_not_downloaded_again(hub, tmp_path):
    environment, requests, _ = hub
    assert load("somebody/mini", environment, tmp_path).returncode == 0
    before = len(requests)
    again = load("somebody/mini", environment, tmp_path)
    assert again.returncode == 0 and not [p for m, p, _ in requests[before:] if m == "GET" and p.endswith(".safetensors")]


AFTER_A_PIPELINE = ("sys.path.insert(0, '.')\nimport common\nfrom diffusers import StableDiffusionPipeline\n"
                    "pipeline = StableDiffusionPipeline.from_pretrained('somebody/mini', safety_checker=None)\n"
                    "import torch\nfrom common.report import drawn_with\n"
                    "from common.teacher import load_teacher\n"
                    "folder = load_teacher('somebody/mini', torch.device('cpu')).folder()\n"
                    "print('parts', *sorted(path.name for path in folder.iterdir() if path.is_dir()))\n"
                    "print('drawn with', drawn_with('somebody/mini'))\n")


@pytest.mark.slow
def test_a_pipeline_that_was_downloaded_before_and_its_card(tmp_path):
    """The pipeline's own download leaves out files that nothing loads, which the client then calls incomplete."""
    folder = tmp_path / "model"
    shutil.copytree(TEACHER, folder)
    card = ModelCard.load(folder / "README.md")
    card.data.inference = {"parameters": {"num_inference_steps": 4, "guidance_scale": 1.0}}
    card.save(folder / "README.md")
    with serve_repository(folder) as (endpoint, _, _):
        done = run_apart("-c", "import sys\n" + IMPATIENT + AFTER_A_PIPELINE,
                         env={**environment_of(endpoint), "HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr[-1500:]
    assert "parts scheduler text_encoder tokenizer unet vae" in done.stdout
    assert "drawn with {'guidance': 1.0, 'sampler': 'ddim-trailing', 'steps': 4}" in done.stdout


FOLDER = ("import sys; sys.path.insert(0, '.')\nimport common, torch\n"
          "from common.teacher import load_teacher\n"
          "folder = load_teacher('somebody/mini', torch.device('cpu')).folder()\n"
          "print('files', *sorted(path.name for path in folder.iterdir() if path.is_file()))\n")


@pytest.mark.slow
def test_a_hub_teachers_folder_has_its_index_and_its_card(hub, small_set, tmp_path):
    """Without which it is not exported and its Space shows no teacher. And nothing is shipped into a folder of its name."""
    environment, _, _ = hub
    environment |= {"HF_HOME": str(tmp_path)}
    done = run_apart("-c", IMPATIENT + FOLDER, env=environment)
    assert done.returncode == 0 and "files README.md model_index.json" in done.stdout, done.stderr[-1500:]
    done = run_apart("common/evaluate.py", "--teacher", "somebody/mini", "--data", small_set, "--val-split", "val",
                     "--train-split", "train", "--resolution", "32", "--ship", env=environment)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: --ship"), done.stderr[-1500:]


@pytest.mark.slow
def test_an_unknown_id_is_one_clear_line(hub, tmp_path):
    environment, _, _ = hub
    done = load("somebody/else", environment, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: the teacher somebody/else") and "--mini" in done.stderr


@pytest.mark.slow
def test_no_network_is_one_clear_line(tmp_path):
    done = load("somebody/mini", environment_of(NOWHERE), tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # the hub's client notes its retries before it
    assert last.startswith("error: the teacher somebody/mini") and "--mini" in last


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_the_download_goes_on_after(hub, small_disk):
    environment, _, _ = hub
    disk, grow = small_disk
    done = load("somebody/mini", environment, disk)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("error: ") and "full" in last, done.stderr[-1500:]
    grow()
    done = load("somebody/mini", environment, disk)
    assert done.returncode == 0 and "loaded 13038884" in done.stdout, done.stderr[-1500:]


def train(small_set, tmp_path, endpoint, *more):
    """V-3 with --push-to-hub, of two steps."""
    pytest.importorskip("tensorboard", reason="pip install -r v3/requirements.txt")
    return run_apart(
        "-c", IMPATIENT + TRAIN, "--teacher", TEACHER, "--data", small_set, "--train-split", "train", "--val-split", "val",
        "--resolution", "32", "--channels", "32,48,64", "--groups", "4", "--steps", "2", "--batch-size", "2", "--features",
        "effnet-lite0", "--eval-every", "0", "--final-samples", "4", "--sample-steps", "2", "--no-cache", "--store", "0",
        "--device", "cpu", "--cache-folder", tmp_path / "cache", "--push-to-hub", "somebody/student", "--out",
        tmp_path / "run", *more, env=environment_of(endpoint) | {"HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "home")})


@pytest.mark.slow
def test_v3_uploads_its_student(small_set, tmp_path):
    """The commit and the large files are the saved folder."""
    with serve_uploads() as (endpoint, stored, posts):
        done = train(small_set, tmp_path, endpoint)
    assert done.returncode == 0, done.stderr[-2000:]
    student = tmp_path / "run" / "student"
    assert stored == {f.relative_to(student).as_posix(): f.read_bytes() for f in student.rglob("*") if f.is_file()}
    assert {token for path, token in posts if path != "/api/validate-yaml"} == {"Bearer hf_x"}
    paths = [path for path, _ in posts]
    checked, committed = paths.index("/api/validate-yaml"), next(i for i, path in enumerate(paths) if "/commit/" in path)
    assert checked < committed
    card = stored["README.md"].decode("utf-8")
    assert "license: cc-by-sa-4.0" in card and "base_model" not in card  # the embedded teacher stands on no hub
    assert str(tmp_path) not in card and str(TEACHER.parent) not in card and str(small_set) not in card


@pytest.mark.slow
def test_a_card_that_the_hub_refuses_ends_the_run_before_the_training(small_set, tmp_path):
    with serve_uploads(refused='"license" must be one of the known ones\nand more') as (endpoint, stored, posts):
        done = train(small_set, tmp_path, endpoint)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("error: --push-to-hub somebody/student failed") and "must be one of the known ones" in last
    assert "/api/validate-yaml" in [path for path, _ in posts] and not stored
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_ends_the_run_before_the_training(small_set, tmp_path):
    done = train(small_set, tmp_path, NOWHERE)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: --push-to-hub somebody/student failed"), done.stderr[-2000:]
    assert not (tmp_path / "run").exists()
