"""datasets/cifar10.py on tiny archives of the official format, good, damaged and malicious, and a local server."""

import hashlib
import http.server
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "datasets" / "cifar10.py"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def cifar10():
    spec = importlib.util.spec_from_file_location("cifar10_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(seed: int, count: int = 4) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "batch_label": f"batch {seed}",
        "labels": rng.integers(0, 10, count).tolist(),
        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"picture_{i}.png" for i in range(count)],
    }


def contents() -> dict:
    members = {f"data_batch_{i}": batch(i) for i in range(1, 6)}
    return members | {"test_batch": batch(6), "batches.meta": {"label_names": CLASSES, "num_vis": 3072}}


def archive(path: Path, members: dict) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            data = value if isinstance(value, bytes) else pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def good(tmp_path):
    return archive(tmp_path / "good.tar.gz", contents())


def error_of(cifar10, capsys, *arguments) -> str:
    """The one line that a failing run prints."""
    assert cifar10.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_every_picture_is_written_under_its_class(cifar10, good, tmp_path, capsys):
    out = tmp_path / "out"
    assert cifar10.main(["--archive", str(good), "--out_dir", str(out)]) == 0
    train = [batch(i) for i in range(1, 6)]
    labels = [label for part in train for label in part["labels"]]
    names = [f"{CLASSES[label]}_{index:05d}.png" for index, label in enumerate(labels)]
    assert sorted(os.listdir(out / "cifar_train")) == sorted([".complete", *names])
    pixels = np.concatenate([part["data"] for part in train]).reshape(-1, 3, 32, 32)
    for name, picture in zip(names, pixels):
        assert np.array_equal(np.asarray(Image.open(out / "cifar_train" / name)), picture.transpose(1, 2, 0))
    assert len(list((out / "cifar_test").glob("*.png"))) == 4
    printed = capsys.readouterr().out
    assert f"20 images in {out / 'cifar_train'}" in printed
    assert "md5" in printed, "an archive that is not the official one is announced"


def test_an_interrupted_run_is_finished_and_keeps_what_is_there(cifar10, good, tmp_path, monkeypatch):
    out = tmp_path / "out"
    replace, written = os.replace, []

    def interrupted(source, target):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    assert cifar10.main(["--archive", str(good), "--out_dir", str(out)]) == 130
    assert cifar10.prepared_count(out / "cifar_train") == 0
    monkeypatch.undo()
    Path(written[0]).write_bytes(b"")  # what a power cut can leave behind
    kept = os.stat(written[3]).st_mtime_ns
    assert cifar10.main(["--archive", str(good), "--out_dir", str(out)]) == 0
    assert cifar10.prepared_count(out / "cifar_train") == 20
    assert os.stat(written[3]).st_mtime_ns == kept
    Image.open(written[0]).load()


def test_a_missing_picture_is_noticed(cifar10, good, tmp_path):
    cifar10.prepare(str(good), str(tmp_path))
    next((tmp_path / "cifar_test").glob("*.png")).unlink()
    assert cifar10.prepared_count(tmp_path / "cifar_test") == 0


class Malicious:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_malicious_pickle_is_refused_and_not_run(cifar10, tmp_path, capsys):
    marker = tmp_path / "executed"
    bad = archive(tmp_path / "bad.tar.gz", contents() | {"data_batch_3": {"data": Malicious(marker)}})
    message = error_of(cifar10, capsys, "--archive", bad, "--out_dir", tmp_path / "out")
    assert "data_batch_3" in message
    assert "malicious" in message
    assert not marker.exists()
    assert not (tmp_path / "out" / "cifar_train").exists()


@pytest.mark.parametrize(
    ("member", "value", "expected"),
    [
        ("data_batch_2", {"labels": [1], "data": np.zeros((1, 100), np.uint8)}, "no images"),
        ("data_batch_2", {"labels": [1], "data": np.zeros((1, 3072), np.float32)}, "no images"),
        ("data_batch_2", {"labels": [10], "data": np.zeros((1, 3072), np.uint8)}, "no labels"),
        ("data_batch_2", {"labels": [1, 2], "data": np.zeros((1, 3072), np.uint8)}, "no labels"),
        ("data_batch_2", [1, 2, 3], "not a CIFAR-10 batch"),
        ("data_batch_2", b"no pickle", "damaged"),
        ("batches.meta", {"label_names": ["../../evil", *CLASSES[1:]]}, "must name 10 classes"),
        ("batches.meta", {"label_names": CLASSES[:1] * 10}, "must name 10 classes"),
    ],
)
def test_wrong_contents_are_named(cifar10, tmp_path, capsys, member, value, expected):
    bad = archive(tmp_path / "bad.tar.gz", contents() | {member: value})
    message = error_of(cifar10, capsys, "--archive", bad, "--out_dir", tmp_path / "out")
    assert member in message
    assert expected in message


