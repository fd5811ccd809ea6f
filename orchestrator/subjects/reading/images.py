"""One picture: opening it, its shape, its pixels."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.files import NOT_FETCHED, is_pointer

_FORMATS: Final = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
"""Those that hold pixels and nothing else: Pillow hands EPS to Ghostscript, which runs the program that it is."""
_GREY: Final = ("1", "L", "LA", "La")
_GREY_16: Final = ("I;16", "I;16B", "I;16L", "I;16N")
_BITS_PER_SAMPLE: Final = 258  # the tag of TIFF


class UnreadableImageError(UserError):
    """An image that can't be decoded or doesn't fit, with its name."""


@dataclass(frozen=True)
class ImageFormat:
    """What an image is made to be: (C, H, W) uint8 with C = 1 (grey) or 3 (red, green, blue).

    It is turned as its EXIF orientation says, pixels of more bits are scaled by the range of their type, and alpha is
    dropped.

    ``fit`` says what happens to an image of another size: ``exact`` refuses it, ``stretch`` resizes it (bilinear,
    anti-aliased), ``crop`` brings the shorter side to 8/7 of the target and cuts out the middle (ImageNet's way).
    ``greys`` says whether an image in colour may become a grey one.
    """

    shape: tuple[int, int, int]
    fit: Literal["exact", "stretch", "crop"] = "exact"
    greys: bool = True

    def decode(self, encoded: bytes, name: str) -> npt.NDArray[np.uint8]:
        """One image (C, H, W).

        Raises:
            UnreadableImageError: damaged, no image at all, or of another size where that isn't allowed.
        """
        channels, height, width = self.shape
        with _opened(encoded, name) as image:
            if not self.greys and channels == 1 and _n_channels(image) == 3:
                raise UnreadableImageError(
                    f"Image {name} is in colour, where others are grey; give channels: 3 to have all of them in "
                    "colour, or channels: 1 to have all grey."
                )
            converted = _of_8_bits(image, name).convert("L" if channels == 1 else "RGB")
            if converted.size != (width, height):
                converted = self._resized(converted, name)
            pixels = np.asarray(converted, dtype=np.uint8)
        return pixels[None] if channels == 1 else np.moveaxis(pixels, 2, 0)

    def _resized(self, image: Any, name: str) -> Any:
        from PIL import Image

        _, height, width = self.shape
        if self.fit == "exact":
            raise UnreadableImageError(
                f"Image {name} is {image.height}x{image.width} where {height}x{width} is expected; "
                f"give size: [{height}, {width}] to have all images resized."
            )
        if self.fit == "stretch":
            return image.resize((width, height), Image.Resampling.BILINEAR)
        scale = max(height / image.height, width / image.width) * 8 / 7
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


class Look(NamedTuple):
    """What an image is before it is converted."""

    shape: tuple[int, int, int]
    """(C, H, W): C is 1 for grey images, else 3."""
    is_transparent: bool
    """Whether some of its pixels are: what is dropped with the alpha then is seen."""

    @classmethod
    def at(cls, encoded: bytes, name: str) -> "Look":
        """Look at an encoded image.

        Raises:
            UnreadableImageError: it can't be decoded.
        """
        with _opened(encoded, name) as image:
            transparent = image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
            return cls((_n_channels(image), image.height, image.width), transparent)


def _n_channels(image: Any) -> int:
    return 1 if image.mode in (*_GREY, *_GREY_16) else 3


def _of_8_bits(image: Any, name: str) -> Any:
    from PIL import Image

    if image.mode in ("I", "F"):
        raise UnreadableImageError(
            f"Image {name} has pixels of 32 bits, whose range nothing says; save it with 8 or 16 bits per pixel."
        )
    if image.mode not in _GREY_16:
        return image
    bits = dict(getattr(image, "tag_v2", {})).get(_BITS_PER_SAMPLE, (16,))[0]
    return Image.fromarray((np.asarray(image) * (255 / (2**bits - 1))).round().astype(np.uint8))


@contextmanager
def _opened(encoded: bytes, name: str) -> Iterator[Any]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            image.load()
            yield ImageOps.exif_transpose(image)
    except (UnreadableImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        if is_pointer(encoded):
            raise UnreadableImageError(f"Image {name} {NOT_FETCHED}.") from error
        # Its own message names an object in memory.
        raise UnreadableImageError(
            f"Image {name} can't be read (it is in no known format); repair or remove it."
        ) from error
    # Decoders raise whatever comes to hand on damaged files: RuntimeError, NotImplementedError, struct.error, ...
    except Exception as error:
        raise UnreadableImageError(f"Image {name} can't be read ({error}); repair or remove it.") from error


class Images(Protocol):
    """Encoded images that are fetched one at a time."""

    def __len__(self) -> int:
        """Number of images N."""

    def fetch(self, index: int) -> bytes:
        """The encoded image at a position."""

    def name(self, index: int) -> str:
        """What to call it in a message."""
