"""Reading photos: any usual file, Pillow image, array or tensor becomes one upright RGB uint8 array.

Policies, the same for every source:

* Orientation: the EXIF (or TIFF, XMP) orientation is applied, so all coordinates are those of the upright photo.
* Transparency: composited over white. Fully opaque images keep their colours exactly.
* 16-bit grey: divided by 257 and rounded, so 65535 becomes 255. 32-bit integer and float files: values within 0..1
  (float only), 0..255 (float only) or 0..65535 are taken as that range; any other is stretched linearly from minimum to
  maximum.
* CMYK, YCbCr, HSV: Pillow's conversion; Lab through its ICC profile. Embedded ICC profiles are otherwise ignored.
* Animations: the first frame of a file; the current frame of a Pillow image.

Files are opened for reading only. Decoders that run other programs (EPS, WMF) are never used.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms

from .background import in_background
from .errors import ImageReadError

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "Source",
    "atomic_file",
    "iter_sources",
    "read_image",
    "read_sources",
    "write_atomic",
]

MAX_PIXELS = 89_478_485
"""Default limit on width x height of a file, Pillow's own (1 GiB at 4 bytes x 3 bands). `None` lifts it."""

IMAGE_EXTENSIONS = frozenset({
    ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".qoi", ".tif", ".tiff", ".webp",
})
"""What counts as a photo when a folder or a glob is searched (case ignored). A file named explicitly may have any name.
"""

_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TIFF", "WEBP")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_pillow_limit_lock = threading.Lock()


