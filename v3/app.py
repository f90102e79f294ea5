"""A page on which a caption becomes pictures: a teacher's and up to two students', from the same noise, side by side.

    python v3/app.py                                                # what checkpoints/ holds, on http://127.0.0.1:7860
    python v3/app.py --model checkpoints/v2.2-mini --compare checkpoints/v4-mini --port 7861

It listens on this machine alone and asks no other. With models of at most eight passes a picture it draws as one types.
"""

import base64
import html
import io
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from inference import how_to_draw

from common.files import from_root, model_place, name_of
from common.precision import pick_dtype
from common.report import card_of
from common.sampling import SAMPLERS, decode_latents, denoise, encode_captions, make_scheduler
from common.settings import parse, require, start
from common.teacher import Teacher, load_teacher
from common.trainer import start_accelerator

# isort: split
from diffusers.utils.torch_utils import randn_tensor
from torchvision.transforms.functional import to_pil_image

try:
    import gradio as gr
except ImportError:
    raise SystemExit("error: the page needs gradio; pip install -r v3/requirements.txt") from None


@dataclass
class Settings:
    teacher: str = ""  # a pipeline folder or a hub id; empty: the newest in --folder, or else checkpoints/mini-teacher
    model: str = ""  # a student: a run's folder, a pipeline folder or a hub id; empty: the newest run
    compare: str = ""  # another one; empty: the second newest
    folder: str = "checkpoints"  # where teachers and runs to choose from are looked for
    port: int = 7860  # of the page's address
    at_once: int = 4  # requests that are drawn in turns
    waiting: int = 16  # requests that may wait for that; more are refused
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of all weights


SLICE_STEPS = 4  # of the sampler, between two turns
LIVE_PASSES = 8  # through the U-Net at most, for which it draws as one types
WORKER = ThreadPoolExecutor(1)  # does all that computes; what is handed in first is done first
NEWEST = {}  # session: its newest request, for which older ones stop


def find_models(folder: Path) -> tuple[list[str], list[str]]:
    """The teachers and the students among the pipeline folders anywhere in `folder`, the newest first: a student is one of a
    run, or, as exported, what its card says."""
    indices = [path for path in folder.glob("**/model_index.json") if path.parent.suffix != ".partial"]
    indices.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    teachers, students = [], []
    for path in indices:
        place = path.parent
        distilled = place.name == "student" or "distillation" in (card_of(str(place)).get("tags") or ())
        (students if distilled else teachers).append(str(place))
    return teachers, students


def passes(how: dict) -> int:
    """Through the U-Net, for one picture."""
    return how["steps"] * (2 if how["guidance"] > 1 else 1)


def load(place: str, device: torch.device, dtype: torch.dtype) -> Teacher:
    index = Path(place) / "model_index.json"
    return load_once(place, device, dtype, index.stat().st_mtime if index.is_file() else 0.0)


@lru_cache(maxsize=6)
def load_once(place: str, device: torch.device, dtype: torch.dtype, written: float) -> Teacher:
    """One of another time of writing is another model: a run's student that was trained anew."""
    return load_teacher(place, device, dtype, "the model")


def draw(model: Teacher, caption: str, count: int, seed: int, how: dict) -> Iterator[tuple[int, list, float]]:
    """Draw `count` pictures, from the noise of seed, seed + 1, ..., as v3/inference.py does. Yields, every few steps, how many
    are done, the pictures once they are there, and the seconds that it took so far."""
    began, device, dtype = time.perf_counter(), model.unet.device, model.unet.dtype
    captions = [caption] * count if how["guidance"] <= 1 else [""] * count + [caption] * count
    encoded = encode_captions(model.text_encoder, model.tokenizer, captions)  # (count or 2 count, tokens, width)
    scheduler = make_scheduler(how["sampler"], model.noise_scheduler)
    scheduler.set_timesteps(how["steps"], device=device)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    side = model.unet.config.sample_size
    noise = randn_tensor((count, 4, side, side), generators, device, dtype).float()
    path = denoise(model.unet, scheduler, noise * scheduler.init_noise_sigma, encoded, how["guidance"], generators)
    spent_s = 0.0
    for step in range(1, how["steps"] + 1):
        latents = next(path)  # (count, 4, side, side)
        if step % SLICE_STEPS == 0 and step < how["steps"]:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # or another's turn would be charged with this one's work
            spent_s += time.perf_counter() - began
            yield step, [], spent_s
            began = time.perf_counter()
    pictures = [to_pil_image(image) for image in decode_latents(model.vae, latents).cpu()]
    yield how["steps"], pictures, spent_s + time.perf_counter() - began


