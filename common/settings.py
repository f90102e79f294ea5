"""A script's settings: one typed dataclass at its top, which is also its command line and its `--help`."""

import argparse
import dataclasses
import inspect
import math
import os
import re
import sys
import typing
import warnings

LIMITS = {  # what options of these names take, in every script: from, to (both included)
    "steps": (2, None), "batch_size": (2, None), "final_samples": (2, None), "eval_samples": (2, None), "samples": (2, None),
    "batch": (1, None), "size_px": (0, None), "shard_size": (1, None), "processes": (1, None), "threads": (1, None),
    "sample_steps": (1, 999),  # of 1,000 timesteps, which the teacher's steps_offset moves by one
    "save_every": (1, None), "log_every": (1, None), "eval_batch": (1, None),
    "max_bad_steps": (1, None), "accumulate": (1, None), "keep": (1, None), "layers": (1, None), "resolution": (1, None),
    "channels": (1, None), "groups": (0, None), "seed": (0, 2**32 - 1), "eval_every": (0, None), "workers": (0, None),
    "store": (0, None), "cache_gb": (0, None), "weight_decay": (0, None), "feature_weight": (0, None),
    "task_weight": (0, None), "kd_weight": (0, None), "lr": (1e-12, None), "max_grad_norm": (1e-12, None),
    "warmup": (1e-6, 1 - 1e-6), "ema_decay": (0, 1 - 1e-9), "max_broken": (0, 1), "caption_dropout": (0, 1),
    "dropout_start": (0, 1), "dropout_end": (0, 1), "alpha_start": (0, 1), "alpha_end": (0, 1),
    "val_share": (0, 0.9), "rank": (1, None),
}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SystemExit(f"error: {message} (--help shows all options)")


def parse(settings_class, description: str, mini: dict | None = None, limits: dict | None = None):
    """Build `settings_class` from the command line.

    Every field is an option; its default and the comment behind it are its help. `mini` holds the defaults that
    `--mini` changes; an option that is typed out always wins. A tuple is written as `320,352`.
    `limits` are the script's own, where they differ from LIMITS.
    Raises SystemExit with one line where a value cannot be read or lies outside of its limits.
    """
    source = inspect.getsource(settings_class)
    comments = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", source, re.M))
    kinds = typing.get_type_hints(settings_class)
    parser = OneLineParser(
        usage="%(prog)s [--option value ...]", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(settings_class):
        text = f"{comments.get(field.name, '')} (default {as_typed(field.default)}"
        if mini and field.name in mini:
            text += f"; with --mini {as_typed(mini[field.name])}"
        text = text.replace("%", "%%") + ")"
        option = "--" + field.name.replace("_", "-")
        how_to_read = reader_of(kinds[field.name])
        parser.add_argument(option, dest=field.name, help=text, default=argparse.SUPPRESS, **how_to_read)
    given = vars(parser.parse_args())
    defaults = mini if mini and given.get("mini") else {}
    settings = settings_class(**{**defaults, **given})
    require_limits(settings, LIMITS | (limits or {}))
    return settings


def as_typed(value) -> str:
    """A value as one would type it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def reader_of(kind) -> dict:
    """The options of argparse that read a value of the type `kind`."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if kind is float:
        return {"type": finite, "metavar": "FLOAT"}
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return {"type": comma_separated(element), "metavar": "N,N,..." if element is int else "NAME,..."}
    return {"type": expand_home if kind is str else kind, "metavar": kind.__name__.upper()}


def expand_home(value: str) -> str:
    """As it is, but for a path in the user's folder: shells leave the ~ behind `=` alone, those of Windows every one."""
    return os.path.expanduser(value) if value.startswith(("~/", "~\\")) else value


def finite(text: str) -> float:
    """The number. Raises ArgumentTypeError for what is none, nan and infinities, which no setting has a use for."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def comma_separated(element):
    """A reader of `1,2,3` into a tuple of `element`s; an empty text is an empty tuple."""
    def read(text: str) -> tuple:
        parts = text.split(",") if text else []
        try:
            return tuple((expand_home if element is str else element)(part) for part in parts)
        except ValueError:
            what = "whole numbers" if element is int else "names"
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {what} with commas between them") from None
    return read


def require(holds, message: str):
    """Refuse what cannot work: raises SystemExit with one line unless `holds`."""
    if not holds:
        raise SystemExit(f"error: {message}")


def require_limits(settings, limits: dict):
    """Raises SystemExit with one line where a setting lies outside of its limits."""
    for name, (low, high) in limits.items():
        value = getattr(settings, name, None)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        bounds = f"must lie in {low:g}..{high:.10g}" if high is not None else f"must be at least {low:g}"
        if low == 1e-12:
            bounds = "must be positive"
        for number in values:
            inside = low <= number and (high is None or number <= high)
            require(inside, f"--{name.replace('_', '-')} {bounds}")


def first_line(error: Exception) -> str:
    """What an error says, short enough for a line of ours; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def start(main, settings):
    """Run `main(settings)`. Ctrl-C outside of a training loop, which has its own answer to it, is one line."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # bars and notes of loading and saving, in between the script's own
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    # diffusers passes the hub's client an argument that it no longer takes
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a Windows console of an old encoding has no arrows
    try:
        main(settings)
    except KeyboardInterrupt:
        print("\nstopped; what was saved is kept. Run the same command again; add --resume if training had begun",
              file=sys.stderr)
        raise SystemExit(130) from None
