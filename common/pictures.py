"""TODO docstring."""

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


def class_grid(images, labels, classes=10, columns=10):
    """uint8 (N, R, R, 3), labels (N,) → (classes·columns, R, R, 3): the first of each class, white where too few."""
    chosen = np.full((classes, columns, *images.shape[1:]), 255, np.uint8)
    for label in range(classes):
        rows = images[labels == label][:columns]
        chosen[label, : len(rows)] = rows
    return chosen.reshape(-1, *images.shape[1:])


def enlarge_and_frame(images, factor=2, frame=2):
    """uint8 (N, R, R, 3) → (N, R', R', 3), R' = factor·R + 2·frame: every pixel repeated, a white frame around."""
    larger = images.repeat(factor, axis=1).repeat(factor, axis=2)
    return np.pad(larger, ((0, 0), (frame, frame), (frame, frame), (0, 0)), constant_values=255)


def save_class_grid(images, labels, path, classes=10, columns=10):
    """Write a PNG whose rows are classes."""
    save_grid(enlarge_and_frame(class_grid(images, labels, classes, columns)), columns, path)