def in_turns(items: Iterator) -> Iterator:
    """The items, each made when it is its turn: in between, the worker serves those who asked meanwhile."""
    end = object()
    while (item := WORKER.submit(next, items, end).result()) is not end:
        yield item


def figure(place: str, how: dict, caption: str, count=1, step=0, pictures=(), seconds=0.0, parameters=0) -> str:
    """A model's pictures as HTML, or how far they are."""
    images = ""
    for picture in pictures:
        png = io.BytesIO()
        picture.save(png, "PNG")
        source = base64.b64encode(png.getvalue()).decode()
        images += f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{source}">'
    state = f"<progress value={step} max={how['steps']}></progress>"
    if pictures:
        state = f"<span>{1000 * seconds:,.0f} ms</span>, {parameters / 1e6:.2f} M parameters"
    said = f"<b>{html.escape(name_of(place))}</b><br>{how['steps']} {how['sampler']} steps, guidance {how['guidance']:g}"
    sheet = f'<div class="sheet{" four" if count > 1 else ""}">{images}</div>'
    return f"<figure>{sheet}<figcaption>{said}<br>{state}</figcaption></figure>"


def hows(places, steps, guidance, sampler) -> dict[str, dict]:
    """How each of at most three models draws, by its place."""
    return {place: how_to_draw(place, steps=steps, guidance=guidance, sampler=sampler) for place in (places or [])[:3]}


def hint(*ways) -> str:
    """The line under the caption."""
    most = max(map(passes, hows(*ways).values()), default=0)
    if most > LIVE_PASSES:
        return f"Press Enter to draw. Models of at most {LIVE_PASSES} passes draw as you type; these take {most}."
    return "Draws as you type." if most else "Choose a model."


def show_with(device: torch.device, dtype: torch.dtype):
    """What draws the figures on the page, as Gradio calls it."""
    def show(request: gr.Request, live, caption, seed, four, *ways):
        """Yields the figures: how far they are, then with pictures. Ends early where the same page has asked anew."""
        how, count = hows(*ways), 4 if four else 1
        if live and (not caption.strip() or max(map(passes, how.values()), default=0) > LIVE_PASSES):
            return
        if not caption.strip() or not how:
            raise gr.Error("Type a caption first." if how else "Choose a model first.", print_exception=False)
        mine = NEWEST[request.session_hash] = object()
        figures = {place: figure(place, how[place], caption, count) for place in how}
        for place in how:
            try:
                model = WORKER.submit(load, place, device, dtype).result()
            except SystemExit as error:
                raise gr.Error(str(error), print_exception=False) from None
            for progress in in_turns(draw(model, caption, count, int(seed or 0), how[place])):
                if NEWEST.get(request.session_hash) is not mine:
                    return
                figures[place] = figure(place, how[place], caption, count, *progress, model.parameters)
                if not live:  # where pictures follow each other quickly, a bar between them would flicker
                    yield f'<div class="pictures">{"".join(figures.values())}</div>'
        yield f'<div class="pictures">{"".join(figures.values())}</div>'
    return show


def forget(request: gr.Request):
    """What a closed page still draws ends with its slice."""
    NEWEST.pop(request.session_hash, None)


