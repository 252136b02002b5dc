"""Pictures as PNG files: images in a grid, with captions or without, and lines over an axis."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import write_atomically

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


def save_lines(lines, path, marker=None, **axes):
    """Write a PNG of {label: [(x, y)]}; axes: what matplotlib's Axes.set takes."""
    from matplotlib.figure import Figure  # a second to import, and few pictures need it

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot = figure.subplots()
    for label, points in lines.items():
        plot.plot(*zip(*points, strict=True), marker=marker, label=label)
    plot.set(**axes)
    plot.grid(alpha=0.3)
    plot.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
