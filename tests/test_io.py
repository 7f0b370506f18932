"""Reading photos: every usual mode, orientation and source, and one clear sentence for everything else."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pro2sam_fast.errors import ImageReadError, Pro2SamError
from pro2sam_fast.io import IMAGE_EXTENSIONS, MAX_PIXELS, Source, iter_sources, read_image, read_sources

torch = pytest.importorskip("torch")


def photo(height=7, width=11, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def fails(source, *words, **options):
    with pytest.raises(ImageReadError) as caught:
        read_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return caught.value


# modes


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "ppm", "gif", "webp"])
def test_lossless_formats_give_the_exact_pixels(tmp_path, extension):
    rgb = photo() if extension != "gif" else np.repeat(photo()[:, :, :1] // 64 * 64, 3, axis=2)
    path = tmp_path / f"p.{extension}"
    Image.fromarray(rgb).save(path, **({"lossless": True} if extension == "webp" else {}))
    got = read_image(path)
    assert got.dtype == np.uint8 and got.flags.c_contiguous and got.flags.writeable
    np.testing.assert_array_equal(got, rgb)
    np.testing.assert_array_equal(read_image(str(path)), rgb)
    np.testing.assert_array_equal(read_image(path.read_bytes()), rgb)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(read_image(file), rgb)


def test_grey_and_one_bit(tmp_path):
    grey = photo()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "g.png")
    np.testing.assert_array_equal(read_image(tmp_path / "g.png"), np.stack([grey] * 3, axis=2))
    Image.fromarray(grey).convert("1", dither=Image.Dither.NONE).save(tmp_path / "b.png")
    expected = np.where(grey >= 128, 255, 0).astype(np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png")[:, :, 1], expected)


def test_alpha_is_composited_over_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 51]]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    expected = [[10, 20, 30], [255, 255, 255], [206, 208, 210]]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], expected)
    np.testing.assert_array_equal(read_image(rgba)[0], expected)
    Image.fromarray(rgba[:, :, [0, 3]], "LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png")[0, :, 0], [10, 255, 206])


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png")[0], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    image.save(tmp_path / "t.png", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "t.png")[0], [[255, 0, 0], [255, 255, 255], [0, 0, 255]])
    image.save(tmp_path / "t.gif", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "t.gif")[0], [[255, 0, 0], [255, 255, 255], [0, 0, 255]])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "LAB", "RGBa", "La", "PA"])
def test_other_colour_modes(tmp_path, mode):
    image = Image.new("RGB", (5, 4), (255, 255, 255))
    if mode == "LAB":
        image = Image.new("LAB", (5, 4), (255, 128, 128))
    elif mode == "RGBa":
        image = image.convert("RGBA").convert("RGBa")
    elif mode in ("La", "PA"):
        image = image.convert("L").convert("LA").convert(mode)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    got = read_image(image)
    assert got.shape == (4, 5, 3) and got.min() >= 250
    if mode == "CMYK":
        image.save(tmp_path / "c.jpg")
        image.save(tmp_path / "c.tif")
        assert read_image(tmp_path / "c.jpg").min() >= 250 and read_image(tmp_path / "c.tif").min() >= 250


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, extension):
    values = np.array([[0, 128, 129, 257, 32768, 65535 - 128, 65535]], np.uint16)
    path = tmp_path / f"s.{extension}"
    Image.fromarray(values).save(path)
    expected = np.rint(values / 257.0).astype(np.uint8)
    assert expected[0, -1] == 255
    np.testing.assert_array_equal(read_image(path)[:, :, 0], expected)


def test_big_endian_sixteen_bit():
    values = np.array([[0, 257, 65535]], np.uint16)
    image = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_image(image)[0, :, 0], [0, 1, 255])


@given(hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
@settings(max_examples=30, deadline=None)
def test_sixteen_bit_scaling_is_round_of_v_over_257(values):
    np.testing.assert_array_equal(read_image(Image.fromarray(values))[:, :, 2], np.rint(values / 257.0))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.float32), [0, 100, 255]),
        (np.array([[0, 65535]], np.float32), [0, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[-100000, 100000]], np.int32), [0, 255]),
        (np.array([[-7, -7]], np.int32), [0, 0]),
    ],
)
def test_thirty_two_bit_files(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "f.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "f.tif")[0, :, 0], expected)


def test_float_file_with_nan(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "n.tif")
    fails(tmp_path / "n.tif", "n.tif", "NaN")


# orientation


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, extension, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255  # a white corner tells the eight cases apart together with the aspect
    upright[:16, 16:32] = 128
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"o.{extension}"
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(extension, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    got = read_image(path)
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).max() <= 3
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_image(image), got)


def test_damaged_exif_does_not_matter(tmp_path):
    Image.fromarray(photo(16, 16)).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + b"\xff" * 30)
    assert read_image(tmp_path / "x.jpg").shape == (16, 16, 3)


# animations and odd sizes


@pytest.mark.parametrize("extension", ["gif", "png", "webp", "tif"])
def test_animated_files_give_their_first_frame(tmp_path, extension):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / f"a.{extension}"
    options = {"lossless": True} if extension == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read_image(path), np.asarray(frames[0]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (2, 5)])
def test_tiny_and_thin(tmp_path, shape):
    rgb = photo(*shape)
    Image.fromarray(rgb).save(tmp_path / "t.png")
    np.testing.assert_array_equal(read_image(tmp_path / "t.png"), rgb)


# bad files


def test_missing_folder_empty_and_special(tmp_path):
    error = fails(tmp_path / "none.jpg", "none.jpg", "no such file")
    assert error.path == str(tmp_path / "none.jpg")
    assert isinstance(error, Pro2SamError) and isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.path == error.path
    fails(tmp_path, "folder")
    (tmp_path / "empty.jpg").touch()
    fails(tmp_path / "empty.jpg", "empty.jpg", "empty")
    fails("", "empty path")
    fails("a\0b.jpg", "cannot read")
    os.mkfifo(tmp_path / "pipe.jpg")
    fails(tmp_path / "pipe.jpg", "pipe")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    fails(tmp_path / "dangling.jpg", "no such file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "p.png")
    (tmp_path / "p.png").chmod(0)
    fails(tmp_path / "p.png", "permission")


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "gif", "webp", "bmp", "ppm"])
@pytest.mark.parametrize("part", [0.3, 0.7])
def test_truncated_files(tmp_path, extension, part):
    Image.fromarray(photo(64, 64)).save(tmp_path / f"full.{extension}")
    content = (tmp_path / f"full.{extension}").read_bytes()
    path = tmp_path / f"cut.{extension}"
    path.write_bytes(content[: int(len(content) * part)])
    fails(path, path)


@pytest.mark.parametrize(
    "content",
    [b"hello, no picture\n", b"%PDF-1.4\n%...", b"\0" * 4096, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"P", b"GIF89a"],
)
def test_non_images(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    fails(tmp_path / "x.jpg", "x.jpg")


def test_programs_are_never_run_for_a_file(tmp_path):
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    fails(tmp_path / "x.eps", "supported format")


HEADS = [b"", b"\xff\xd8\xff\xe0", b"BM", b"II*\0", b"RIFF", b"P6 2 2 255\n", b"qoif"]


@given(st.binary(max_size=64), st.sampled_from(HEADS))
@settings(max_examples=60, deadline=None)
def test_random_bytes_give_an_image_or_the_typed_error(content, head):
    with contextlib.suppress(ImageReadError):
        assert read_image(head + content).dtype == np.uint8


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_flipped_bytes_give_an_image_or_the_typed_error(data):
    stream = io.BytesIO()
    Image.fromarray(photo(9, 9)).save(stream, format=data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP"])))
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageReadError):
        assert read_image(bytes(content), max_pixels=10**6).dtype == np.uint8


def bomb(path, width, height):
    """A PNG header that promises width x height grey pixels."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    data = zlib.compress(b"\0" * 1000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("error")
