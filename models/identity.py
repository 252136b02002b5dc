"""Identity of encoders (VAEs and text encoders) by their content, whatever their folder is called."""

import hashlib
import json

import numpy as np

from common.errors import InputError


class Identity:
    """Base of dataclasses that identify the encoder used: `family`, and `encoder_sha256` if it is known.

    KIND: its name in messages; NAME: the field with its name or folder; FLAG: the flag that selects it;
    SETTINGS: further fields that must agree.
    """

    KIND = NAME = FLAG = ""
    SETTINGS = ()

    def difference(self, other, content="encoder_sha256", name="family"):
        """The first field that should agree but does not, else None.

        If the content of either is unknown, as in older files, the names are compared instead.
        """
        is_known = getattr(self, content) and getattr(other, content)
        fields = (content if is_known else name, *self.SETTINGS)
        return next((field for field in fields if getattr(self, field) != getattr(other, field)), None)

    def check_same(self, other, ours, theirs):
        """Raise InputError unless encoder and settings agree; ours, theirs: for the message."""
        if (field := self.difference(other)) is None:
            return
        a, b = getattr(self, field), getattr(other, field)
        name, other_name = getattr(self, self.NAME), getattr(other, self.NAME)
        both = f"{ours} has {field} {a!s:.36} ({name}), {theirs} has {field} {b!s:.36} ({other_name})"
        remedy = f"use {self.FLAG} {name}{' as it was then' if name == other_name else ''}, or encode again"
        if field == "family":
            remedy += "; if they are the same, rename the folder: without a recorded hash, only its name is compared"
        raise InputError(f"{self.KIND} mismatch: {both}; {remedy}")


def parameters_of(network):
    """{name: parameter of a network, on the CPU}, for content_sha256."""
    return {name: parameter.detach().cpu() for name, parameter in network.named_parameters()}


def content_sha256(weights, prefixes, facts):
    """Hex sha256 of weights {name: tensor or array} whose names begin with one of `prefixes`, and JSON-like `facts`.

    Weights are hashed as float16, so that full- and half-precision files give the same hash.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(weights):
        if name.startswith(prefixes):
            digest.update(f"{name} {tuple(weights[name].shape)}".encode())
            with np.errstate(over="ignore"):
                digest.update(np.ascontiguousarray(weights[name], np.float16))
    return digest.hexdigest()
