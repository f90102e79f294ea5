"""A script's settings: one typed dataclass at its top, which is also its command line and its `--help`."""

import argparse
import dataclasses
import inspect
import math
import re
import typing


def parse(settings_class, description: str, mini: dict | None = None, argv: list[str] | None = None):
    """Build `settings_class` from the command line.

    Every field is an option; its default and the comment behind it are its help. `mini` holds the defaults that
    `--mini` changes; an option that is typed out always wins. A tuple is written as `320,352`.
    """
    source = inspect.getsource(settings_class)
    comments = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", source, re.M))
    kinds = typing.get_type_hints(settings_class)
    parser = argparse.ArgumentParser(usage="%(prog)s [--option value ...]", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(settings_class):
        kind = kinds[field.name]
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{comments.get(field.name, '')} (default {shown}"
        if mini and field.name in mini:
            small = mini[field.name]
            text += f"; with --mini {','.join(map(str, small)) if isinstance(small, tuple) else small}"
        options = {"help": (text + ")").replace("%", "%%"), "default": argparse.SUPPRESS, "dest": field.name}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            element = typing.get_args(kind)[0]

            def comma_separated(text, element=element):
                return tuple(element(part) for part in text.split(","))

            options["type"] = comma_separated
            options["metavar"] = "N,N,..." if element is int else "NAME,..."
        else:
            options["type"], options["metavar"] = finite if kind is float else kind, kind.__name__.upper()
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    return settings_class(**{**(mini if mini and given.get("mini") else {}), **given})


def finite(text: str) -> float:
    """The number. Raises ValueError for nan and infinities, which no setting has a use for."""
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def check(conditions: dict[str, bool]):
    """Refuse settings that cannot work: {what must hold: whether it does}. Raises SystemExit with the first miss."""
    for requirement, holds in conditions.items():
        if not holds:
            raise SystemExit(f"error: {requirement}")


def first_line(error: Exception) -> str:
    """What an error says, short enough for a line of ours; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
