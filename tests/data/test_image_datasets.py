"""Image sets: every colour mode and shape, folders and .npz files, classes, the cache, and the stream of batches."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch as th
from PIL import Image, ImageOps
from training_process import is_running

from improved_diffusion.data import decode
from improved_diffusion.data import folder as image_folder
from improved_diffusion.data.batch_stream import BatchStream, SampleOrder
from improved_diffusion.data.cache import default_cache_dir
from improved_diffusion.data.decode import UNREADABLE, UnusableImage, inspect_image, read_image
from improved_diffusion.data.folder import classify, list_files
from improved_diffusion.image_datasets import describe, load_data, read_images

posix = pytest.mark.skipif(os.name != "posix", reason="needs links and FIFOs")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Twelve random 8x8 PNG files of three classes."""
    path = tmp_path / "images"
    path.mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{'abc'[index % 3]}_{index:02d}.png")
    return path


def read(path, size=8, **arguments):
    return read_images(str(path), size, progress=False, **arguments)


def saved(tmp_path, image, name="image.png", **arguments):
    image.save(tmp_path / name, **arguments)
    return str(tmp_path / name)


# One file


def test_a_picture_of_the_right_size_is_kept_to_the_bit(tmp_path):
    pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    result, size, mode = read_image(saved(tmp_path, Image.fromarray(pixels)), 8)
    assert np.array_equal(result, pixels)
    assert (size, mode) == ((8, 8), "RGB")


def test_palette_is_converted_before_resizing(tmp_path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] + [0] * (3 * 253))
    image.paste(2, (8, 0, 16, 16))  # left red, right blue: the mean index would be green
    pixels = read_image(saved(tmp_path, image), 4)[0]
    assert (pixels[..., 1] == 0).all()
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, -1].tolist() == [0, 0, 255]


def test_transparency_is_composited_over_white(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 50, 60, 70] + [0] * (3 * 254))
    palette.paste(1, (2, 0, 4, 4))
    pixels = read_image(saved(tmp_path, palette, "p.png", transparency=0), 4)[0]
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 3].tolist() == [50, 60, 70]

    grey = Image.new("LA", (4, 4), (100, 51))  # one fifth of 100 over white
    assert np.unique(read_image(saved(tmp_path, grey, "la.png"), 4)[0]).tolist() == [224]
    colour = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.unique(read_image(saved(tmp_path, colour, "rgba.png"), 4)[0]).tolist() == [255]
    key = Image.new("RGB", (4, 4), (1, 2, 3))
    assert np.unique(read_image(saved(tmp_path, key, "key.png", transparency=(1, 2, 3)), 4)[0]).tolist() == [
        255
    ]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 200, 128 * 257, 65535]] * 4, dtype=np.uint16)
    for name in ("deep.png", "deep.tif", "deep.pgm"):
        pixels = read_image(saved(tmp_path, Image.fromarray(values), name), 4)[0]
        assert pixels[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]
    wide = Image.fromarray(values.astype(np.int32))
    assert read_image(saved(tmp_path, wide, "wide.tif"), 4)[0][0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_are_taken_from_either_range(tmp_path):
    unit = Image.fromarray(np.array([[0, 0.5, 1, 0.2]] * 4, dtype=np.float32))
    assert read_image(saved(tmp_path, unit, "unit.tif"), 4)[0][0, :, 2].tolist() == [0, 128, 255, 51]
    bytes_ = Image.fromarray(np.array([[0, 2, 254.6, 300]] * 4, dtype=np.float32))
    assert read_image(saved(tmp_path, bytes_, "bytes.tif"), 4)[0][0, :, 2].tolist() == [0, 2, 255, 255]
    bad = Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32))
    with pytest.raises(UnusableImage, match="undefined"):
        read_image(saved(tmp_path, bad, "nan.tif"), 4)


