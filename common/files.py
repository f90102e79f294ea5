"""Files that survive a kill and a full disk: atomic writes, fingerprints, text in any Unicode encoding."""

import codecs
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
PATIENCE_S = 10  # with what another program holds: a file on Windows, a run's folder for some seconds after a kill


def write_atomically(path: Path, content: bytes):
    """Write a file so that a reader sees either the old one or the new one, whole."""
    partial = Path(f"{path}.tmp-{uuid.uuid4().hex}")  # no process id: two machines can have the same
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def put_in_place(partial: Path, final: Path):
    """Rename what is whole, a file or a folder, and let go of the one that had the name `final` before.

    Windows refuses as long as another program, a virus scanner say, holds a file of either open: there it is tried for
    PATIENCE_S. Raises SystemExit where that does not help; the `partial` stays.
    """
    if partial.is_dir() and final.is_dir():  # no system replaces one at a stroke
        old = final.with_name(f"{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        put_in_place(final, old)
        put_in_place(partial, final)
        return shutil.rmtree(old, ignore_errors=True)
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return os.replace(partial, final)
        except PermissionError as error:
            if not hasattr(error, "winerror"):  # elsewhere it is what it says
                raise
            if time.monotonic() > until:
                raise SystemExit(f"error: {final} is held open by another program; close it and run again") from None
        time.sleep(0.1)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises SystemExit with one line where it is neither, or cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SystemExit(f"error: {path} cannot be read ({error.strerror})") from None
    encoding = "utf-8"
    for mark, name in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            encoding = name
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise SystemExit(f"error: {path} is not text in UTF-8 (byte {error.start}); save it as UTF-8") from None


def read_kept(record: Path) -> dict | None:
    """What a JSON file of the cache holds; None where there is none or a crash has spoilt it: it is then made anew."""
    try:
        return json.loads(record.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def read_tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """The same of a .safetensors file of the cache. Read, not mapped, as Windows replaces no file that is."""
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):
        return None


def fingerprint(*parts) -> str:
    """A short hash of modules (their weights), paths (file contents), bytes and plain values."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, weight in part.state_dict().items():
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                values = weight.detach().cpu().contiguous().flatten()
                digest.update(values.view(torch.uint8).numpy())  # as bytes: numpy knows no bf16
        elif isinstance(part, Path):
            digest.update(part.read_bytes())
        elif isinstance(part, bytes):
            digest.update(part)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def make_folder(folder: Path, option: str) -> Path:
    """Make it and what lies above it, and return it. Raises SystemExit where that cannot be, or it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: {option}: {folder} cannot be made ({error.strerror}); choose another folder") from None
    if not os.access(folder, os.W_OK):
        raise SystemExit(f"error: {option}: {folder} cannot be written to; choose another folder")
    return folder


def make_readable(folder: Path):
    """Give its weights the usual rights: safetensors writes files that their owner alone can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(OSError):  # of a share that has no rights of this kind
            path.chmod(0o666 & ~mask)


@contextlib.contextmanager
def full_disk_is_one_line(folder: Path, kept: str, remove: Path | None = None):
    """Turns "no space left" into SystemExit with a line that says what is `kept`; the incomplete folder `remove` is deleted
    first."""
    try:
        yield
    except BaseException as error:  # a mistake that was told in one line, and Ctrl-C, leave nothing half made either
        full = isinstance(error, Exception) and is_disk_full(error, folder)
        if remove is not None:
            shutil.rmtree(remove, ignore_errors=True)
        if not full:
            raise
        raise SystemExit(f"error: the disk of {folder} is full; free some space and run again, {kept}") from None


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Whether a full disk is behind `error`. Libraries raise errors of their own on top, torch's and safetensors' writers
    without a number: then the disk itself is asked, which still holds what was half written."""
    cause = error
    while cause:
        if getattr(cause, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            return True
        cause = cause.__context__
    writer = isinstance(error, (RuntimeError, SafetensorError)) and Path(folder).is_dir()
    return writer and shutil.disk_usage(folder).free < 2**20


def reserve(path: Path):
    """Claim the disk space of a file that was made with a hole in it: writing through a memory map onto a full disk would
    end the process with a bus error, which nothing can catch."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    elif sys.platform == "darwin" and shutil.disk_usage(path.parent).free < path.stat().st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def model_place(name: str) -> str:
    """Where the model `name` lies: in a run's folder its student; a hub id as it is."""
    name = from_root(name)
    student = Path(name) / "student"
    return str(student) if (student / "unet").is_dir() else name


def name_of(place: str | Path) -> str:
    """What to call the model that lies there: a run's student by the run's name, another by its folder's."""
    path = Path(os.path.abspath(place))  # "." and a plain "student" have names too
    return path.parent.name if path.name == "student" else path.name


def from_root(name: str) -> str:
    """A path of the repository's own, wherever the script is started from; any other name as it is."""
    inside = Path(__file__).resolve().parents[1] / name
    return name if Path(name).exists() or not inside.exists() else str(inside)
