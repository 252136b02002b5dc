"""PNG pictures: grids of images, optionally with captions and row and column names, and line plots."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import write_atomically

SMALL, CAPTION_WIDTH = 64, 160  # pixels: minimum width of images, and of images with captions
LONGEST = 24  # maximum length of a class name beside a row
GAP, LINE, LETTER = 2, 13, 7  # pixels: gap between images, height of a line of text, width of a letter


def image_grid(images, columns):
    """uint8 images (N, H, W, 3) → one uint8 picture, `columns` images per row, GAP between them; empty cells white."""
    images = np.pad(images, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows = -(-len(images) // columns)
    canvas = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    canvas[: len(images)] = images
    height, width = images.shape[1:3]
    canvas = canvas.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return canvas.reshape(rows * height, columns * width, 3)[:-GAP, :-GAP]


def enlarged(images, width):
    """uint8 images (N, H, W, 3) enlarged by repeating pixels to at least `width`."""
    times = -(-width // np.shape(images)[2])
    return np.asarray(images).repeat(times, axis=1).repeat(times, axis=2)


def with_captions(images, captions):
    """uint8 images (N, R, R, 3) → (N, H, R, 3), with three lines below each for its caption."""
    side = images.shape[1]
    pictures = []
    for image, caption in zip(images, captions, strict=True):
        picture = Image.new("RGB", (side, side + 3 * LINE + 5), "white")
        picture.paste(Image.fromarray(image))
        lines = textwrap.wrap(caption, side // LETTER, max_lines=3, placeholder=" …")
        write(picture, (3, side + 2), lines)
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def classes_of_rows(labels, columns, class_names=None):
    """[[name of a class, …], …] of each row of a grid: the classes in it, by number where they have no names."""
    names, starts = dict(enumerate(class_names or ())), range(0, len(labels), columns)
    rows = (dict.fromkeys(labels[start : start + columns]) for start in starts)
    return [[str(names.get(label, label))[:LONGEST] for label in row] for row in rows]


def with_names(grid, row_names, column_names):
    """A picture with names left of its rows (lists of lines, joined if too many) and above its columns (texts)."""
    fit = max(1, grid.height // max(1, len(row_names)) // (LINE + GAP))
    joined = [textwrap.wrap(", ".join(lines), LONGEST, max_lines=fit, placeholder=" …") for lines in row_names]
    row_names = [short if len(lines) > fit else lines for lines, short in zip(row_names, joined, strict=True)]
    left = max((LETTER * len(line) + 6 for lines in row_names for line in lines), default=0)
    top = (LINE + 3) * bool(column_names)
    picture = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    picture.paste(grid, (left, top))
    for number, name in enumerate(column_names):
        write(picture, (left + number * (grid.width + GAP) // len(column_names), 0), [name])
    for number, lines in enumerate(row_names):
        write(picture, (2, top + number * (grid.height + GAP) // len(row_names)), lines)
    return picture


def write(picture, place, lines):
    """Write lines of text into a PIL picture, with their upper left corner at (x, y)."""
    ImageDraw.Draw(picture).multiline_text(place, "\n".join(lines), "black", ImageFont.load_default(11))


def save_grid(images, columns, path, captions=None, row_names=(), column_names=(), mode="RGB"):
    """Write the image_grid of images, enlarged if small, as a PNG, atomically.

    captions: N texts to write below the images; row_names: a list of lines for each row; column_names: texts;
    mode: of the PNG, "L" is grey.
    """
    images = enlarged(images, SMALL if captions is None else CAPTION_WIDTH)
    if captions is not None:
        images = with_captions(images, captions)
    picture = with_names(Image.fromarray(image_grid(images, columns)), row_names, column_names)
    write_atomically(path, lambda file: picture.convert(mode).save(file, format="PNG"))


def save_lines(lines, path, marker=None, **axes):
    """Write a PNG of {label: [(x, y)]}, or [(x, y, half the width of a band)]; axes: as of matplotlib's Axes.set."""
    from matplotlib.figure import Figure  # a second to import, and few pictures need it

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot = figure.subplots()
    for label, points in lines.items():
        x, y, *width = map(np.array, zip(*points, strict=True))
        (line,) = plot.plot(x, y, marker=marker, label=label)
        for half in width:
            plot.fill_between(x, y - half, y + half, alpha=0.2, color=line.get_color(), linewidth=0)
    plot.set(**axes)
    plot.grid(alpha=0.3)
    plot.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