def test_one_bit_and_cmyk(tmp_path):
    bits = Image.fromarray(np.eye(4, dtype=bool))
    assert np.array_equal(
        read_image(saved(tmp_path, bits, "1.png"), 4)[0][..., 0], 255 * np.eye(4, dtype=np.uint8)
    )
    pixels, _, mode = read_image(saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.jpg"), 8)
    assert mode == "CMYK"
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 12


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), "black")
    image.paste((255, 255, 255), (0, 0, 8, 8))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees: left comes to the top
    path = saved(tmp_path, image, "turned.jpg", exif=exif, quality=95)
    pixels, size, _ = read_image(path, 8)
    assert size == (16, 8)
    assert pixels[0].mean() > 200 > 50 > pixels[-1].mean()


@pytest.mark.parametrize(
    ("width", "height"), [(50, 20), (23, 90), (67, 101), (8, 9), (5, 7), (1, 1), (1, 30)]
)
def test_scaling_and_cropping(tmp_path, width, height):
    """Halved by box filtering, then bicubic to the shorter side, then the centre: step by step."""
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    pixels = read_image(saved(tmp_path, image), 8)[0]
    while min(image.size) >= 16:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = 8 / min(image.size)
    expected = np.asarray(
        image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    )
    top, left = (expected.shape[0] - 8) // 2, (expected.shape[1] - 8) // 2
    assert np.array_equal(pixels, expected[top : top + 8, left : left + 8])


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(path, 8)[0][0, 0].tolist() == [255, 0, 0]


def test_unusable_files_say_why(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    data = (tmp_path / "image.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "flipped.png").write_bytes(data[:500] + bytes(64) + data[564:])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    reasons = {}
    for name in ("half", "flipped", "text", "empty", "absent"):
        with pytest.raises(UnusableImage) as caught:
            read_image(str(tmp_path / f"{name}.png"), 8)
        reasons[name] = str(caught.value)
    assert reasons == {
        "half": "damaged or truncated",
        "flipped": "damaged or truncated",
        "text": "empty or not an image",
        "empty": "empty or not an image",
        "absent": "missing or not readable",
    }
    with pytest.raises(UnusableImage, match="times as long"):
        read_image(saved(tmp_path, Image.new("L", (2001, 2)), "long.png"), 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for reader in (inspect_image, lambda path: read_image(path, 8)):
        with pytest.raises(UnusableImage, match="too many pixels"):
            reader(path)


# Folders


def test_a_folder_is_read_recursively_in_order(tmp_path):
    names = ["b/two.PNG", "b/.hidden.png", ".git/three.png", "a/deep/one.jpeg", "b/notes.txt", "b/ten.webp"]
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / "set" / name).write_text("notes")
        else:
            Image.new("RGB", (8, 8)).save(tmp_path / "set" / name)
    images = read(tmp_path / "set")
    assert len(images) == 3
    assert images.class_names == ["a/deep", "b"]
    assert images.labels.tolist() == [0, 1, 1]
    assert images.summary["skipped_names"] == {image_folder.OTHER_FILE: ["b/notes.txt"]}
    files, _ = list_files(str(tmp_path / "set"))
    assert [file.name for file in files] == ["a/deep/one.jpeg", "b/ten.webp", "b/two.PNG"]


def test_a_link_to_a_folder_above_ends(folder):
    try:
        (folder / "loop").symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    files, skipped = list_files(str(folder))
    assert len(files) == 12 and skipped == {image_folder.KNOWN_FOLDER: ["loop"]}


@posix
def test_links_that_lead_nowhere_are_named(folder):
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "gone.png").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.png")
    images = read(folder)
    assert len(images) == 12
    assert images.summary["skipped_names"] == {
        image_folder.BROKEN_LINK: ["gone.png", "itself"],
        image_folder.SPECIAL_FILE: ["pipe.png"],
    }
    assert "2 x link that leads nowhere (gone.png, itself)" in describe(images)


@posix
def test_folders_that_link_to_each_other_are_read_once(tmp_path):
    names = "abcdefghi"
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / "1.png")
        for other in names:
            if other != name:
                (tmp_path / "set" / name / other).symlink_to(tmp_path / "set" / other)
    files, skipped = list_files(str(tmp_path / "set"))
    assert [file.name for file in files] == [f"{name}/1.png" for name in names]
    assert len(skipped[image_folder.KNOWN_FOLDER]) == 9 * 8


