"""Files that want to do harm: run code, write elsewhere, or fill the memory. Each is refused by name."""

import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pickle
import signal
import struct
import sys
import tarfile
import zipfile
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch as th
from conftest import ROOT, TINY, TINY_FLAGS, save_trained
from openpyxl import load_workbook
from PIL import Image

from improved_diffusion import logger, script_util
from improved_diffusion.config import ModelFlags, SampleConfig, TrainConfig
from improved_diffusion.data.decode import UnusableImage, read_image
from improved_diffusion.flags import declared, defaults
from improved_diffusion.image_datasets import read_images
from improved_diffusion.jobs import runs
from improved_diffusion.results.export import export
from improved_diffusion.run import checkpoint
from improved_diffusion.run.checkpoint import DamagedCheckpoint
from improved_diffusion.script_util import (
    create_model_and_diffusion,
)
from improved_diffusion.train_util import parse_ema_rates


class Exploit:
    """Unpickled in good faith, it makes a directory at `marker`."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def torch_file(content) -> bytes:
    buffer = io.BytesIO()
    th.save(content, buffer)
    return buffer.getvalue()


def legacy_torch_file(content) -> bytes:
    buffer = io.BytesIO()
    th.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


FORMATS = {
    "zip": torch_file,
    "legacy": legacy_torch_file,
    "pickle 2": lambda content: pickle.dumps(content, protocol=2),
    "pickle 5": lambda content: pickle.dumps(content, protocol=5),
}


@pytest.fixture(params=FORMATS)
def exploit(request, tmp_path):
    """The bytes of a hostile .pt file; afterwards, that nothing in it was executed."""
    marker = tmp_path / "executed"
    yield FORMATS[request.param](OrderedDict(w=th.zeros(2), x=Exploit(marker)))
    assert not marker.exists()


def save_run(folder, step=4, arguments=TINY):
    """The smallest run that can be sampled from and resumed: one checkpoint of an untrained model."""
    model, _ = create_model_and_diffusion(**arguments)
    weights = model.state_dict()
    tensors = {"model": weights, "0.9": weights, "opt": {"state": {}, "param_groups": []}}
    state = {"samples": 8, "arguments": dict(arguments), "data": {}}
    return checkpoint.save(str(folder), step, tensors, state)


def replace_member(saved, kind, content):
    """Exchange a file of a checkpoint for one that the state file vouches for."""
    name = checkpoint.member_name(kind, saved.step)
    path = os.path.join(saved.folder, name)
    with open(path, "wb") as file:
        file.write(content)
    saved.state["files"][name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_state(saved)
    return path


def write_state(saved, **changes):
    state = {**saved.state, **changes}
    with open(saved.path("state"), "w", encoding="utf-8") as file:
        json.dump({**state, "sha256": checkpoint._state_checksum(state)}, file)


def main_of(script):
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def refusal(monkeypatch, script, *flags) -> str:
    """The one line with which a script refuses its flags, without the cost of a process of its own."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises((ValueError, OSError, SystemExit)) as caught:
        main_of(script)()()
    logger.close()
    message = errors.getvalue().rstrip() if caught.type is SystemExit else str(caught.value)
    assert "\n" not in message
    return message


# Code in checkpoints


def test_the_exploit_works_where_nobody_defends(tmp_path):
    pickle.loads(pickle.dumps(Exploit(tmp_path / "executed")))
    assert (tmp_path / "executed").exists(), "or the tests below would prove nothing"


def test_a_hostile_file_is_refused_by_name(tmp_path, exploit):
    path = tmp_path / "weights.pt"
    path.write_bytes(exploit)
    with pytest.raises(DamagedCheckpoint, match=r"weights\.pt: refused: .*could execute code"):
        checkpoint.load_tensors(str(path))


