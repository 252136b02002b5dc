"""Published crops and resizes, byte for byte: PIL RGB image in, PIL RGB image out (None: left out)."""

from PIL import Image

from common.errors import InputError
from preprocessing.sources import BadImageError

LARGEST = 2 * Image.MAX_IMAGE_PIXELS  # pixels of a resized image: the limit that Pillow sets for reading
BOX, BICUBIC, LANCZOS = Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS


def resize(image, size, method):
    """Resize to (width, height), width first.

    In two calls, since Pillow 13 changed the order of the passes of one call; this order gives the published bytes.
    Raises BadImageError if the result would be absurdly large, as for an image of 1 × 100,000.
    """
    if size[0] * max(size[1], image.height) > LARGEST:
        raise BadImageError(f"{image.width}x{image.height} would become {size[0]}x{size[1]}")
    return image.resize((size[0], image.height), method).resize(size, method)


def center_crop_dhariwal(image, width, height):
    """ADM's crop to a square: halve with BOX while twice too large, BICUBIC to the short side, centre crop."""
    side = min(width, height)
    while min(image.size) >= 2 * side:
        image = resize(image, (image.width // 2, image.height // 2), BOX)
    scale = side / min(image.size)
    image = resize(image, (round(image.width * scale), round(image.height * scale)), BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def center_crop(image, width, height):
    """Square centre crop of the short side, LANCZOS to width × height."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.crop((left, top, left + side, top + side)), (width, height), LANCZOS)


def center_crop_wide(image, width, height):
    """Full width, rows cropped to round(width·h/w), LANCZOS, on a black width × width canvas; None if too small."""
    rows = round(width * image.height / image.width)
    if image.width < width or rows < height:
        return None
    top = (image.height - rows) // 2
    image = resize(image.crop((0, top, image.width, top + rows)), (width, height), LANCZOS)
    canvas = Image.new("RGB", (width, width))
    canvas.paste(image, (0, (width - height) // 2))
    return canvas


def plain_resize(image, width, height):
    """LANCZOS to width × height without a crop."""
    return resize(image, (width, height), LANCZOS)


DEFAULT = "center-crop-dhariwal"
TRANSFORMS = {
    "resize": plain_resize,
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
}


def make_transform(name, resolution):
    """Function image → image for a transform's name and (width, height); both None: sizes are kept."""
    if resolution is None:
        if name is not None:
            raise InputError(f"--transform {name} needs --resolution, for example --resolution 256x256")
        return lambda image: image
    width, height = resolution
    if name == "center-crop-dhariwal" and width != height:
        raise InputError(f"--resolution {width}x{height}: center-crop-dhariwal needs equal sides")
    return lambda image: TRANSFORMS[name](image, width, height)