def test_decompression_bomb_names_the_limit_and_the_option(tmp_path):
    bomb(tmp_path / "bomb.png", 60000, 60000)
    fails(tmp_path / "bomb.png", "bomb.png", MAX_PIXELS, "max_pixels", "60000")
    bomb(tmp_path / "big.png", 10000, 9000)  # between Pillow's warning and its error
    fails(tmp_path / "big.png", MAX_PIXELS, "max_pixels")
    Image.fromarray(photo(10, 10)).save(tmp_path / "ok.png")
    fails(tmp_path / "ok.png", "max_pixels=99", max_pixels=99)
    assert read_image(tmp_path / "ok.png", max_pixels=100).shape == (10, 10, 3)
    with Image.open(tmp_path / "ok.png") as image:
        fails(image, "max_pixels=99", max_pixels=99)


def test_limit_can_be_raised_above_pillows_and_pillows_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.fromarray(photo(10, 10)).save(tmp_path / "ok.png")
    assert read_image(tmp_path / "ok.png").shape == (10, 10, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_reading_in_threads(tmp_path):
    for index in range(4):
        Image.fromarray(photo(20, 20, index)).save(tmp_path / f"{index}.png")
    results = {}

    def read(index):
        for _ in range(10):
            results[index] = read_image(tmp_path / f"{index}.png")

    threads = [threading.Thread(target=read, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        np.testing.assert_array_equal(results[index], photo(20, 20, index))


def test_files_are_not_modified(tmp_path):
    path = tmp_path / "p.jpg"
    Image.fromarray(photo(16, 16)).save(path)
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(0o444)
    read_image(path)
    assert path.read_bytes() == before and path.stat().st_mtime_ns == stamp


# arrays, tensors, Pillow images


def test_arrays():
    rgb = photo()
    got = read_image(rgb)
    np.testing.assert_array_equal(got, rgb)
    assert not np.shares_memory(got, rgb)
    np.testing.assert_array_equal(read_image(rgb[::-1, ::-1]), rgb[::-1, ::-1])
    np.testing.assert_array_equal(read_image(rgb[:, :, 0])[:, :, 2], rgb[:, :, 0])
    np.testing.assert_array_equal(read_image(rgb[:, :, :1])[:, :, 2], rgb[:, :, 0])
    np.testing.assert_array_equal(read_image(rgb[:, :, 0] > 9)[:, :, 0], (rgb[:, :, 0] > 9) * 255)


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((4, 5, 3), np.float32), "float32"),
        (np.full((4, 5, 3), np.nan), "NaN"),
        (np.zeros((4, 5, 3), np.int64), "int64"),
        (np.zeros((4, 5, 3), object), "object"),
        (np.zeros((3, 4, 5), np.uint8), "(3, 4, 5)"),
        (np.zeros((4, 5, 2), np.uint8), "(4, 5, 2)"),
        (np.zeros((2, 4, 5, 3), np.uint8), "list(batch)"),
        (np.zeros(4, np.uint8), "(4,)"),
        (np.zeros((), np.uint8), "()"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), "(4, 5, 3)"),
        (torch.zeros(2, 3, 4, 5), "list(batch)"),
        (torch.full((3, 4, 5), 2.0), "0..1"),
        (torch.full((3, 4, 5), -0.1), "0..1"),
        (torch.full((3, 4, 5), float("nan")), "NaN"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "int64"),
        (torch.zeros(3, 0, 5), "no pixels"),
        (7, "int"),
        (None, "NoneType"),
        ({"a": 1}, "dict"),
    ],
)
def test_bad_arrays_and_tensors(array, word):
    fails(array, word)