def test_sampling_from_a_hostile_file(tmp_path, exploit, monkeypatch):
    path = tmp_path / "ema_0.9999_500000.pt"
    path.write_bytes(exploit)
    message = refusal(monkeypatch, "image_sample", "--model_path", path, *TINY_FLAGS)
    assert str(path) in message and "could execute code" in message


@pytest.mark.parametrize("kind", ["model", "0.9", "opt"])
def test_resuming_from_a_hostile_run(tmp_path, exploit, kind, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    path = replace_member(save_run(run), kind, exploit)
    flags = ["--resume_checkpoint", run, "--total_steps", 9, "--data_dir", "builtin", "--ema_rate", 0.9]
    message = refusal(monkeypatch, "image_train", *flags)
    assert path in message and "could execute code" in message


def test_a_hostile_file_as_a_user_meets_it(tmp_path, call_script):
    """Through the real scripts: exit code 2, one line, and nothing is executed."""
    run, marker = tmp_path / "run", tmp_path / "executed"
    run.mkdir()
    saved = save_run(run)
    path = replace_member(saved, "0.9", torch_file({"x": Exploit(marker)}))
    done = call_script("image_sample.py", "--model_path", run, check=2)
    assert path in done.stderr and done.stderr.count("\n") == 1
    path = replace_member(saved, "model", torch_file({"x": Exploit(marker)}))
    done = call_script("image_train.py", "--resume_checkpoint", run, "--data_dir", "builtin", check=2)
    assert path in done.stderr and done.stderr.count("\n") == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        b"c_codecs\nencode\n",  # doubles its argument with "hex", as often as the pickle says so
        b"c__builtin__\nbytearray\n",  # of any length
        b"ctorch\nTensor\n",
    ],
)
def test_what_torch_would_allow_but_no_state_dict_needs(tmp_path, call):
    content = pickle.PROTO + b"\x02" + call + b"K\x01\x85R."
    for name, data in {"zip": zip_with(content), "legacy": content}.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
        with pytest.raises(DamagedCheckpoint, match=f"{name}.pt: refused"):
            checkpoint.load_tensors(str(tmp_path / f"{name}.pt"))


def zip_with(data_pkl, compression=zipfile.ZIP_STORED, **members) -> bytes:
    """A file in torch's format, with this pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in members.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", content)
    return buffer.getvalue()


def tensor_pickle(numel, shape, stride) -> bytes:
    """The pickle of {"w": tensor}, float32, of whatever size it is said to have."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ("storage", th.FloatStorage, "0", "cpu", numel) if isinstance(obj, Storage) else None

    class Claim:
        def __reduce__(self):
            return th._utils._rebuild_tensor_v2, (Storage(), 0, shape, stride, False, OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": Claim()})
    return buffer.getvalue()


def test_the_handmade_format_is_torchs(tmp_path):
    data = np.arange(4, dtype=np.float32).tobytes()
    (tmp_path / "w.pt").write_bytes(zip_with(tensor_pickle(4, (2, 2), (2, 1)), _0=data))
    assert checkpoint.load_tensors(str(tmp_path / "w.pt"))["w"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "numel, shape, stride",
    [
        (4, (10**12,), (0,)),  # one number, a trillion times
        (4, (1000,), (1,)),  # beyond its storage
        (1000, (1000,), (1,)),  # a storage beyond its record
        (10**15, (10**15,), (1,)),
        (4, (-1,), (1,)),
    ],
)
def test_tensors_that_claim_more_than_there_is(tmp_path, numel, shape, stride):
    (tmp_path / "w.pt").write_bytes(zip_with(tensor_pickle(numel, shape, stride), _0=bytes(16)))
    with pytest.raises(DamagedCheckpoint, match=r"w\.pt"):
        checkpoint.load_tensors(str(tmp_path / "w.pt"))


@pytest.mark.parametrize("claimed", [1000, 2**31 - 1])
def test_the_legacy_format_claims_more_than_there_is(tmp_path, claimed):
    """Numbers of 77 are easily found in its pickle: that of the storage and that of the tensor."""
    content = legacy_torch_file({"w": th.zeros(77)})
    assert content.count(b"K\x4d") == 2
    path = tmp_path / "w.pt"
    path.write_bytes(content.replace(b"K\x4d", b"J" + struct.pack("<i", claimed)))
    with pytest.raises(DamagedCheckpoint, match=r"w\.pt"):
        checkpoint.load_tensors(str(path))


def test_a_checkpoint_that_would_unpack(tmp_path):
    count = 10**6
    content = zip_with(tensor_pickle(count, (count,), (1,)), zipfile.ZIP_DEFLATED, _0=bytes(4 * count))
    assert len(content) < count / 100
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"w\.pt: refused: it would decompress to more than its size"):
        checkpoint.load_tensors(str(tmp_path / "w.pt"))


