"""SSL alignment in training (REPA): where the encoders' features of a batch come from, and what the log says of it."""

from pathlib import Path

from common.errors import InputError
from latents.manifest import read_manifest
from latents.sets import find_features
from models.encoders import ENCODERS, Encoder, weights_id


def find_caches(config):
    """{encoder: folder} of the encoders whose features are on disk, in `features-NAME` of the data folder.

    Raises InputError where --enc-ckpt names other weights than those that made them.
    """
    caches = {}
    for name, checkpoint in config.encoders().items():
        if folder := find_features(config.data_dir, name):
            made_with, given = stored_weights(folder), checkpoint and weights_id(name, checkpoint)
            if given not in (None, made_with):
                raise InputError(
                    f"{folder} was made with the weights {made_with}, --enc-ckpt {checkpoint} is {given}; write the "
                    "features again, or move the folder away"
                )
            caches[name] = folder
    return caches


def stored_weights(folder):
    """What the manifest of a set of features says of the encoder's weights, or None."""
    encoder = (read_manifest(folder) or {}).get("encoder")
    return encoder.get("weights") if isinstance(encoder, dict) else None


def feature_sources(config):
    """One line per encoder: where its features come from."""
    caches = find_caches(config) if Path(config.data_dir).is_dir() else {}
    return [
        f"{name}, features of {caches[name]} (weights {stored_weights(caches[name])})"
        if name in caches
        else f"{name}, computed while training (weights {checkpoint or 'of the hub'})"
        for name, checkpoint in config.encoders().items()
    ]


def make_targets(config, dataset, options, accelerator):
    """Targets of a run, None without alignment."""
    encoders = config.encoders()
    return Targets(encoders, dataset, options, accelerator.device, accelerator.autocast) if encoders else None


class Targets:
    """Features of a batch, one tensor (B, T, Z) per encoder: as stored where they are on disk, or computed here.

    encoders: {name: weights file or None}; options: the model's constructor arguments. Computed in `autocast`.
    """

    def __init__(self, encoders, dataset, options, device, autocast):
        tokens = (options["input_size"] // options["patch_size"]) ** 2
        for name, stored in dataset.features.items():
            if stored.rows.shape != (tokens, ENCODERS[name].width):
                raise InputError(
                    f"features of --enc-type {name} have the shape {stored.rows.shape}, the model needs "
                    f"{(tokens, ENCODERS[name].width)}; write them again, from the images that the latents are of"
                )
        self.names, self.autocast = tuple(encoders), autocast
        self.encoders = [
            None if name in dataset.features else Encoder(name, dataset.info.resolution, checkpoint, device)
            for name, checkpoint in encoders.items()
        ]

    def __call__(self, batch):
        """List of features of a Batch, without gradient."""
        stored = iter(batch.features)
        with self.autocast():
            return [next(stored) if encoder is None else encoder(batch.images) for encoder in self.encoders]

    def parts(self, losses):
        """Mean alignment loss and each one by name, for the log: loss_projI of VeRA block I, with several encoders'."""
        several = len(self.names) > 1
        parts = {"loss_proj": losses.detach().mean()}
        for number, loss in enumerate(losses.detach()):
            block, encoder = divmod(number, len(self.names))
            parts[f"loss_proj{block + 1}" + (f"_{self.names[encoder]}" if several else "")] = loss
        return parts
