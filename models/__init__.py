"""Networks, presets and the latent codec.

    from models import DeepFlow, create_model, load_model

Names and modules are imported on first use: `import models` and `models.deepflow.DeepFlow` in a function costs nothing
until it is called.
"""

import importlib.util

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
    """Import a public name from its module, or a module."""
    if name in HOMES:
        return getattr(importlib.import_module(f"models.{HOMES[name]}"), name)
    if name.startswith("_") or importlib.util.find_spec(f"models.{name}") is None:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return importlib.import_module(f"models.{name}")