# State files


ABSURD_STATES = {
    "files elsewhere": {"files": {"../../x": {"bytes": 1, "sha256": "0"}}},
    "an absolute file": {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}},
    "a file that is not of a checkpoint": {"files": {"progress.csv": {"bytes": 1, "sha256": "0"}}},
    "a file of another checkpoint": {"files": {"model000009.pt": {"bytes": 1, "sha256": "0"}}},
    "no name": {"files": {"": {"bytes": 1, "sha256": "0"}}},
    "a zero byte": {"files": {"model\0.pt": {"bytes": 1, "sha256": "0"}}},
    "an average without a rate": {"files": {"ema_best_000004.pt": {"bytes": 1, "sha256": "0"}}},
    "an average without a length": {"files": {"power_best_000004.pt": {"bytes": 1, "sha256": "0"}}},
    "an average elsewhere": {"files": {"power_0.05/../x_000004.pt": {"bytes": 1, "sha256": "0"}}},
    "infinite size": {"files": {"model000004.pt": {"bytes": float("inf"), "sha256": "0"}}},
    "no checksum": {"files": {"model000004.pt": {"bytes": 1}}},
    "files as a list": {"files": [1]},
    "arguments as text": {"arguments": "--lr 1"},
    "samples as text": {"samples": "many"},
    "classes as a number": {"data": {"class_names": 3}},
    "another step": {"step": 5},
    "a step as text": {"step": "4"},
}