@posix
def test_a_linked_folder_has_the_name_of_the_first_link(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "deep" / "1.png")
    (tmp_path / "set").mkdir()
    for name in ("dogs", "cats"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere")
    files, skipped = list_files(str(tmp_path / "set"))
    assert [file.name for file in files] == ["cats/deep/1.png"]
    assert skipped == {image_folder.KNOWN_FOLDER: ["dogs"]}


@posix
def test_folders_nested_deeply(tmp_path):
    path = str(tmp_path)
    for _ in range(1500):
        path += "/d"
        os.mkdir(path)
    Image.new("RGB", (8, 8)).save(f"{path}/1.png")
    try:
        assert len(read(tmp_path)) == 1
    finally:  # by hand: pytest's own tidying up is recursive
        os.remove(f"{path}/1.png")
        while path != str(tmp_path):
            os.rmdir(path)
            path = os.path.dirname(path)


def test_threads_share_a_limit_of_pixels(folder, monkeypatch):
    for index in range(6):
        Image.new("RGB", (100, 10 * (index + 1))).save(folder / f"a_big{index}.png")
    # At a time: the largest alone, or others of at most 2000 pixels together.
    monkeypatch.setattr(decode, "_in_flight", decode._Budget(2000))
    monkeypatch.setattr(image_folder, "usable_cores", lambda: 8)
    monkeypatch.setattr(image_folder, "CHUNK", 1)
    lock, now, seen = threading.Lock(), [], []
    transpose = ImageOps.exif_transpose

    def slow(image):
        with lock:
            now.append(image.width * image.height)
            seen.append(list(now))
        time.sleep(0.02)
        with lock:
            now.remove(image.width * image.height)
        return transpose(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", slow)
    assert len(read(folder)) == 18
    assert all(sum(sizes) <= 2000 or len(sizes) == 1 for sizes in seen)
    assert [6000] in seen and max(map(len, seen)) > 1


def test_remote_folders_are_read_alike(folder, monkeypatch):
    """blobfile handles local paths with the calls that it has for URLs."""
    local = read(folder)
    monkeypatch.setattr(image_folder, "is_remote", lambda path: True)
    monkeypatch.setattr("improved_diffusion.data.decode.is_remote", lambda path: True)
    monkeypatch.setattr("improved_diffusion.image_datasets.is_remote", lambda path: True)
    remote = read(folder)
    assert not remote.summary["cached"]
    assert np.array_equal(remote.get(np.arange(12)), local.get(np.arange(12)))
    assert remote.fingerprint == local.fingerprint


@pytest.mark.parametrize(
    ("names", "class_names", "labels"),
    [
        (["cat_1.png", "bird_2.png", "cat_3_x.png"], ["bird", "cat"], [1, 0, 1]),
        (["cats/1.png", "birds/2.png"], ["birds", "cats"], [1, 0]),
        (["x/cat_1.png", "y/bird_2.png"], ["bird", "cat"], [1, 0]),
        (["cats/IMG_1.png", "birds/IMG_2.png"], ["birds", "cats"], [1, 0]),
        (["cats/a_1.png", "birds/2.png"], ["birds", "cats"], [1, 0]),
        (["cat_1.png", "2.png"], [], None),
        (["1.png", "sub/2.png"], [], None),
        (["_1.png", "_2.png"], [], None),
    ],
)
def test_classes_come_from_names(names, class_names, labels):
    found, indices = classify(names)
    assert found == class_names
    assert (indices if indices is None else indices.tolist()) == labels


def test_unusable_files_are_skipped_and_named(folder):
    (folder / "a_03.png").write_text("no image")
    for index in range(7):
        (folder / f"a_broken{index}.png").write_bytes((folder / "b_01.png").read_bytes()[:60])
    images = read(folder)
    assert len(images) == 11
    assert images.summary["skipped"] == {"empty or not an image": 1, "damaged or truncated": 7}
    assert len(images.summary["skipped_names"]["damaged or truncated"]) == 5
    assert images.summary["classes"] == {"a": 3, "b": 4, "c": 4}
    good = sorted(path for path in folder.iterdir() if "broken" not in path.name and path.name != "a_03.png")
    assert np.array_equal(images.get(np.arange(11)), [np.asarray(Image.open(path)) for path in good])
    text = describe(images)
    for part in (
        "11 images",
        str(folder),
        "all 8x8",
        "RGB 11",
        "3 (a 3, b 4, c 4)",
        "1 x empty or not an image",
    ):
        assert part in text
    assert "7 x damaged or truncated (a_broken0.png, " in text
    assert "a_broken5.png" not in text


def test_the_summary_is_json_and_describes_sizes(folder):
    Image.new("L", (30, 20)).save(folder / "d_99.png")
    images = read(folder)
    summary = json.loads(json.dumps(images.summary))
    assert summary["sizes"] == {"min": "8x8", "max": "30x20", "most_common": "8x8"}
    assert summary["modes"] == {"RGB": 12, "L": 1}
    assert summary["source"] == str(folder)
    assert summary["bytes"] == 13 * 8 * 8 * 3
    assert "8x8 to 30x20, mostly 8x8, scaled and cropped to 8x8" in describe(images)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("", 8), "unspecified data directory.*builtin"),
        (("absent", 8), ".*absent does not exist"),
        (("absent.npz", 8), ".*absent.npz does not exist"),
        (("file.txt", 8), ".*neither a folder nor an .npz"),
        (("empty", 8), r".*empty holds no usable image \(it is empty\)"),
        (("texts", 8), "no usable image .*1 x file name"),
        (("broken", 8), "no usable image .*2 x empty or not an image"),
        (("builtin", 0), "image_size"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "texts", "broken"):
        (tmp_path / name).mkdir()
    for name in ("file.txt", "texts/a.txt", "broken/a.png", "broken/b.png"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=expected) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)


