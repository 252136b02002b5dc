"""Picture grids of samples, in training and elsewhere."""

import torch

from common.errors import InputError
from common.files import write_json
from common.pictures import classes_of_rows, save_grid
from samplers import GuidedVelocity, euler_step, integrate, map_step, sample_noise, time_grid

GRID_STEPS = 50
MAP_STEPS = (1, 2, 4)  # of a flow map, side by side


class GridSampler:
    """Draws the same noises and labels at every call, so that grids of different steps can be compared."""

    def __init__(self, codec, dataset, run_dir, seed, count=16):
        self.codec = codec.fit(dataset.info.spec, "the data")
        self.info, self.run_dir, self.seed = dataset.info, run_dir, seed
        self.y, self.y_null, self.labels = dataset.conditions(count)

    def __call__(self, model, step):
        """Write OUTPUT/samples/STEP.png and its manifest, no guidance; returns the path."""
        device, n = model.pos_embed.device, len(self.y)
        channels, h, w = self.info.spec.channels, *self.info.moments_shape[1:]
        noise = sample_noise(self.seed, range(n), 0, (channels, h, w)).to(device)
        latents, how = sample(model, noise, self.y.to(device), self.y_null.to(device))
        if not torch.isfinite(latents).all():
            raise InputError(f"samples at step {step} are not finite; the training has diverged, lower --learning-rate")
        path = self.run_dir / "samples" / f"{step:07d}.png"
        columns, heads = max(1, round(n**0.5)), [f"{count} step" + "s" * (count > 1) for count in how.get("steps", ())]
        words = {"captions": self.labels}
        if not isinstance(self.labels[0], str):
            words = {"row_names": classes_of_rows(self.labels, columns, self.info.class_names)}
        images = self.codec.decode(latents.float()).cpu()
        save_grid(images, columns * max(1, len(heads)), path, column_names=heads * columns, **words)
        manifest = {"step": step, "weights": "ema", **how, "seed": self.seed}
        write_json(path.with_suffix(".json"), {**manifest, "labels": self.labels, "vae": self.codec.spec.vae})
        return path


def sample(model, noise, y, y_null):
    """Latents of an Euler ODE, or of Euler steps along a flow map, and how they were made for the manifest."""
    if model.kind == "flow map":
        u = GuidedVelocity(model.average_velocity, y, y_null)
        latents = [integrate(map_step, u, noise, time_grid(steps)) for steps in MAP_STEPS]
        how = {"sampler": "map-euler", "steps": list(MAP_STEPS), "calls": u.calls}
        return torch.stack(latents, dim=1).flatten(0, 1), how
    velocity = GuidedVelocity(model.velocity, y, y_null)
    latents = integrate(euler_step, velocity, noise, time_grid(GRID_STEPS))
    return latents, {"sampler": "ode-euler", "calls": velocity.calls}