def read_image(source, max_pixels: int | None = MAX_PIXELS) -> np.ndarray:
    """Read one photo.

    source: path; binary file object; `bytes` of an encoded file; Pillow image; uint8 array (H, W, 3) RGB, (H, W, 4)
        RGBA, (H, W) or (H, W, 1) grey, or bool (H, W); torch tensor (3, H, W) or (1, H, W), uint8 0..255 or floating
        0..1.
    max_pixels: files with more pixels are refused before they are decoded; None for no limit.

    Returns a C-contiguous uint8 array (H, W, 3), RGB, upright, which shares no memory with the source.
    Raises ImageReadError, whose message names the source and what to do.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_path(os.fspath(source), max_pixels)
    if isinstance(source, Image.Image):
        name = _describe(source)
        with _decoding(name):
            _check_pixels(source.size, max_pixels, name)
            try:
                source.load()
            except ValueError as error:
                if "closed" not in str(error):
                    raise
                message = f"cannot read '{name}': the Pillow image is closed; open it again"
                raise ImageReadError(message, name) from error
            return _to_rgb(source, _orientation(source), name)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if _is_tensor(source):
        return _from_tensor(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_stream(io.BytesIO(source), "<bytes>", max_pixels)
    if hasattr(source, "read"):
        return _read_stream(source, str(getattr(source, "name", "<stream>")), max_pixels)
    raise ImageReadError(
        f"cannot read an image from an object of type {type(source).__name__}: "
        "expected a path, a Pillow image, an RGB uint8 array or a tensor",
        _describe(source),
    )


@dataclass(frozen=True)
class Source:
    """One input photo before it is read.

    item: what was given. path: its file, None for in-memory images. name: a relative name for outputs (`cats/tom.jpg`
    for a photo below a folder source, the file name for a path, `image-000007` for the seventh photo if it is in
    memory). error: why it can't be read, if the search itself failed (an empty folder, a glob without match).
    """

    item: object
    path: str | None
    name: str
    error: ImageReadError | None = field(default=None, compare=False)

    def read(self, max_pixels: int | None = MAX_PIXELS) -> np.ndarray:
        """Like `read_image`, naming which one of several in-memory images is bad; raises the search error if there is
        one."""
        if self.error is not None:
            raise self.error
        try:
            return read_image(self.item, max_pixels)
        except ImageReadError as error:
            if self.path is not None:
                raise
            raise ImageReadError(f"{self.name}: {error}", error.path) from error


def iter_sources(source) -> Iterator[Source]:
    """Expand `source` lazily, in order, into one `Source` per photo.

    A path gives itself. A folder is searched recursively for `IMAGE_EXTENSIONS`, sorted by path, hidden entries and
    linked folders left out. A string with `*`, `?` or `[` that isn't an existing file is a glob (`**` spans folders),
    sorted, filtered the same way. A list, tuple or generator may mix paths, folders, globs, Pillow images, arrays,
    tensors and `Source` objects, which pass as they are. Nothing is decoded here, and problems come as `Source.error`,
    so that a caller may skip them.
    """
    position = 0
    for item in _top_level(source):
        if isinstance(item, (str, os.PathLike)):
            expanded = _expand_path(os.fspath(item))
        else:
            expanded = (item if isinstance(item, Source) else _memory_source(item, position + 1),)
        for found in expanded:
            position += 1
            yield found


def read_sources(
    sources: Iterable[Source],
    max_pixels: int | None = MAX_PIXELS,
    ahead: int = 0,
    then: Callable[[np.ndarray], object] = lambda image: image,
) -> Iterator[tuple[Source, object, float]]:
    """Reads photos in order: each source with its photo, or the ImageReadError that says why it can't be read, and the
    milliseconds that took.

    ahead: photos read in the background while the caller works on those before; 0 reads a photo when it is asked for.
    then: what is done with a photo next, in the background too; its result takes the photo's place.
    """

    def read(source: Source) -> tuple[Source, object, float]:
        start = time.perf_counter()
        try:
            image = source.read(max_pixels)
        except ImageReadError as error:
            return source, error, 1e3 * (time.perf_counter() - start)
        milliseconds = 1e3 * (time.perf_counter() - start)
        return source, then(image), milliseconds

    yield from in_background(read, sources, ahead)


def _top_level(source) -> Iterable:
    leaf = (str, os.PathLike, Image.Image, np.ndarray, bytes, bytearray, memoryview, dict, Source)
    if isinstance(source, leaf) or _is_tensor(source) or hasattr(source, "read") or not isinstance(source, Iterable):
        return (source,)
    return source


def _memory_source(item, position: int) -> Source:
    if _is_tensor(item) and item.is_cuda:
        item = item.detach().cpu()  # behind what makes it: a thread that reads would wait for its own stream's work
    path = getattr(item, "filename", None) if isinstance(item, Image.Image) else None
    path = os.fspath(path) if path and isinstance(path, (str, os.PathLike)) else None
    return Source(item, path, os.path.basename(path) if path else f"image-{position:06d}")


def _expand_path(path: str | bytes) -> Iterator[Source]:
    path = os.fsdecode(path)
    if path.startswith("~") and not os.path.lexists(path):
        path = os.path.expanduser(path)
    try:
        is_dir, exists = os.path.isdir(path), os.path.lexists(path)
    except ValueError:  # an embedded NUL
        is_dir = exists = False
    if is_dir:
        yield from _expand_folder(path)
    elif not exists and glob.has_magic(path):
        yield from _expand_glob(path)
    else:
        yield Source(path, path, os.path.basename(path) or "unnamed")


def _expand_folder(root: str) -> Iterator[Source]:
    empty = True
    try:
        for path in _walk(root):
            empty = False
            yield Source(path, path, os.path.relpath(path, root))
    except OSError as error:
        empty = False
        yield _failed(root, f"cannot list folder '{root}': {error.strerror}; check its permissions")
    if empty:
        yield _failed(root, f"folder '{root}' holds no image; searched it and its subfolders for {_extension_list()}")


def _walk(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        entries = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif _has_image_extension(entry.name) and not entry.is_dir():
            yield entry.path


def _expand_glob(pattern: str) -> Iterator[Source]:
    matches = [path for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    photos = [path for path in matches if _has_image_extension(path)]
    if not matches:
        yield _failed(pattern, f"no file matches '{pattern}'; check the path and the pattern")
    elif not photos:
        yield _failed(pattern, f"'{pattern}' matches {len(matches)} files but none ends in {_extension_list()}")
    fixed = glob_root(pattern)
    for path in photos:
        yield Source(path, path, os.path.relpath(path, fixed))


def glob_root(pattern: str) -> str:
    """The folder in front of the first wildcard of a glob pattern (`.` if there is none)."""
    head = pattern
    while glob.has_magic(head):
        head = os.path.dirname(head)
    return head or "."


def _failed(path: str, message: str) -> Source:
    return Source(path, path, os.path.basename(path.rstrip("/\\")) or "unnamed", ImageReadError(message, path))


def _has_image_extension(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _extension_list() -> str:
    return " ".join(sorted(IMAGE_EXTENSIONS))


def _is_tensor(item) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(item, torch.Tensor)


def _describe(item) -> str:
    if isinstance(item, Image.Image):
        return str(getattr(item, "filename", "") or "<Pillow image>")
    return f"<{type(item).__name__}>"


# files


def _read_path(path: str | bytes, max_pixels: int | None) -> np.ndarray:
    path = os.fsdecode(path)
    if not path:
        raise ImageReadError("cannot read an image from an empty path", path)
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise ImageReadError(f"cannot read '{path}': it is a folder, not an image file", path)
        if not stat.S_ISREG(info.st_mode):
            raise ImageReadError(f"cannot read '{path}': it is a device or pipe, not an image file", path)
        if info.st_size == 0:
            raise ImageReadError(f"cannot read '{path}': the file is empty (0 bytes); copy it again", path)
        file = open(path, "rb")  # noqa: SIM115 - closed below, so that only opening is inside this try
    except FileNotFoundError:
        hint = "save the photo to a file first, addresses aren't downloaded" if "://" in path else "check the path"
        raise ImageReadError(f"cannot read '{path}': no such file; {hint}", path) from None
    except PermissionError:
        raise ImageReadError(f"cannot read '{path}': permission denied; check its access rights", path) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, ImageReadError):
            raise
        raise ImageReadError(f"cannot read '{path!s}': {reason}", path) from None
    with file:
        return _read_stream(file, path, max_pixels)


def _read_stream(file, name: str, max_pixels: int | None) -> np.ndarray:
    if getattr(file, "closed", False):
        raise ImageReadError(f"cannot read '{name}': the file object is closed; open it again", name)
    if isinstance(file, io.TextIOBase):
        raise ImageReadError(f"cannot read '{name}': the file object gives text; open it in binary mode, 'rb'", name)
    with _decoding(name), _open(file) as image:
        _check_pixels(image.size, max_pixels, name)
        image.load()
        return _to_rgb(image, _orientation(image), name)


def _open(file) -> Image.Image:
    """Parse the header; Pillow's own pixel limit, a process-wide variable, is off meanwhile: `max_pixels` decides."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with _pillow_limit_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an ImageReadError that names the file."""
    try:
        yield
    except ImageReadError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # an image inside an icon file
        raise ImageReadError(
            f"cannot read '{name}': an image inside it has more pixels than Pillow's limit; convert it to JPEG or PNG",
            name,
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ImageReadError(
            f"cannot read '{name}': not an image in a supported format; convert it to JPEG or PNG", name
        ) from error
    except MemoryError as error:
        raise ImageReadError(f"cannot read '{name}': not enough memory to decode it", name) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise ImageReadError(
            f"cannot read '{name}': the image is damaged or truncated ({reason}); copy or export it again", name
        ) from error


def _check_pixels(size: tuple[int, int], max_pixels: int | None, name: str) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise ImageReadError(
            f"cannot read '{name}': {width} x {height} pixels are more than the limit max_pixels={max_pixels}; "
            "if you trust the file raise max_pixels",
            name,
        )
    if width < 1 or height < 1:
        raise ImageReadError(f"cannot read '{name}': the image has no pixels ({width} x {height})", name)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8, after loading (the TIFF decoder turns the image itself); 1 if absent or damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return int(value) if int(value) in _UPRIGHT else 1
    except Exception:  # damaged metadata doesn't make the pixels unreadable
        return 1


def _to_rgb(image: Image.Image, orientation: int, name: str) -> np.ndarray:
    """Loaded Pillow image of any mode -> uint8 (H, W, 3)."""
    mode = image.mode
    if mode.startswith("I;16"):
        rgb = _grey(_high_depth_to_8bit(_uint16(image), name))
    elif mode in ("I", "F"):
        rgb = _grey(_high_depth_to_8bit(np.asarray(image), name))
    elif image.has_transparency_data:
        image = image.convert("LA") if mode == "La" else image
        rgb = _over_white(np.asarray(image.convert("RGBA")))
    elif mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = np.array(ImageCms.profileToProfile(image, *profiles, outputMode="RGB"))
    else:
        rgb = np.array(image if mode == "RGB" else image.convert("RGB"))
    if orientation != 1:
        rgb = np.array(Image.fromarray(rgb).transpose(_UPRIGHT[orientation]))
    return np.ascontiguousarray(rgb)


def _uint16(image: Image.Image) -> np.ndarray:
    """(H, W) uint16, native byte order. Pillow stores `I;16B` big-endian and the others little-endian."""
    order = ">" if image.mode == "I;16B" else "<"
    if image.mode == "I;16N":
        order = "="
    raw = np.frombuffer(image.tobytes(), dtype=np.dtype(np.uint16).newbyteorder(order))
    return raw.reshape(image.height, image.width).astype(np.uint16)


def _high_depth_to_8bit(values: np.ndarray, name: str) -> np.ndarray:
    """(H, W) uint16, int32 or float32 -> uint8 (H, W), by the range policy in the module's docstring."""
    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.isfinite(values).all():
        raise ImageReadError(f"cannot read '{name}': it has NaN or infinite pixel values; export it as 8-bit", name)
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.floating) and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif np.issubdtype(values.dtype, np.floating) and low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scale = 255.0 / (high - low) if high > low else 0.0
    return np.rint((values.astype(np.float64) - low) * scale).astype(np.uint8)