def test_tensors_of_a_gpu_are_fetched_by_the_caller():
    fetched = []

    class OnGpu(torch.Tensor):
        is_cuda = True

        def cpu(self):
            fetched.append(threading.current_thread())
            return self.as_subclass(torch.Tensor)

    tensors = [torch.full((3, 2, 2), n, dtype=torch.uint8).as_subclass(OnGpu) for n in range(5)]
    found = [photo for _, photo, _ in read_sources(iter_sources(tensors), ahead=2)]
    assert [int(photo[0, 0, 0]) for photo in found] == [0, 1, 2, 3, 4]
    assert fetched == [threading.main_thread()] * 5


def test_tensors():
    rgb = photo()
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    np.testing.assert_array_equal(read_image(tensor), rgb)
    np.testing.assert_array_equal(read_image(tensor.float() / 255), rgb)
    np.testing.assert_array_equal(read_image((tensor.double() / 255).requires_grad_()), rgb)
    np.testing.assert_array_equal(read_image(tensor[:1])[:, :, 2], rgb[:, :, 0])
    assert not np.shares_memory(read_image(tensor), rgb)


def test_pillow_image_is_left_alone(tmp_path):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as image:
        image.seek(1)
        np.testing.assert_array_equal(read_image(image), np.asarray(frames[1]))
        assert image.tell() == 1
    with pytest.raises(ImageReadError):
        read_image(Image.new("RGB", (0, 3)))


# sources


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "sub/deep/d.tiff", ".hidden/e.jpg", "notes.txt", ".f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "fake.jpg").mkdir()
    return tmp_path


def names(source):
    return [found.name for found in iter_sources(source)]


def test_folder_is_recursive_sorted_and_filtered(tree):
    assert names(tree) == ["a.PNG", "b.jpg", "sub/c.jpeg", "sub/deep/d.tiff"]
    found = list(iter_sources(str(tree)))
    assert [one.path for one in found] == [str(tree / one.name) for one in found]
    (tree / "loop").symlink_to(tree)
    assert names(tree) == ["a.PNG", "b.jpg", "sub/c.jpeg", "sub/deep/d.tiff"]


