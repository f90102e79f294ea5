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
        torch._foreach_lerp_(self.shadow, [p.detach() for p in model.parameters()], 1 - decay)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict):
        for average, saved in zip(self.shadow, state["shadow"], strict=True):
            average.copy_(saved)

    @contextlib.contextmanager
    def applied(self, model: torch.nn.Module):
        """Within it the model has the average's weights."""
        weights = [p.detach() for p in model.parameters()]
        kept = [w.clone() for w in weights]
        torch._foreach_copy_(weights, self.shadow)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)
