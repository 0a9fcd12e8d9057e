"""datasets/fashion_mnist.py on tiny files of the official format, good and damaged, and a local server."""

import functools
import gzip
import hashlib
import http.server
import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.image_datasets import read_images

SCRIPT = Path(__file__).parents[2] / "datasets" / "fashion_mnist.py"
COUNTS = {"fashion_train": 12, "fashion_test": 5}


@pytest.fixture(scope="module")
def fashion():
    spec = importlib.util.spec_from_file_location("fashion_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def arrays(split):
    rng = np.random.default_rng(len(split))
    count = COUNTS[split]
    return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10


@pytest.fixture
def files(fashion, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for split, names in fashion.FILES.items():
        for name, array in zip(names, arrays(split)):
            (folder / name).write_bytes(gzip.compress(idx(array), mtime=0))
    return folder


def error_of(fashion, capsys, *arguments):
    assert fashion.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_every_picture_is_written_under_its_class(fashion, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert fashion.main(["--files", str(files), "--out_dir", str(out)]) == 0
    names = fashion.CLASS_NAMES.split(",")
    for split, count in COUNTS.items():
        images, labels = arrays(split)
        assert len(list((out / split).glob("*.png"))) == count
        for index, (image, label) in enumerate(zip(images, labels)):
            picture = Image.open(out / split / f"{names[label]}_{index:05d}.png")
            assert picture.mode == "L" and np.array_equal(np.asarray(picture), image)
    printed = capsys.readouterr().out
    assert f"12 images in {out / 'fashion_train'}" in printed
    assert "not the official file" in printed
    found = read_images(str(out / "fashion_train"), 28, channels=0, progress=False)
    assert found.channels == 1 and found.class_names == sorted(names)


def test_unpacked_files_and_other_names(fashion, files, tmp_path):
    for path in files.iterdir():
        path.write_bytes(gzip.decompress(path.read_bytes()))
    digits = ",".join("0123456789")
    assert fashion.main(["--files", str(files), "--out_dir", str(tmp_path), "--class_names", digits]) == 0
    assert (tmp_path / "fashion_train" / "3_00003.png").exists()


def test_mistakes(fashion, files, tmp_path, capsys):
    fails = functools.partial(error_of, fashion, capsys, "--out_dir", tmp_path / "out")
    assert "--files nowhere: has no train-images" in fails("--files", "nowhere")
    assert "--class_names a,b: expected ten names" in fails("--files", files, "--class_names", "a,b")
    assert "'a_b'" in fails("--files", files, "--class_names", "a_b,c,d,e,f,g,h,i,j,k")
    images, labels = files / "train-images-idx3-ubyte.gz", files / "train-labels-idx1-ubyte.gz"
    whole, right = images.read_bytes(), labels.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "cannot be read"),
        (b"<html>not found</html>", "is no IDX file"),
        (b"", "is no IDX file"),
        (idx(np.zeros((3, 4), np.uint8)), "is no IDX file"),
        (idx(np.zeros((3, 4, 4), np.uint8))[:-1], "damaged or incomplete"),
        (idx(np.zeros((0, 4, 4), np.uint8)), "damaged or incomplete"),
    ):
        images.write_bytes(content)
        assert f"{images}" in (error := fails("--files", files)) and message in error
    images.write_bytes(whole)
    for content, message in (
        (idx(np.zeros(3, np.uint8)), "has 3 labels for 12 images"),
        (idx(np.full(12, 10, np.uint8)), "has the label 10, of 10 classes"),
    ):
        labels.write_bytes(content)
        assert message in fails("--files", files)
    labels.write_bytes(right)
    assert fashion.main(["--files", str(files), "--out_dir", str(tmp_path / "out")]) == 0


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(files, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(Handler, directory=files)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def checksums(fashion, files):
    digest = lambda name: hashlib.md5((files / name).read_bytes()).hexdigest()  # noqa: E731
    return {split: {name: digest(name) for name in names} for split, names in fashion.FILES.items()}


def test_downloads_once(fashion, files, server, tmp_path, monkeypatch):
    known, out = checksums(fashion, files), tmp_path / "out"
    fashion.prepare(None, str(out), url=server, known=known)
    assert fashion.prepared_count(out / "fashion_train") == 12 and not list(out.glob("*.part"))
    monkeypatch.setattr(fashion, "download", None)  # it must not be needed again
    fashion.prepare(None, str(out), url=server, known=known)
    (out / "fashion_test" / ".complete").unlink()
    fashion.prepare(None, str(out), url=server, known=known)


def test_a_download_with_the_wrong_checksum_is_deleted(fashion, server, tmp_path):
    with pytest.raises(ValueError, match="has md5 .* instead of 8d4fb7e6c68d591d4c3dfef9ec88bf0d: deleted"):
        fashion.prepare(None, str(tmp_path), url=server)
    assert not list(tmp_path.glob("*.gz*"))


def test_no_network_says_how_to_go_on(fashion, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_address[1]}/"
    with pytest.raises(ValueError, match="cannot download .* pass it with --files FOLDER"):
        fashion.prepare(None, str(tmp_path), url=url)


def test_runs_as_a_script_without_the_package(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--files", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "improved_diffusion" not in SCRIPT.read_text()
