"""Networks, presets and the latent codec."""

from models.checkpoints import load_checkpoint, load_model
from models.presets import PRESETS, create_model, model_config

__all__ = ["PRESETS", "create_model", "load_checkpoint", "load_model", "model_config"]