def test_a_negative_limit_is_refused(folder):
    with pytest.raises(ValueError, match="cache_limit_gb"):
        read(folder, cache_limit_gb=-1.0)


def test_the_fingerprint_follows_the_content_and_not_the_place(folder, tmp_path):
    before = read(folder).fingerprint
    os.utime(folder / "a_00.png", (1, 1))
    moved = folder.rename(tmp_path / "moved")
    assert read(moved).fingerprint == before
    (moved / "a_00.png").unlink()
    assert read(moved).fingerprint != before


# The cache


def forbid_decoding(monkeypatch):
    def fail(*arguments):
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_folder, "read_image", fail)
    monkeypatch.setattr(image_folder, "inspect_image", fail)


@pytest.mark.parametrize("limit", [2.0, 0.0])
def test_the_second_start_decodes_nothing(folder, monkeypatch, limit):
    (folder / "z_broken.png").write_text("no image")
    first = read(folder, cache_limit_gb=limit)
    forbid_decoding(monkeypatch)
    lines = []
    second = read(folder, cache_limit_gb=limit, log=lines.append)
    assert lines == []
    assert (first.in_memory, first.summary["cached"], second.summary["cached"]) == (limit > 0, False, True)
    assert second.summary | {"cached": False} == first.summary
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.labels, first.labels)
    assert np.array_equal(second.get(np.arange(12)), first.get(np.arange(12)))


def test_sizes_have_caches_of_their_own(folder, monkeypatch):
    read(folder, 8)
    read(folder, 4)
    forbid_decoding(monkeypatch)
    assert read(folder, 8).get([0]).shape == (1, 8, 8, 3)
    assert read(folder, 4).get([0]).shape == (1, 4, 4, 3)


