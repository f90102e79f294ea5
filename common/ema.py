"""Exponential moving average of a model's weights, on the device where they train."""

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

    @torch.no_grad()
    def swap(self, model: torch.nn.Module):
        """Exchange the model's weights with the average; a second call puts them back."""
        for p, average in zip(model.parameters(), self.shadow):
            kept = p.detach().clone()
            p.copy_(average)
            average.copy_(kept)
