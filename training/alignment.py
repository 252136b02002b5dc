"""SSL alignment in training (REPA): where the features of a batch come from, and what the log shows of them."""

from pathlib import Path

from common.errors import InputError
from latents.manifest import DataManifest
from latents.sets import find_features
from models.encoders import ENCODERS, Encoder, parse_enc_type, weights_id
from training.config import AlignmentFlags


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
    manifest = DataManifest.read(folder)
    return manifest.encoder.weights if manifest and manifest.encoder else None


def describe_alignment(config):
    """Lines on where each encoder's features come from, or that --enc-type is unused."""
    if not isinstance(config, AlignmentFlags):
        return []
    if parse_enc_type(config.enc_type) and not config.ssl_align:
        kind = "note" if config.enc_type == AlignmentFlags.enc_type else "warning"
        return [f"{kind}: no alignment: --enc-type {config.enc_type} is unused without --ssl-align"]
    caches, lines = find_caches(config) if Path(config.data_dir).is_dir() else {}, []
    for name, checkpoint in config.encoders().items():
        source = f"computed while training (weights {checkpoint or 'of the hub'})"
        if name in caches:
            source = f"features of {caches[name]} (weights {stored_weights(caches[name])})"
        lines.append(f"alignment, weight {config.proj_coeff}: {name}, {source}")
    return lines


def make_targets(run):
    """Targets of a Run, None without alignment."""
    encoders, accelerator = run.config.encoders(), run.accelerator
    return Targets(encoders, run.dataset, run.options, accelerator.device, accelerator.autocast) if encoders else None


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