def test_changed_files_are_read_anew(folder):
    read(folder)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "a_00.png")
    os.utime(folder / "a_00.png", ns=(1, 1))
    lines = []
    images = read(folder, log=lines.append)
    assert len(lines) == 1
    assert "files have changed" in lines[0]
    assert images.get([0])[0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_damaged_cache_is_rebuilt(folder, cache, place):
    original = read(folder).get(np.arange(12))
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    lines = []
    assert np.array_equal(read(folder, log=lines.append).get(np.arange(12)), original)
    assert len(lines) == 1
    assert "damaged" in lines[0]
    file.write_bytes(data[:10])
    assert not read(folder, log=lines.append).summary["cached"]
    assert read(folder).summary["cached"]


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    lines = []
    images = read(folder, cache_dir=str(tmp_path / "file" / "cache"), log=lines.append)
    assert len(images) == 12
    assert any("could not be cached" in line for line in lines)


def test_a_file_that_may_become_readable_is_tried_again(folder, monkeypatch):
    def locked(path, image_size):
        if path.endswith("b_01.png"):
            raise UnusableImage(UNREADABLE)
        return read_image(path, image_size)

    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "read_image", locked)
        assert len(read(folder)) == 11
    assert len(read(folder)) == 12


def test_the_default_cache_dir(monkeypatch, tmp_path):
    assert default_cache_dir() == str(tmp_path / "cache")
    monkeypatch.delenv("IMPROVED_DIFFUSION_CACHE")
    assert default_cache_dir().endswith("improved_diffusion")


# .npz files and the built-in set


def test_npz_as_the_sampler_writes_it(tmp_path):
    pixels = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", pixels, np.array([0, 3, 1, 3, 0]))
    images = read(tmp_path / "a.npz")
    assert np.array_equal(images.get(np.arange(5)), pixels)
    assert images.labels.tolist() == [0, 3, 1, 3, 0]
    assert images.class_names == ["0", "1", "2", "3"]
    assert images.summary["source"] == str(tmp_path / "a.npz")
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    assert read(tmp_path / "b.npz").fingerprint == images.fingerprint


def test_npz_with_names_grey_and_another_size(tmp_path):
    pixels = np.broadcast_to(np.arange(0, 60, 10, dtype=np.uint8)[:, None, None, None], (6, 20, 10, 1))
    np.savez_compressed(tmp_path / "a.npz", other=np.zeros(3), pictures=pixels)
    images = read(tmp_path / "a.npz")
    assert images.labels is None
    assert images.num_classes == 0
    assert "none" in describe(images)
    assert images.summary["modes"] == {"L": 6}
    assert np.array_equal(images.get([2, 5])[:, 4, 4], [[20] * 3, [50] * 3])
    assert images.get([0]).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"arr_0": np.array([{}, 1], dtype=object)}, "cannot be read"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "no uint8 array"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "no uint8 array"),
        ({"images": np.zeros((2, 8, 8, 4), np.uint8)}, "no uint8 array"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)}, "must be 2 whole numbers"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(2)}, "must be 2 whole numbers"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.array([0, -1])}, "from 0"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.array([0, 10**12])}, "from 0"),
    ],
)
def test_unusable_npz_files_are_named(tmp_path, arrays, expected):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=expected) as caught:
        read(tmp_path / "a.npz")
    assert f"{tmp_path / 'a.npz'}" in str(caught.value)


def test_a_file_that_is_no_npz_is_named(tmp_path):
    for content in (b"", b"text", b"PK\x03\x04 broken"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
            read(tmp_path / "a.npz")


def test_the_builtin_set():
    images = read("builtin", 16)
    assert len(images) == 10_000
    assert images.num_classes == 10
    assert images.summary["source"] == "builtin"
    assert images.get([7]).shape == (1, 16, 16, 3)


# The stream


def take(stream, count):
    return [next(stream) for _ in range(count)]


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        th.equal(x, other) and list(cond) == list(more) and all(th.equal(cond[k], more[k]) for k in cond)
        for (x, cond), (other, more) in zip(left, right)
    )