# pixels in memory


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 4) -> uint8 (H, W, 3): round((a*c + (255-a)*255) / 255)."""
    alpha = rgba[:, :, 3:].astype(np.uint16)
    mixed = rgba[:, :, :3] * alpha + (255 - alpha) * np.uint16(255)
    return ((mixed.astype(np.uint32) + 127) // 255).astype(np.uint8)


def _from_array(array: np.ndarray) -> np.ndarray:
    expected = "expected uint8 (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey"
    shape, name = tuple(array.shape), "<ndarray>"
    if array.ndim == 4:
        raise ImageReadError(f"cannot use an array of shape {shape}: {expected}; pass a batch as list(batch)", name)
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3, 4))):
        raise ImageReadError(f"cannot use an array of shape {shape}: {expected}", name)
    if 0 in shape:
        raise ImageReadError(f"cannot use an array of shape {shape}: it has no pixels", name)
    if array.dtype == np.bool_ and array.ndim == 2:
        return _grey(array.astype(np.uint8) * 255)
    if array.dtype != np.uint8:
        bad = np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()
        hint = "it has NaN or infinite values" if bad else "scale it to 0..255 and convert with .astype(np.uint8)"
        raise ImageReadError(f"cannot use an array of dtype {array.dtype}: {expected}; {hint}", name)
    if array.ndim == 2 or shape[2] == 1:
        return _grey(array.reshape(shape[:2]))
    return _over_white(array) if shape[2] == 4 else np.array(array, order="C")


def _from_tensor(tensor) -> np.ndarray:
    expected = "expected (3, H, W) or (1, H, W), uint8 in 0..255 or floating in 0..1"
    shape, name = tuple(tensor.shape), "<Tensor>"
    if tensor.ndim == 4:
        raise ImageReadError(f"cannot use a tensor of shape {shape}: {expected}; pass a batch as list(batch)", name)
    if tensor.ndim != 3 or shape[0] not in (1, 3):
        raise ImageReadError(f"cannot use a tensor of shape {shape}: {expected}", name)
    if 0 in shape:
        raise ImageReadError(f"cannot use a tensor of shape {shape}: it has no pixels", name)
    if str(tensor.layout) != "torch.strided" or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise ImageReadError(f"cannot use a tensor {kind}: {expected}, dense and with values", name)
    tensor = tensor.detach()
    if tensor.dtype.is_floating_point:
        values = tensor.float().cpu().numpy()
        if not np.isfinite(values).all():
            raise ImageReadError(f"cannot use a tensor with NaN or infinite values: {expected}", name)
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 1:
            raise ImageReadError(f"cannot use a floating tensor with values in {low:g}..{high:g}: {expected}", name)
        values = np.rint(values * 255).astype(np.uint8)
    elif str(tensor.dtype) == "torch.uint8":
        values = tensor.cpu().numpy()
    else:
        raise ImageReadError(f"cannot use a tensor of dtype {tensor.dtype}: {expected}", name)
    if shape[0] == 1:
        values = np.repeat(values, 3, axis=0)
    return np.array(values.transpose(1, 2, 0), order="C")


# writing


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write that takes its place at `path`, whole and synced, when the block ends; not at all if it
    raises.

    A link at `path` is replaced, never written through. Raises OSError like `open`.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    # short and always the same: fits where `name` fits, and a killed run leaves at most one
    temporary = os.path.join(folder, f".{zlib.crc32(os.fsencode(name)):08x}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_atomic(path: str | os.PathLike, content: bytes) -> None:
    """`atomic_file` for content at hand."""
    with atomic_file(path) as file:
        file.write(content)
