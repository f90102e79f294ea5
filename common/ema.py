"""Exponential moving average of a model's weights, on the device where they train."""

import contextlib

import torch


class EMA:
    """ema <- d ema + (1 - d) weight, with d = min(decay, (1 + step) / (10 + step)) so that the start is forgotten."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.shadow = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int):
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach().float() for p in model.parameters()]  # the average stays fp32 where DeepSpeed keeps bf16
        torch._foreach_lerp_(self.shadow, weights, 1 - decay)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict):
        for average, saved in zip(self.shadow, state["shadow"], strict=True):
            average.copy_(saved)

    @contextlib.contextmanager
    def applied(self, model: torch.nn.Module):
        """Within it the model has the average's weights."""
        with torch.no_grad():
            kept = [p.detach().clone() for p in model.parameters()]
            torch._foreach_copy_([p.detach() for p in model.parameters()], self.shadow)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([p.detach() for p in model.parameters()], kept)
