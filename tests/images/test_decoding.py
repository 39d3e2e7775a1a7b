"""Every kind of image file becomes upright RGB of eight bits, or an error of one line that names it."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tokenformer import UserError
from tokenformer.images import BadImage, decode

ORIENTATION = 0x112


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def refused(source, name="image 7"):
    with pytest.raises(BadImage) as caught:
        decode(source, name=name)
    message = str(caught.value)
    assert message.startswith(name)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["bytes", "path", "text", "image"])
def test_rgb_stays_as_it_is(tmp_path, kind):
    pixels = noise(5, 9, 3)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(pixels)))
    source = {"bytes": path.read_bytes(), "path": path, "text": str(path), "image": Image.fromarray(pixels)}[kind]
    image = decode(source)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_greyscale_becomes_three_equal_channels(kind):
    pixels = noise(5, 9)
    image = np.asarray(decode(encoded(Image.fromarray(pixels), kind)))
    assert np.array_equal(image, np.repeat(pixels[:, :, None], 3, axis=2))


def test_one_bit_becomes_black_and_white():
    pixels = noise(5, 9) > 127
    image = np.asarray(decode(encoded(Image.fromarray(pixels))))
    assert np.array_equal(image[:, :, 1], np.where(pixels, 255, 0))


@pytest.mark.parametrize("channels", [2, 4], ids=["LA", "RGBA"])
def test_what_is_transparent_lets_white_through(channels):
    pixels = noise(5, 9, channels)
    pixels[0, :, -1] = 0
    pixels[1, :, -1] = 255
    image = np.asarray(decode(encoded(Image.fromarray(pixels)))).astype(float)
    colours, alpha = pixels[:, :, :-1].astype(float), pixels[:, :, -1:] / 255
    expected = np.broadcast_to(colours * alpha + 255 * (1 - alpha), image.shape)
    assert np.array_equal(image[0], np.full((9, 3), 255.0))
    assert np.array_equal(image[1], expected[1])
    assert np.abs(image - expected).max() <= 1  # Pillow rounds


def test_palette_with_a_transparent_colour():
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert np.asarray(decode(encoded(image))).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    shown = np.asarray(decode(encoded(image, transparency=1)))
    assert shown.tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_rgb_with_a_transparent_colour():
    """A PNG without alpha may call one colour transparent."""
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    shown = np.asarray(decode(encoded(image, transparency=(4, 5, 6))))
    assert shown.tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    """255 and 65535 are both white to a conversion that cuts off."""
    values = np.array([[0, 255, 257, 200 * 257, 65535]], dtype=np.uint16)
    image = np.asarray(decode(encoded(Image.fromarray(values), kind)))
    assert image[0, :, 0].tolist() == [0, 1, 1, 200, 255]
    assert (image == image[:, :, :1]).all()


def test_sixteen_bits_as_integers_of_32():
    """As some programs write them, and some versions of Pillow read a PNG."""
    values = np.array([[0, 257, 65535]], dtype=np.int32)
    assert np.asarray(decode(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 255]


def test_cmyk():
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    image = np.asarray(decode(encoded(Image.fromarray(inks, "CMYK"), "TIFF")))
    assert image.tolist() == [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(kind, orientation):
    """A camera stores what its sensor saw, and how it was held."""
    quadrants = np.zeros((32, 48, 3), dtype=np.uint8)  # of blocks that survive JPEG
    quadrants[:16, :16], quadrants[:16, 32:], quadrants[16:, :16] = 250, 170, 90
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    stored = turn(quadrants)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = np.asarray(decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)))
    assert image.shape == quadrants.shape
    assert np.abs(image.astype(int) - quadrants).max() < 40


def test_the_first_frame_counts():
    frames = [Image.fromarray(noise(6, 6, 3, seed=seed)) for seed in range(2)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(decode(data)), np.asarray(frames[0]))


def test_the_image_given_is_not_changed():
    image = Image.fromarray(noise(4, 4, 4))
    image.getexif()[ORIENTATION] = 6
    before = image.tobytes()
    decode(image)
    assert image.tobytes() == before
    assert image.getexif()[ORIENTATION] == 6


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(kind, share):
    data = encoded(Image.fromarray(noise(64, 64, 3)), kind)
    assert "cannot be read" in (message := refused(data[: int(share * len(data))])) or "is not an image" in message


@pytest.mark.parametrize("data", [b"", b"plain text", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "only a head"])
def test_no_image(data):
    assert "is not an image that Pillow can read" in refused(data)


def test_corrupt_pixels():
    data = bytearray(encoded(Image.fromarray(noise(64, 64, 3))))
    data[len(data) // 2] ^= 255
    assert "cannot be read" in refused(bytes(data))


def test_missing_file(tmp_path):
    path = tmp_path / "gone.png"
    with pytest.raises(BadImage, match=r"gone\.png' does not exist"):
        decode(path)
    assert issubclass(BadImage, UserError)


def test_floats_have_no_known_range():
    image = Image.fromarray(np.ones((3, 3), dtype=np.float32))
    assert "floating-point" in refused(encoded(image, "TIFF"))


def test_decompression_bomb():
    """A head that promises more pixels than Pillow makes room for."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert "MAX_IMAGE_PIXELS" in refused(data + struct.pack(">I", 0) + b"IDAT" + bytes(4))


def test_worker_processes_leave_one_line():
    """A DataLoader raises again what a worker raised, with the traceback as its message."""
    text = (
        "Caught BadImage in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n  File ...\n"
        "tokenformer.images.decoding.BadImage: 'a.png' cannot be read (BadImage: odd): repair or remove it\n"
    )
    assert str(BadImage(text)) == "'a.png' cannot be read (BadImage: odd): repair or remove it"


def test_agrees_with_pillow_where_pillow_is_right():
    """What transformers' pipelines do; alpha and sixteen bits are where we differ."""
    for image in (
        Image.fromarray(noise(8, 6, 3)),
        Image.fromarray(noise(8, 6)),
        Image.fromarray(noise(8, 6, 4), "CMYK"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = decode(image)
        assert ours.tobytes() == ImageOps.exif_transpose(image).convert("RGB").tobytes()
