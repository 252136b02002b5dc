"""Picture grids of samples, in training and elsewhere."""

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.errors import InputError
from samplers import GuidedVelocity, sample_map, sample_noise, sample_ode
from training.checkpoint import write_atomically, write_json

GRID_STEPS = 50
CAPTION_WIDTH, CAPTION_HEIGHT = 160, 44  # pixels: an image at least this wide, three lines of text


def image_grid(images, columns):
    """uint8 images (N, H, W, 3) → one uint8 picture with `columns` images a row; missing ones are white."""
    images = np.asarray(images)
    rows = -(-len(images) // columns)
    canvas = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    canvas[: len(images)] = images
    height, width = images.shape[1:3]
    return canvas.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def with_captions(images, captions):
    """uint8 images (N, R, R, 3) → (N, H, W, 3), each enlarged to a readable width, with its caption below it."""
    enlarge = -(-CAPTION_WIDTH // len(images[0]))
    images = np.asarray(images).repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    side = images.shape[1]
    pictures = []
    for image, caption in zip(images, captions, strict=True):
        picture = Image.new("RGB", (side, side + CAPTION_HEIGHT), "white")
        picture.paste(Image.fromarray(image))
        lines = textwrap.wrap(caption, side // 7, max_lines=3, placeholder=" …")
        ImageDraw.Draw(picture).multiline_text((3, side + 2), "\n".join(lines), "black", ImageFont.load_default(11))
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def save_grid(images, columns, path, captions=None):
    """Write image_grid as a PNG, whole or not at all; captions: N texts to write below the images."""
    if captions is not None:
        images = with_captions(images, captions)
    picture = Image.fromarray(image_grid(images, columns))
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


class GridSampler:
    """Draws the same noises and labels at every call, so that grids of different steps can be compared."""

    def __init__(self, codec, dataset, run_dir, seed, count=16):
        dataset.info.spec.check_same(codec.spec, "the data", "--vae")
        self.codec, self.info, self.run_dir, self.seed = codec, dataset.info, run_dir, seed
        self.y, self.y_null, self.labels = dataset.conditions(count)

    def __call__(self, model, step):
        """Write OUTPUT/samples/STEP.png and its manifest, no guidance; returns the path."""
        device, n = model.pos_embed.device, len(self.y)
        channels, h, w = self.info.spec.channels, *self.info.moments_shape[1:]
        noise = sample_noise(self.seed, range(n), 0, (channels, h, w)).to(device)
        latents, how = self.sample(model, noise, self.y.to(device), self.y_null.to(device))
        if not torch.isfinite(latents).all():
            raise InputError(f"samples at step {step} are not finite; the training has diverged, lower --learning-rate")
        path = self.run_dir / "samples" / f"{step:07d}.png"
        columns = max(1, round(n**0.5)) * (len(latents) // n)
        texts = self.labels if isinstance(self.labels[0], str) else None
        save_grid(self.codec.decode(latents.float()).cpu(), columns, path, texts)
        manifest = {"step": step, "weights": "ema", **how, "seed": self.seed}
        write_json(path.with_suffix(".json"), {**manifest, "labels": self.labels, "vae": self.codec.spec.vae})
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