@pytest.mark.parametrize("case", ABSURD_STATES)
def test_absurd_state_files(tmp_path, case):
    """Even with a right checksum, which everybody can compute."""
    run = tmp_path / "a" / "b"
    run.mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"1")
    (run / "progress.csv").write_bytes(b"1")
    saved = save_run(run)
    write_state(saved, **ABSURD_STATES[case])
    with pytest.raises(DamagedCheckpoint, match=r"state000004\.json: damaged"):
        checkpoint.find(saved.path("state"))
    messages = []
    with pytest.raises(ValueError, match="no intact checkpoint"):
        checkpoint.find(str(run), log=messages.append)
    assert "state000004.json" in messages[0]
    save_run(run, 9)
    checkpoint.rotate(str(run), keep_last=1)
    assert (tmp_path / "x").exists() and (run / "progress.csv").exists()
    assert checkpoint.find(str(run), log=messages.append).step == 9


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "", "null", "[]", "1e999", '{"step": 4}', "\0"]
)
def test_state_files_that_are_none(tmp_path, content):
    saved = save_run(tmp_path)
    (tmp_path / "state000004.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"state000004\.json: damaged") as caught:
        checkpoint.find(saved.path("model"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, value", [("image_size", "8"), ("num_channels", [32]), ("learn_sigma", 2), ("dropout", {})]
)
def test_arguments_of_the_wrong_type(tmp_path, name, value, monkeypatch):
    saved = save_run(tmp_path)
    write_state(saved, arguments={**TINY, name: value})
    for script, flag in (("image_sample", "--model_path"), ("image_train", "--resume_checkpoint")):
        message = refusal(monkeypatch, script, flag, tmp_path)
        assert f"its --{name} " in message and "state000004.json" in message


@pytest.mark.parametrize(
    "name, value", [("image_size", 2**20), ("num_channels", 2**20), ("num_res_blocks", 10**9)]
)
def test_stored_arguments_that_would_fill_the_memory(tmp_path, name, value, monkeypatch):
    write_state(save_run(tmp_path), arguments={**TINY, name: value})
    assert f"--{name} {value}" in refusal(monkeypatch, "image_sample", "--model_path", tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"sessions": 3}', '{"sessions": [3, {}]}', "\0"])
def test_other_records_of_a_run_cannot_stop_it(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    runs.record_run(str(tmp_path), TrainConfig(lr=1.0), {}, step=3)
    sessions = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert [session["step"] for session in sessions] == [3]


def test_formulas_in_a_run_stay_text(tmp_path):
    """A spreadsheet would execute what begins with an equals sign."""
    formula = '=HYPERLINK("http://evil")'
    (tmp_path / "progress.csv").write_text(f'step,"{formula.replace(chr(34), chr(34) * 2)}"\n1,2\n')
    (tmp_path / "args.json").write_text(json.dumps({"data_dir": formula}))
    book = load_workbook(export(str(tmp_path)))
    cells = [cell for sheet in book for row in sheet.iter_rows() for cell in row]
    assert formula in [cell.value for cell in cells]
    assert not [cell.coordinate for cell in cells if cell.data_type == "f"]


# Data sets


@pytest.fixture(scope="module")
def cifar10():
    spec = importlib.util.spec_from_file_location("cifar10_script", ROOT / "datasets" / "cifar10.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cifar_members(**changes):
    batch = {"labels": [0, 1], "data": np.zeros((2, 3072), np.uint8)}
    members = {f"data_batch_{i}": batch for i in range(1, 6)} | {"test_batch": batch}
    members["batches.meta"] = {"label_names": list("abcdefghij")}
    return {name: pickle.dumps(value, protocol=2) for name, value in members.items()} | changes


def cifar_archive(path, members, links=()):
    with tarfile.open(path, "w:gz") as archive:
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, str(target)
            archive.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def refused_archive(cifar10, capsys, archive, out) -> str:
    assert cifar10.main(["--archive", str(archive), "--out_dir", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("member", ["data_batch_1", "test_batch", "batches.meta"])
def test_code_in_an_archive_is_not_executed(cifar10, capsys, tmp_path, member, protocol):
    marker = tmp_path / "executed"
    evil = pickle.dumps({"data": Exploit(marker)}, protocol=protocol)
    archive = cifar_archive(tmp_path / "evil.tar.gz", cifar_members(**{member: evil}))
    message = refused_archive(cifar10, capsys, archive, tmp_path / "out")
    assert f"{member} in {archive} is damaged or malicious" in message
    assert not marker.exists()


def pickled_call(module, name, *arguments) -> bytes:
    """A pickle of the call of a function; the arguments are texts and numbers."""
    return f"c{module}\n{name}\n({''.join(arguments)}tR.".encode()


@pytest.mark.parametrize(
    "content",
    [
        pickled_call("_codecs", "encode", "Vx\n", "Vhex\n"),  # can be repeated, and doubles each time
        pickled_call("numpy", "ndarray", "I1000000000\n"),
        pickled_call("builtins", "bytearray", "I1000000000000\n"),
        pickled_call("numpy", "zeros", "I1000000000000\n"),
        b"}r" + struct.pack("<I", 2**28) + b".",  # a place among the remembered objects: gigabytes
        b"}p268435456\n.",
    ],
)
def test_pickles_that_would_fill_the_memory(cifar10, capsys, tmp_path, content):
    archive = cifar_archive(tmp_path / "evil.tar.gz", cifar_members(test_batch=content))
    assert "damaged or malicious" in refused_archive(cifar10, capsys, archive, tmp_path / "out")


def test_members_with_paths_write_nowhere_else(cifar10, tmp_path):
    """The names in an archive are never used as paths: whatever they say, only the two folders are written."""
    place = tmp_path / "place"
    place.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    members = {f"../../outside/{name}": data for name, data in cifar_members().items()}
    members |= {"../../evil": b"x", str(tmp_path / "absolute"): b"x", "cifar_train/../../evil": b"x"}
    links = [("cifar_train", outside), ("cifar-10-batches-py", outside), ("test_batch", "/etc/passwd")]
    archive = cifar_archive(place / "evil.tar.gz", members, links)
    cifar10.prepare(str(archive), str(place / "out"))
    assert sorted(os.listdir(tmp_path)) == ["outside", "place"]
    assert os.listdir(outside) == []
    assert sorted(os.listdir(place)) == ["evil.tar.gz", "out"]
    assert sorted(os.listdir(place / "out")) == ["cifar_test", "cifar_train"]
    assert not any((place / "out" / folder).is_symlink() for folder in ("cifar_test", "cifar_train"))


def test_links_in_place_of_the_batches_are_not_followed(cifar10, capsys, tmp_path):
    members = cifar_members()
    del members["test_batch"]
    (tmp_path / "secret").write_bytes(cifar_members()["test_batch"])
    archive = cifar_archive(tmp_path / "evil.tar.gz", members, [("test_batch", tmp_path / "secret")])
    assert "lacks test_batch" in refused_archive(cifar10, capsys, archive, tmp_path / "out")


BOMBS = {
    "a member": "padding_0 has 20,000,000 bytes",
    "a header": "unpacks to more than 5,000,000 bytes",
    "many members": "unpacks to more than 5,000,000 bytes",
}


@pytest.mark.parametrize("part", BOMBS)
def test_an_archive_that_unpacks_without_end(cifar10, capsys, tmp_path, part, monkeypatch):
    """The official limits, at a hundredth of the size so that the test is quick."""
    monkeypatch.setattr(cifar10, "MAX_ARCHIVE_BYTES", 5_000_000)
    monkeypatch.setattr(cifar10, "MAX_MEMBER_BYTES", 640_000)
    archive = tmp_path / "bomb.tar.gz"
    if part == "a header":  # the name of the next member, which tarfile reads whole
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 20_000_000
        with gzip.open(archive, "wb") as file:
            file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(info.size))
    else:
        sizes = [20_000_000] if part == "a member" else [600_000] * 30
        cifar_archive(archive, {f"padding_{i}": bytes(size) for i, size in enumerate(sizes)})
    assert archive.stat().st_size < 50_000
    assert BOMBS[part] in refused_archive(cifar10, capsys, archive, tmp_path / "out")


def png(width, height, data=b"") -> bytes:
    """An RGB picture in PNG format that claims any size."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (20_000, 10_000)])
def test_a_picture_of_absurd_size_is_skipped_by_name(tmp_path, width, height):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    (tmp_path / "bomb.png").write_bytes(png(width, height, zlib.compress(bytes(1000))))
    for limit in (2.0, 0.0):  # decoded at once, and headers only
        images = read_images(str(tmp_path), 8, cache_limit_gb=limit, progress=False)
        assert images.summary["skipped_names"] == {"too many pixels": ["bomb.png"]}
        assert len(images) == 1


def test_a_picture_of_absurd_shape_is_refused(tmp_path):
    (tmp_path / "long.png").write_bytes(png(10**6, 1, zlib.compress(bytes(3 * 10**6 + 1))))
    with pytest.raises(UnusableImage, match="times as long as wide"):
        read_image(str(tmp_path / "long.png"), 1024)


def npz_with(path, **arrays):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(shape, descr="|u1", data=b"") -> bytes:
    """An array in NumPy's format that claims any shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


def test_objects_in_an_npz_are_not_unpickled(tmp_path):
    marker = tmp_path / "executed"
    np.savez(tmp_path / "evil.npz", arr_0=np.array([Exploit(marker)], dtype=object))
    with pytest.raises(ValueError, match=r"evil\.npz cannot be read"):
        read_images(str(tmp_path / "evil.npz"), 8)
    images = np.zeros((1, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "labels.npz", arr_0=images, arr_1=np.array([Exploit(marker)], dtype=object))
    with pytest.raises(ValueError, match=r"labels\.npz cannot be read"):
        read_images(str(tmp_path / "labels.npz"), 8)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Exploit(marker)))
    with pytest.raises(ValueError, match=r"pickle\.npz cannot be read.*it is no \.npz archive"):
        read_images(str(tmp_path / "pickle.npz"), 8)
    assert not marker.exists()


@pytest.mark.parametrize(
    "shape", [(10**6, 1000, 1000, 3), (2**62, 2**62, 1, 1), (-1, 8, 8, 3), (1, 10**9, 1, 1)]
)
def test_an_npz_that_claims_absurdly_many_images(tmp_path, shape):
    path = npz_with(tmp_path / "bomb.npz", arr_0=npy(shape, data=bytes(100)))
    with pytest.raises(ValueError, match=r"bomb\.npz cannot be read"):
        read_images(str(path), 8)


def test_an_npz_that_unpacks_to_absurdly_many_images(tmp_path):
    """The size that an archive states is as much as its member may unpack to; here it is 4 GB of 1 kB."""
    path = npz_with(tmp_path / "bomb.npz", arr_0=npy((4, 1000, 1000, 1), data=bytes(10**6)))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 4 * 10**9)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bomb\.npz cannot be read.*would unpack to 4,000,000,000"):
        read_images(str(path), 8)


def test_few_bytes_that_would_become_large_pictures(tmp_path):
    np.savez_compressed(tmp_path / "specks.npz", np.zeros((10**7, 1, 1, 3), np.uint8))
    with pytest.raises(ValueError, match=r"10,000,000 images of 1024x1024 pixels take .* GB"):
        read_images(str(tmp_path / "specks.npz"), 1024)
    np.savez_compressed(tmp_path / "long.npz", np.zeros((1, 1, 10**6, 3), np.uint8))
    with pytest.raises(ValueError, match=r"long\.npz.*times as long as wide"):
        read_images(str(tmp_path / "long.npz"), 64)


# Flags


BOUNDED = [name for name, flag in declared(TrainConfig).items() if flag.high is not None]
BOUNDED += ["num_samples", "sample_steps"]


@pytest.mark.parametrize("name", BOUNDED)
def test_absurd_numbers_are_refused_by_name(tmp_path, name, monkeypatch):
    out = tmp_path / "out"
    if name in ("num_samples", "sample_steps"):
        command = ["image_sample", "--model_path", save_run(tmp_path).folder]
    else:
        command = ["image_train", "--data_dir", "builtin", *TINY_FLAGS, "--class_cond", "True"]
    most, known = (declared(SampleConfig) | declared(TrainConfig))[name].high, defaults(TrainConfig)
    for value in (most + 1, 10**30, -(10**30)):
        message = refusal(monkeypatch, *command, "--log_dir", out, f"--{name}", value)
        shown = float(value) if isinstance(known.get(name), float) else value
        assert f"--{name} {shown}" in message
        assert not out.exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"num_channels": 4096, "num_res_blocks": 32}, "this model would have [0-9,]+ parameters"),
        ({"channel_mult": "64,64", "num_channels": 4096}, "this model would have [0-9,]+ parameters"),
        ({"channel_mult": "1,1000000000"}, "--channel_mult"),
        (
            {"channel_mult": ",".join(["1"] * 100_000), "image_size": 1024},
            "--channel_mult: use at most 10 levels",
        ),
        ({"channel_mult": "9" * 5000}, "--channel_mult"),
        (
            {"attention_resolutions": "1024", "image_size": 1024, "channel_mult": "1,1,1,1"},
            "1024x1024 pixels",
        ),
        ({"attention_resolutions": "", "image_size": 1024, "channel_mult": "1"}, "1024x1024 pixels"),
        ({"attention_resolutions": "9" * 5000}, "--attention_resolutions"),
        ({"timestep_respacing": "9" * 5000}, "--timestep_respacing"),
        ({"timestep_respacing": "ddim" + "9" * 5000}, "--timestep_respacing"),
        ({"timestep_respacing": ",".join(["1"] * 100_000)}, "--timestep_respacing"),
    ],
)
def test_absurd_models_are_refused_before_they_are_built(flags, message):
    with pytest.raises(ValueError, match=message):
        create_model_and_diffusion(**{**TINY, **flags})