def test_unusable_archives_are_named(cifar10, good, tmp_path, capsys):
    data = good.read_bytes()
    files = {
        "truncated": data[: len(data) // 2],
        "text": b"<html>not found</html>",
        "empty": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        message = error_of(cifar10, capsys, "--archive", tmp_path / name, "--out_dir", tmp_path / "out")
        assert f"{tmp_path / name} is not a complete .tar.gz archive" in message
    partial = contents()
    del partial["data_batch_4"]
    incomplete = archive(tmp_path / "incomplete.tar.gz", partial)
    assert "lacks data_batch_4" in error_of(cifar10, capsys, "--archive", incomplete, "--out_dir", tmp_path)
    assert "cannot read --archive" in error_of(cifar10, capsys, "--archive", tmp_path / "absent")
    cifar10.MAX_MEMBER_BYTES, limit = 1000, cifar10.MAX_MEMBER_BYTES
    try:
        assert "bytes" in error_of(cifar10, capsys, "--archive", good, "--out_dir", tmp_path)
    finally:
        cifar10.MAX_MEMBER_BYTES = limit


def test_an_output_folder_that_cannot_be_made_is_named(cifar10, good, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    message = error_of(cifar10, capsys, "--archive", good, "--out_dir", tmp_path / "file" / "out")
    assert str(tmp_path / "file") in message


def test_runs_as_a_script_without_the_package(good, tmp_path):
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--archive", str(tmp_path / "absent")], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "improved_diffusion" not in SCRIPT.read_text()


class Server(http.server.ThreadingHTTPServer):
    """Serves `data` at every path, honouring Range requests; `cut` limits what one answer really contains."""

    def __init__(self, data: bytes):
        self.data, self.cut, self.ranges, self.requests = data, None, True, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/archive"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start >= len(self.server.data):
            self.send_error(416)
            return
        body = self.server.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(good, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(good.read_bytes()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_downloads_once(cifar10, server, tmp_path):
    md5 = hashlib.md5(server.data).hexdigest()
    out = tmp_path / "out"
    cifar10.prepare(None, str(out), url=server.url, md5=md5)
    assert cifar10.prepared_count(out / "cifar_train") == 20
    assert not list(out.glob("*.part"))
    (out / "cifar_train" / ".complete").unlink()
    cifar10.prepare(None, str(out), url=server.url, md5=md5)
    (out / "cifar-10-python.tar.gz").unlink()
    cifar10.prepare(None, str(out), url=server.url, md5=md5)
    assert server.requests == [None], "neither with the archive nor with the pictures there"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_continued(cifar10, server, tmp_path, ranges):
    md5 = hashlib.md5(server.data).hexdigest()
    server.cut, server.ranges = 5000, ranges
    with pytest.raises(ValueError, match="run this"):
        cifar10.download(server.url, str(tmp_path / "file"), md5)
    assert not (tmp_path / "file").exists()
    server.cut = None
    cifar10.download(server.url, str(tmp_path / "file"), md5)
    assert (tmp_path / "file").read_bytes() == server.data
    assert server.requests == [None, "bytes=5000-"]


def test_a_part_that_is_too_long_is_replaced(cifar10, server, tmp_path):
    (tmp_path / "file.part").write_bytes(bytes(len(server.data) + 1))
    cifar10.download(server.url, str(tmp_path / "file"), hashlib.md5(server.data).hexdigest())
    assert (tmp_path / "file").read_bytes() == server.data


def test_a_download_with_the_wrong_checksum_is_deleted(cifar10, server, tmp_path):
    with pytest.raises(ValueError, match="md5"):
        cifar10.download(server.url, str(tmp_path / "file"), "0" * 32)
    assert not list(tmp_path.glob("file*"))


def test_a_damaged_archive_in_the_folder_is_downloaded_again(cifar10, server, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"half of it")
    md5 = hashlib.md5(server.data).hexdigest()
    assert cifar10.obtain_archive(str(tmp_path), server.url, md5) == str(path)
    assert path.read_bytes() == server.data


def test_no_network_says_how_to_go_on(cifar10, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(b"") as closed:
        url = closed.url
    with pytest.raises(ValueError, match="--archive"):
        cifar10.prepare(None, str(tmp_path), url=url)
