"""What the versions share and is not their idea: data, teacher, slicing, EMA, sampling, metrics, checkpoints."""

import sys
import warnings

import torch

# diffusers passes the hub's client an argument that it no longer takes
warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")

try:
    import torchvision  # noqa: F401
except ImportError:
    pass  # only Inception and LPIPS of the real world need it, and they say so themselves
except RuntimeError as error:
    # A CPU-only torch beside a CUDA build of torchvision (pip's default on Linux): its compiled operators cannot
    # load, and its import then fails at the first of them, which takes transformers down with it. Nothing here
    # calls these operators, so declaring them lets the Python part work.
    if "torchvision::" not in str(error):
        raise
    for _op in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import diffusers  # noqa: E402
import transformers  # noqa: E402

for _library in (diffusers, transformers):  # bars and notes of loading and saving, in between the training's own
    _library.utils.logging.disable_progress_bar()
    _library.utils.logging.set_verbosity_error()


def _stopped(kind, error, trace, otherwise=sys.excepthook):
    """Ctrl-C outside of the training's own loop is no error: one line in place of a traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        return otherwise(kind, error, trace)
    print("\nstopped; what was saved is kept: run the same command again, a run that has begun with --resume", file=sys.stderr)


sys.excepthook = _stopped
