"""What the versions share and is not their idea."""

import torch

# A CPU-only torch beside a CUDA build of torchvision (pip's default on Linux): torchvision's compiled operators cannot load,
# its import fails at the first of them, and the import of transformers with it. Nothing here calls these operators, so
# declaring them lets the Python part work. It must happen before anything imports transformers, which is why it stands here.
try:
    import torchvision  # noqa: F401
except ImportError:
    pass  # only Inception and LPIPS of the real world need it, and they say so themselves
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for _operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