def test_glob(tree):
    assert names(str(tree / "*")) == ["a.PNG", "b.jpg"]
    assert names(str(tree / "**" / "*.j*")) == ["b.jpg", "sub/c.jpeg"]
    assert names(tree / "[b].jpg") == ["b.jpg"]
    (tree / "[b].jpg").touch()
    assert [one.path for one in iter_sources(tree / "[b].jpg")] == [str(tree / "[b].jpg")]


def test_empty_searches_explain_themselves(tree):
    (tree / "void").mkdir()
    for name, word in (("void", "no image"), ("*.gif", "no file matches"), ("*.txt", "none ends in")):
        source = tree / name
        (found,) = iter_sources(str(source))
        with pytest.raises(ImageReadError, match=word):
            found.read()
        assert found.path == str(source)
    assert all(extension in str(found.error) for extension in IMAGE_EXTENSIONS)


def test_mixed_list_and_generator(tree):
    pillow, tensor = Image.fromarray(photo()), torch.zeros(3, 2, 2)
    mixed = [tree / "sub", photo(), str(tree / "b.jpg"), pillow, tensor, tree / "no.jpg", 3]
    memory = [f"image-00000{position}" for position in (3, 5, 6, 8)]
    expected = ["c.jpeg", "deep/d.tiff", memory[0], "b.jpg", memory[1], memory[2], "no.jpg", memory[3]]
    assert names(mixed) == expected
    assert names(item for item in mixed) == expected
    assert [found.path is None for found in iter_sources(mixed)] == [False, False, True, False, True, True, False, True]
    assert list(iter_sources([])) == []


def test_expansion_is_lazy():
    def endless():
        while True:
            yield photo(2, 2)

    stream = iter_sources(endless())
    assert [next(stream).name for _ in range(3)] == ["image-000001", "image-000002", "image-000003"]


def test_pillow_image_keeps_its_file_name(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        (found,) = iter_sources(image)
    assert found.path == str(tmp_path / "p.png") and found.name == "p.png"


# things that are no longer, or not quite, an image


def closed(thing):
    thing.close()
    return thing


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: closed(Image.open(path)), "the Pillow image is closed; open it again"),
        (lambda path: closed(io.FileIO(path)), "the file object is closed; open it again"),
        (lambda path: io.TextIOWrapper(io.FileIO(path)), "open it in binary mode"),
        (lambda path: io.StringIO("x"), "open it in binary mode"),
        (lambda path: torch.ones(3, 4, 4).to_sparse(), "layout torch.sparse_coo"),
        (lambda path: torch.empty(3, 4, 4, device="meta"), "on the meta device"),
        (lambda path: 7, "an object of type int"),
        (lambda path: "https://example.org/cat.jpg", "save the photo to a file first"),
    ],
)
def test_unusable_objects(tmp_path, make, words):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    with pytest.raises(ImageReadError) as caught:
        read_image(make(tmp_path / "a.png"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_bad_one_of_several_images_is_named():
    good = np.zeros((3, 4, 3), np.uint8)
    sources = list(iter_sources([good, good.astype(float), None]))
    assert sources[0].read().shape == (3, 4, 3)
    for source in sources[1:]:
        with pytest.raises(ImageReadError, match=f"^{source.name}: cannot"):
            source.read()


class _Counted:
    """Sources of small photos that count how many were taken; the third can't be read."""

    def __init__(self, count):
        self.count, self.taken = count, 0

    def __iter__(self):
        for i in range(self.count):
            self.taken += 1
            item = "missing.png" if i == 2 else np.full((1, 1, 3), i, np.uint8)
            yield from iter_sources([item])


@pytest.mark.parametrize("ahead", [0, 1, 3, 20])
def test_reading_ahead_keeps_the_order_and_the_bound(ahead):
    sources = _Counted(8)
    for i, (source, image, milliseconds) in enumerate(read_sources(sources, ahead=ahead)):
        assert milliseconds >= 0
        if i == 2:
            assert isinstance(image, ImageReadError) and source.path == "missing.png"
        else:
            assert image[0, 0, 0] == i
        assert sources.taken == min(8, i + 1 + ahead)


def test_several_photos_are_read_at_a_time(monkeypatch):
    together = threading.Barrier(2, timeout=30)
    monkeypatch.setattr(Source, "read", lambda source, limit: together.wait())
    assert len(list(read_sources(_Counted(2), ahead=2))) == 2  # both readers met


def test_reading_stops_with_the_caller():
    sources = _Counted(8)
    reading = read_sources(sources, ahead=2)
    next(reading)
    reading.close()
    assert sources.taken == 3
