"""Exponential moving average of the weights, fp32."""

import contextlib

import torch


class EMA:
    """ema ← decay·ema + (1 − decay)·weights, after every step that changed the weights."""

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.buffers = dict(model.named_buffers())  # constants, stored beside the averages

    @torch.no_grad()
    def update(self, model, skip=None):
        """One step of the average. If `skip`, a 0-d bool on the device, is true, not a bit changes.

        ema ← ema − (1 − decay)·(ema − weights) is an SGD step with learning rate 1 − decay, weight decay 1 and the
        weights as gradients to ascend. Torch's fused SGD kernel can skip a step by a flag on the device; lerp cannot.
        """
        found_inf = None if skip is None else skip.float()
        step = {"lr": 1 - self.decay, "weight_decay": 1, "maximize": True, "found_inf": found_inf}
        plain = {"momentum": 0, "dampening": 0, "nesterov": False, "is_first_step": False}
        shadow, weights = list(self.shadow.values()), [p.detach() for p in model.parameters()]
        torch._fused_sgd_(shadow, weights, [], **step, **plain)

    @contextlib.contextmanager
    def swapped_into(self, model):
        """Within the context the model holds the averaged weights."""
        self._swap(model)
        try:
            yield model
        finally:
            self._swap(model)

    def _swap(self, model):
        for name, p in model.named_parameters():
            p.data, self.shadow[name] = self.shadow[name], p.data

    def state_dict(self):
        return {**self.shadow, **self.buffers}

    def load_state_dict(self, state):
        for name, tensor in self.shadow.items():
            tensor.copy_(state[name])