def make_page(s: Settings, device: torch.device, dtype: torch.dtype) -> gr.Blocks:
    """Raises SystemExit with one line where a model that `s` names cannot be loaded."""
    folder = Path(from_root(s.folder)).resolve()
    teachers, students = find_models(folder)
    teacher = s.teacher or next(iter(teachers), "checkpoints/mini-teacher")
    named = [model_place(name) for name in (teacher, s.model, s.compare) if name]
    named = [str(Path(name).resolve()) if Path(name).exists() else name for name in named]
    for place in named:
        load(place, device, dtype)
    chosen = list(dict.fromkeys([*named, *students]))[:3]

    def choices() -> list[tuple[str, str]]:
        teachers, students = find_models(folder)
        return [(name_of(place), place) for place in dict.fromkeys([*named, *students, *teachers])]

    show = show_with(device, dtype)
    with gr.Blocks(title="Light Stable Diffusion students", fill_width=True, analytics_enabled=False) as page:
        gr.Markdown("## One caption, one noise, several models")
        with gr.Row(equal_height=True):
            caption = gr.Textbox("a cat on the grass", label="Caption", scale=8, autofocus=True, max_length=500)
            button = gr.Button("Draw", variant="primary", scale=1, min_width=100)
            again = gr.Button("Next seed", scale=1, min_width=100)
        note, figures = gr.Markdown(), gr.HTML()
        with gr.Row():
            models = gr.Dropdown(choices(), value=chosen, multiselect=True, max_choices=3, label="Models, up to three",
                                 scale=2, min_width=300)
            seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0, maximum=2**32 - 1, min_width=120)
            sampler = gr.Dropdown(["auto", *SAMPLERS], value="auto", label="Sampler", min_width=120)
        with gr.Row():
            steps = gr.Slider(0, 200, 0, step=1, label="Steps (0: the model's)")
            guidance = gr.Slider(0, 15, 0, step=0.5, label="Guidance (0: the model's)")
            four = gr.Checkbox(label="Four pictures each")
        ways = [models, steps, guidance, sampler]
        asked, typed = ([gr.State(live), caption, seed, four, *ways] for live in (False, True))
        drawing = dict(outputs=figures, concurrency_limit=s.at_once, show_progress="hidden", api_visibility="private")
        at_once = dict(queue=False, show_progress="hidden", api_visibility="private")
        gr.on([button.click, caption.submit, seed.submit, page.load], show, asked, trigger_mode="multiple", **drawing)
        again.click(lambda seed: (seed or 0) + 1, seed, seed, **at_once).then(show, asked, trigger_mode="multiple", **drawing)
        changes = [caption.change, seed.input, four.input, models.input, steps.release, guidance.release, sampler.input]
        gr.on(changes, show, typed, trigger_mode="always_last", **drawing)  # keystrokes meanwhile count as one, the last
        gr.on([page.load, *(way.change for way in ways)], hint, ways, note, **at_once)
        page.load(lambda: gr.Dropdown(choices()), None, models, **at_once)  # runs that have ended since
        page.unload(forget)
    return page.queue(max_size=s.waiting)


def main(s: Settings):
    device = start_accelerator(s.device).device
    page = make_page(s, device, pick_dtype(s.dtype, device))
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # a Hugging Face Space sets it
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no web fonts
    # Gradio asks its own address whether it answers, and would ask a proxy for it
    os.environ["no_proxy"] = f"127.0.0.1,{os.environ.get('no_proxy') or os.environ.get('NO_PROXY', '')}"
    try:
        page.launch(server_name=host, server_port=s.port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
                    run_history=False, footer_links=[], theme=theme, css_paths=ROOT / "v3" / "app.css")
    except OSError:
        require(False, f"port {s.port} is in use or not allowed; choose another with --port")
    print(f"open {page.local_url} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    start(main, parse(Settings, __doc__, limits={"port": (1, 65535), "at_once": (1, None), "waiting": (1, None)}))