@pytest.mark.parametrize("script, name", [("image_train", "batch_size"), ("image_sample", "num_samples")])
def test_images_that_do_not_fit_together(tmp_path, script, name, monkeypatch):
    folder = save_run(tmp_path).folder
    flags = {
        "image_train": ["--data_dir", "builtin", "--image_size", 512],
        "image_sample": ["--model_path", folder],
    }
    count = declared(TrainConfig if script == "image_train" else SampleConfig)[name].high
    monkeypatch.setattr("improved_diffusion.script_util.MAX_IMAGES_GB", 0.1)
    message = refusal(monkeypatch, script, *flags[script], f"--{name}", count, "--log_dir", tmp_path / "run")
    assert f"--{name} {count}: this many images" in message


def test_looking_before_building_leaves_the_random_numbers_alone():
    th.manual_seed(3)
    create_model_and_diffusion(**TINY)
    after = th.rand(1)
    th.manual_seed(3)
    script_util.UNetModel(in_channels=3, **script_util._unet_arguments(ModelFlags(**TINY)))
    assert th.equal(after, th.rand(1))


@pytest.mark.parametrize(
    "text", ["0." + "9" * 300, "0_0.5", "../0.5", "0.5/x", "0.5\n0.6", "nan", "\u0660.5"]
)
def test_rates_that_would_be_odd_file_names(text):
    with pytest.raises(ValueError, match="ema_rate"):
        parse_ema_rates(text)


