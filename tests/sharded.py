"""Runs a script as if this process's CPU were an accelerator: Accelerate shards (FSDP, DeepSpeed) on those only.

    accelerate launch --config_file v3/configs/fsdp.yaml tests/sharded.py v3/train_student_kd.py --mini ...
"""

import os
import runpy
import sys

import torch
from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_XPU)
torch._C._get_accelerator = lambda: torch.device("cpu")  # where FSDP lays its mesh
PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