def test_batches_are_exact_floats_in_order(folder):
    images = read(folder)
    stream = BatchStream(images, 5, class_cond=True, deterministic=True)
    (x, cond), _, (wrapped, wrapped_cond) = take(stream, 3)
    assert x.dtype == th.float32
    expected = images.get(np.arange(5)).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    assert np.array_equal(x.numpy(), expected)
    assert x.is_contiguous()
    assert cond["y"].dtype == th.int64
    assert cond["y"].tolist() == images.labels[:5].tolist()
    assert wrapped_cond["y"].tolist() == images.labels[[10, 11, 0, 1, 2]].tolist()
    assert th.equal(wrapped[2:], x[:3])
    assert stream.samples == 15


def test_every_byte_becomes_the_float_it_should(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.savez(tmp_path / "a.npz", pixels)
    x, cond = next(BatchStream(read(tmp_path / "a.npz", 16), 1))
    assert np.array_equal(
        x[0, 1].numpy().ravel(), np.arange(256, dtype=np.uint8).astype(np.float32) / 127.5 - 1
    )
    assert cond == {}


def test_every_epoch_shows_every_image_in_an_order_of_its_own():
    order = SampleOrder(100, seed=3, deterministic=False, random_flip=False)
    epochs = [order.indices(100 * epoch, 100) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    across = SampleOrder(100, seed=3, deterministic=False, random_flip=False).indices(50, 200)
    assert np.array_equal(across, np.concatenate(epochs)[50:250])
    other = SampleOrder(100, seed=4, deterministic=False, random_flip=False).indices(0, 100)
    assert not np.array_equal(other, epochs[0])


def test_fewer_images_than_a_batch_wrap_around(folder):
    for name in sorted(os.listdir(folder))[3:]:
        (folder / name).unlink()
    x, _ = next(BatchStream(read(folder), 8))
    assert len(x) == 8
    assert len(th.unique(x.flatten(1), dim=0)) == 3


def test_flips_are_a_function_of_the_position(folder):
    order = SampleOrder(12, seed=0, deterministic=True, random_flip=True)
    flips = order.flips(0, 1000)
    assert 400 < flips.sum() < 600
    for first, count in [(0, 7), (7, 9), (3, 500), (998, 2)]:
        assert np.array_equal(order.flips(first, count), flips[first : first + count])
    images = read(folder)
    plain, _ = next(BatchStream(images, 24, deterministic=True))
    flipped, _ = next(BatchStream(images, 24, deterministic=True, random_flip=True))
    for index in range(24):
        assert th.equal(flipped[index], plain[index].flip(2) if flips[index] else plain[index])
    assert not any(SampleOrder(12, 0, True, False).flips(0, 100))


@pytest.mark.parametrize("limit", [2.0, 0.0])
def test_seek_resumes_exactly(folder, limit):
    images = read(folder, cache_limit_gb=limit)
    arguments = {"class_cond": True, "random_flip": True, "seed": 5}
    whole = take(BatchStream(images, 7, **arguments), 6)
    resumed = BatchStream(images, 7, **arguments)
    take(resumed, 1)
    resumed.seek(21)
    assert same(take(resumed, 3), whole[3:])


@pytest.mark.parametrize(("batch_size", "num_shards"), [(8, 2), (7, 3)])
def test_shards_are_slices_of_the_global_batch(folder, batch_size, num_shards):
    images = read(folder)
    arguments = {"class_cond": True, "random_flip": True}
    whole = take(BatchStream(images, batch_size, **arguments), 4)
    shards = [
        take(BatchStream(images, batch_size, shard=shard, num_shards=num_shards, **arguments), 4)
        for shard in range(num_shards)
    ]
    joined = [
        (th.cat([x for x, _ in parts]), {"y": th.cat([cond["y"] for _, cond in parts])})
        for parts in zip(*shards)
    ]
    assert same(joined, whole)


@pytest.mark.parametrize("data_workers", [0, 2])
def test_a_streamed_set_gives_the_same_bits(folder, data_workers):
    arguments = {"class_cond": True, "random_flip": True, "seed": 1}
    expected = take(BatchStream(read(folder), 5, **arguments), 6)
    streamed = read(folder, cache_limit_gb=0)
    assert not streamed.in_memory
    assert streamed.summary["bytes"] == 0
    before = th.get_rng_state()
    assert same(take(BatchStream(streamed, 5, data_workers=data_workers, **arguments), 6), expected)
    assert th.equal(th.get_rng_state(), before), (
        "the model's random numbers must not depend on how data are read"
    )


@posix
def test_workers_are_not_stopped_by_signals_to_the_whole_group(folder):
    before = set(multiprocessing.active_children())
    stream = BatchStream(read(folder, cache_limit_gb=0), 2, data_workers=1)
    take(stream, 1)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(worker.pid, number)
    take(stream, 6)  # more than it has read ahead
    assert worker.is_alive()


STREAMING = """
import multiprocessing, sys
from improved_diffusion.image_datasets import load_data
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    stream = load_data(data_dir=sys.argv[2], batch_size=2, image_size=8, cache_limit_gb=0, data_workers=2)
    next(stream)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""


@posix
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_process_that_is_killed(folder, tmp_path, method):
    script = tmp_path / "streaming.py"
    script.write_text(STREAMING)
    command = [sys.executable, str(script), method, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        workers = list(map(int, process.stdout.readlines(1)[-1].split()))
        assert len(workers) == 2
        process.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_streamed_set_can_be_sent_to_workers_of_any_platform(folder):
    images = read(folder, cache_limit_gb=0)
    assert np.array_equal(pickle.loads(pickle.dumps(images)).get([3]), images.get([3]))


def test_a_file_damaged_during_training_is_replaced_by_one_of_its_class(folder):
    images = read(folder, cache_limit_gb=0)
    (folder / "b_01.png").write_text("damaged")
    index = sorted(os.listdir(folder)).index("b_01.png")
    with pytest.warns(UserWarning, match=r"b_01\.png is empty or not an image"):
        pixels = images.get([index])
    assert np.array_equal(pixels[0], np.asarray(Image.open(folder / "b_04.png")))


def test_a_set_that_is_gone_is_an_error(folder):
    images = read(folder, cache_limit_gb=0)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="cannot read an image any more: .*png"):
        images.get([0])


def test_mistakes_in_a_stream_name_the_flag(tmp_path):
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain" / "one.png")
    images = read(tmp_path / "plain")
    with pytest.raises(ValueError, match="class_cond True: needs classes, and the images in "):
        BatchStream(images, 1, class_cond=True)
    with pytest.raises(ValueError, match="batch_size 1: "):
        BatchStream(images, 1, shard=1, num_shards=2)
    with pytest.raises(ValueError, match="data_workers -1"):
        BatchStream(images, 1, data_workers=-1)


def test_load_data_is_both_in_one(folder):
    arguments = {"batch_size": 4, "class_cond": True, "random_flip": True, "seed": 2}
    stream = load_data(data_dir=str(folder), image_size=8, **arguments)
    assert same(take(stream, 3), take(BatchStream(read(folder), **arguments), 3))


@posix
def test_names_reach_no_terminal_raw(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("cat\x1b[2Jred\nline_1.png", "dog_1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name)
    (tmp_path / "set" / "notes\x07\n.txt").write_text("")
    images = read(tmp_path / "set")
    assert images.class_names[0] == "cat\x1b[2Jred\nline"  # which stays what identifies it
    lines = describe(images).split("\n")
    assert len(lines) == 5 and all(map(str.isprintable, lines))
    assert "cat [2Jred line 1" in lines[3]