# Files that never begin or never end


@pytest.fixture
def not_for_ever():
    """End a test that waits for something that does not come."""

    def give_up(number, frame):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(os.name != "posix", reason="there are no FIFOs")
@pytest.mark.parametrize("what", ["fifo", "device"])
@pytest.mark.parametrize(
    "script, flag, name",
    [
        ("image_sample", "model_path", "ema_0.9999_000004.pt"),
        ("image_train", "data_dir", "images.npz"),
        ("image_train", "data_dir", "images"),
        ("super_res_sample", "base_samples", "images.npz"),
    ],
)
def test_fifos_and_devices_are_refused(tmp_path, monkeypatch, not_for_ever, what, script, flag, name):
    path = tmp_path / name
    if what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(os.devnull)
    flags = ["--log_dir", tmp_path / "out", *TINY_FLAGS]
    if script == "super_res_sample":
        trained = save_trained(tmp_path / "run", large_size=8, small_size=4)
        flags = ["--log_dir", tmp_path / "out", "--model_path", trained]
    message = refusal(monkeypatch, script, f"--{flag}", path, *flags)
    assert str(path) in message and ("not a file" in message or "neither a folder nor" in message)


@pytest.mark.skipif(os.name != "posix", reason="there are no FIFOs")
def test_a_fifo_in_the_place_of_a_checkpoint_file(tmp_path, not_for_ever):
    older, newer = (save_run(tmp_path, step) for step in (4, 5))
    os.remove(newer.path("state"))
    os.mkfifo(newer.path("state"))
    said = []
    assert checkpoint.find(str(tmp_path), log=said.append).step == older.step
    assert len(said) == 1 and "not a file" in said[0]
