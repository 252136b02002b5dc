"""No training step reads anything back from the device: each runs even with tensors that have no values.

Weights, batches and draws become fake tensors, of which reading a value raises; what stays on the host is real.
"""

import dataclasses

import captioned
import pytest
import tiny
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import train
from common.flags import parse_flags
from training.config import TextTrainConfig
from training.draws import ON_CPU
from training.trainer import Trainer

STEPS = 2  # the first creates the optimizer's state


class Finished(Exception):
    """Raised once STEPS steps have run."""


class Faked:
    """Replaces tensors on the device by fake ones and records the steps that ran."""

    def __init__(self):
        self.mode, self.steps = FakeTensorMode(allow_non_fake_inputs=True), []

    def tensor(self, tensor):
        return tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)

    def module(self, module):
        """Fake weights and buffers, in place."""
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(self.tensor(p.detach()), p.requires_grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer if buffer is None else self.tensor(buffer)

    def record(self, record):
        """A batch or draws with fake tensors, except for those that stay on the host."""
        changes = {name: self.value(value) for name, value in vars(record).items() if name not in ON_CPU}
        return dataclasses.replace(record, **changes)

    def value(self, value):
        if isinstance(value, tuple):
            return tuple(map(self.tensor, value))
        return self.tensor(value) if isinstance(value, torch.Tensor) else value


@pytest.fixture
def faked(monkeypatch):
    """The loop of every program, with fake tensors, ends with Finished after STEPS steps."""
    faked = Faked()
    start, step = Trainer.__init__, Trainer.train_step

    def start_faked(self, run, objective, *rest):
        faked.module(run.model)
        for encoder in getattr(objective.keywords.get("targets"), "encoders", {}).values():
            faked.module(encoder.network)
        monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)  # it accepts no fake weights
        start(self, run, objective, *rest)

    def after_step(self, step, stopping):
        faked.steps.append(step)
        if step == STEPS:
            raise Finished

    monkeypatch.setattr(Trainer, "__init__", start_faked)
    monkeypatch.setattr(Trainer, "train_step", lambda self, *records: step(self, *map(faked.record, records)))
    monkeypatch.setattr(Trainer, "after_step", after_step)
    return faked


def finish(faked, run, *args, **flags):
    """Run a program to Finished, with fake weights in it."""
    with pytest.raises(Finished):
        run(*args, **flags)
    assert faked.steps == [*range(1, STEPS + 1)]


def test_train(faked, tmp_path):
    flags = {"gradient_accumulation_steps": 2, "mixed_precision": "bf16", "gradient_checkpointing": True}
    finish(faked, tiny.run_train, tiny.data_folder(tmp_path / "data"), tmp_path, **flags)


def test_train_with_alignment(faked, tmp_path, monkeypatch):
    encoder = "dinov2-vit-b"
    tiny.shrink_encoder(monkeypatch, encoder, width=16, depth=1)
    data = tiny.aligned_folder(tmp_path / "data")
    finish(faked, tiny.run_train, data, tmp_path, ssl_align=True, enc_ckpt=tiny.encoder_file(encoder, tmp_path))


def test_train_dmf(faked, tmp_path):
    finish(faked, tiny.run_train_dmf, tiny.data_folder(tmp_path / "data"), tmp_path, None, cfg_prob=0.3)


def test_train_t2i(faked, tmp_path):
    line = tiny.train_flags(captioned.foreign_folder(tmp_path), tmp_path, model="DeepFlow-MMDiT-Ti/2")

    def run():
        with tiny.fresh_accelerate():
            train.train(parse_flags(TextTrainConfig, line))

    finish(faked, run)


def test_a_step_that_reads_a_value_is_seen(faked, tmp_path, monkeypatch):
    original = Trainer.update

    def update(self, *values):
        if all(value.isfinite() for value in values):
            original(self, *values)

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(DataDependentOutputException):
        tiny.run_train(tiny.data_folder(tmp_path / "data"), tmp_path)
