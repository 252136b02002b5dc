"""Picture grids of samples, in training and elsewhere."""

import numpy as np
import torch
from PIL import Image

from models.errors import InputError
from samplers import GuidedVelocity, sample_map, sample_noise, sample_ode
from training.checkpoint import write_atomically, write_json

GRID_STEPS = 50


def image_grid(images, columns):
    """uint8 images (N, R, R, 3) → one uint8 picture with `columns` images a row; missing ones are white."""
    images = np.asarray(images)
    rows = -(-len(images) // columns)
    canvas = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    canvas[: len(images)] = images
    side = images.shape[1]
    return canvas.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def save_grid(images, columns, path):
    """Write image_grid as a PNG, whole or not at all."""
    picture = Image.fromarray(image_grid(images, columns))
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


class GridSampler:
    """Draws the same noises and labels at every call, so that grids of different steps can be compared."""

    def __init__(self, codec, info, run_dir, seed, count=16):
        info.spec.check_same(codec.spec, "the data", "--vae")
        self.codec, self.info, self.run_dir, self.seed, self.count = codec, info, run_dir, seed, count

    def __call__(self, model, step):
        """Write OUTPUT/samples/STEP.png and its manifest, no guidance; returns the path."""
        device, n = model.pos_embed.device, self.count
        channels, h, w = self.info.spec.channels, *self.info.moments_shape[1:]
        y = torch.arange(n, device=device) * self.info.num_classes // n
        noise = sample_noise(self.seed, range(n), 0, (channels, h, w)).to(device)
        latents, how = self.sample(model, noise, y, torch.full_like(y, self.info.num_classes))
        if not torch.isfinite(latents).all():
            raise InputError(f"samples at step {step} are not finite; the training has diverged, lower --learning-rate")
        path = self.run_dir / "samples" / f"{step:07d}.png"
        columns = max(1, round(n**0.5)) * (len(latents) // n)
        save_grid(self.codec.decode(latents.float()).cpu(), columns, path)
        manifest = {"step": step, "weights": "ema", **how, "seed": self.seed}
        write_json(path.with_suffix(".json"), {**manifest, "labels": y.tolist(), "vae": self.codec.spec.vae})
        return path

    def sample(self, model, noise, y, y_null):
        """Latents of an Euler ODE, and how they were made for the manifest."""
        velocity = GuidedVelocity(model.velocity, y, y_null)
        latents = sample_ode(velocity, noise, num_steps=GRID_STEPS)
        return latents, {"sampler": "ode-euler", "calls": velocity.calls}


class FlowMapGridSampler(GridSampler):
    """The same for flow maps: every noise and label with 1, 2 and 4 steps side by side."""

    STEPS = (1, 2, 4)

    def sample(self, model, noise, y, y_null):
        """Latents of Euler steps along the map, and how they were made for the manifest."""
        u = GuidedVelocity(model.average_velocity, y, y_null)
        latents = torch.stack([sample_map(u, noise, steps) for steps in self.STEPS], dim=1).flatten(0, 1)
        return latents, {"sampler": "map-euler", "steps": list(self.STEPS), "calls": u.calls}
