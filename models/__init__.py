"""Networks, presets and the latent codec.

    from models import DeepFlow, create_model, load_model

Names are imported on first use, so that a program that needs one module of this package does not load the others.
"""

import importlib

HOMES = {
    "DeepFlow": "deepflow",
    "FlowMap": "flow_map",
    "MMDiT": "mmdit",
    "PRESETS": "presets",
    "create_model": "presets",
    "model_config": "presets",
    "load_checkpoint": "checkpoints",
    "load_model": "checkpoints",
}
__all__ = list(HOMES)


def __getattr__(name):
    """Import a public name from its module."""
    if name not in HOMES:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"models.{HOMES[name]}"), name)
