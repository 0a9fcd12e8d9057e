"""datasets/lsun_bedroom.py on small databases made like LSUN's: good, interrupted, damaged, and none at all."""

import importlib.util
import io
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

lmdb = pytest.importorskip("lmdb", reason="the extra lsun is not installed")


@pytest.fixture(scope="module")
def lsun():
    spec = importlib.util.spec_from_file_location("lsun_script", ROOT / "datasets" / "lsun_bedroom.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encode(width, height, colour):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, format="webp", lossless=True)
    return file.getvalue()


@pytest.fixture
def database(tmp_path):
    """Three images, and one that is none, under keys like LSUN's."""
    path = tmp_path / "bedroom_train_lmdb"
    contents = [encode(40, 30, "red"), b"no image", encode(30, 50, "green"), encode(300, 16, "blue")]
    with lmdb.open(str(path), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for number, content in enumerate(contents):
            transaction.put(f"{number:040x}".encode(), content)
    return path


def colours(folder):
    return {path.name: Image.open(path).getpixel((3, 3)) for path in sorted(folder.glob("*.png"))}


def test_every_image_becomes_a_square_png(lsun, database, tmp_path, capsys):
    assert lsun.main(["--image-size", "16", str(database), str(tmp_path / "out")]) == 0
    expected = {0: (255, 0, 0), 2: (0, 128, 0), 3: (0, 0, 255)}
    assert colours(tmp_path / "out") == {
        f"bedroom_{number:07d}.png": colour for number, colour in expected.items()
    }
    with Image.open(tmp_path / "out" / "bedroom_0000003.png") as image:
        assert image.size == (16, 16) and image.mode == "RGB"
    output = capsys.readouterr()
    assert "left out image 1" in output.out and "3 images in" in output.out


def test_an_interrupted_run_is_finished(lsun, database, tmp_path, monkeypatch):
    out = tmp_path / "out"
    flags = ["--image_size", "16", "--prefix", "room", str(database), str(out)]
    decode, decoded = lsun._decode, []

    def stop_at_the_third(content, image_size):
        decoded.append(content)
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return decode(content, image_size)

    monkeypatch.setattr(lsun, "_decode", stop_at_the_third)
    assert lsun.main(flags) == 130
    assert list(colours(out)) == ["room_0000000.png"]
    assert lsun.main(flags) == 0
    assert len(colours(out)) == 3
    assert len(decoded) == 3 + 3  # the finished one is not decoded again


def test_mistakes(lsun, database, tmp_path, capsys, monkeypatch):
    def refused(message, *argv):
        assert lsun.main([*map(str, argv), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    refused("no data.mdb", tmp_path)
    refused("--image-size 0", "--image-size", 0, database)
    refused("--prefix", "--prefix", "../a", database)
    (database / "data.mdb").write_bytes(np.random.default_rng(0).bytes(20_000))
    refused("is damaged", database)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    refused("improved_diffusion[lsun]", database)
