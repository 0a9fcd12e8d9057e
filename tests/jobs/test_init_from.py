"""Starting from the weights of another model: what is taken, what begins anew, and what does not fit."""

import html
import json
import re
import shutil

import numpy as np
import pytest
import torch as th
from conftest import ROOT, TINY, TINY_FLAGS, read_json, save_trained
from openpyxl import load_workbook
from PIL import Image

from improved_diffusion.config import SuperResTrainConfig, TrainConfig
from improved_diffusion.convert.folder import write_folder
from improved_diffusion.convert.models import export_model
from improved_diffusion.convert.publish import publish
from improved_diffusion.flags import pick
from improved_diffusion.jobs import runs
from improved_diffusion.jobs.runs import Weights, read_weights
from improved_diffusion.jobs.start import load_start, merge_for_start
from improved_diffusion.run import checkpoint
from improved_diffusion.script_util import create_from_flags

# A learning rate of 0 leaves the weights as they were at the start.
ONE_STEP = ["--total_steps", 1, "--lr", 0, "--batch_size", 2, "--sample_interval", 0, "--precision", "fp32"]


@pytest.fixture
def start(call_script):
    """Run image_train.py for one step on the built-in shapes, from another model."""

    def run(source, log_dir, *flags, check=0, script="image_train.py"):
        command = [script, "--data_dir", "builtin", "--init_from", source, *ONE_STEP, "--log_dir", log_dir]
        return call_script(*command, *flags, check=check)

    return run


def assert_one_line(done, *texts):
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for text in texts:
        assert re.search(text, done.stderr), done.stderr


def weights_of(run, kind="model"):
    return checkpoint.find(str(run)).load(kind)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(th.equal(value, theirs[name].float()) for name, value in ours.items())


def make_source(kind, folder):
    """A model in one of the forms that can be started from; returns its place, its weights and flags to give."""
    run = save_trained(folder / "run", num_heads=2)
    weights, flags = weights_of(run), []
    if kind == "file":
        return run / "model000004.pt", weights, flags
    if kind == "published":
        publish(str(run), "0.99", str(folder / "published"))
        return folder / "published", {name: value.half() for name, value in weights.items()}, flags
    if kind == "openai":
        shutil.copy(run / "model000004.pt", folder / "cifar10_uncond_50M_500K.pt")
        flags = [*TINY_FLAGS, "--num_heads", 2, "--diffusion_steps", 20]
        return folder / "cifar10_uncond_50M_500K.pt", weights, flags
    if kind == "diffusers":
        pytest.importorskip("safetensors")
        run = save_trained(folder / "plain", diffusion_steps=1000)
        trained = runs.load_trained(str(run), TrainConfig(), set())
        write_folder(str(folder / "diffusers"), export_model(trained.model, trained.config.to_dict()))
        return folder / "diffusers", trained.model.state_dict(), flags
    return run, weights, flags


@pytest.mark.parametrize("kind", ["run", "file", "published", "openai", "diffusers"])
def test_a_run_starts_from_the_weights_of_another_model(tmp_path, start, kind):
    source, weights, flags = make_source(kind, tmp_path)
    done = start(source, tmp_path / "new", *flags)
    assert checkpoint.steps(str(tmp_path / "new")) == [1]
    assert_equal(weights_of(tmp_path / "new"), weights)
    assert_equal(weights_of(tmp_path / "new", "0.9999"), weights)
    arguments = read_json(tmp_path / "new" / "args.json")
    assert {name: arguments[name] for name in TINY if name != "channel_mult"} == {
        name: value for name, value in TINY.items() if name != "channel_mult"
    }
    assert arguments["init_from"] == str(source) and arguments["lr"] == 0
    origin = read_json(tmp_path / "new" / "run.json")["origin"]
    assert origin["path"].startswith(str(source)) and origin["taken"].startswith("weights")
    assert "optimizer" in origin["anew"]
    for text in (
        f"starts from: {origin['path']}",
        f"taken: {origin['taken']}",
        f"begins anew: {origin['anew']}",
    ):
        assert text in done.stdout and text in (tmp_path / "new" / "log.txt").read_text()
    overview = [
        cell for row in load_workbook(tmp_path / "new" / "results.xlsx")["Run"].values for cell in row
    ]
    assert origin["path"] in overview and origin["anew"] in overview
    page = html.unescape((tmp_path / "new" / "index.html").read_text())
    assert f"<dt>Starts from</dt><dd>{origin['path']}</dd>" in page and f"<dd>{origin['anew']}</dd>" in page


def test_the_model_that_comes_with_the_code_has_a_name(tmp_path, start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start("cifar10", tmp_path / "new", "--batch_size", 1)
    assert_equal(weights_of(tmp_path / "new"), weights_of(ROOT / "models" / "cifar10", "0.9999"))
    assert read_json(tmp_path / "new" / "args.json")["init_from"] == "cifar10"
    assert runs.find_model("models/cifar10") == "cifar10"
    (tmp_path / "cifar10").mkdir()
    assert runs.find_model("cifar10") == str(tmp_path / "cifar10"), "what lies here comes first"
    assert_one_line(
        start("cifar", tmp_path / "x", check=2), "--init_from .*cifar: there is no such", "cifar10"
    )


def test_the_optimizer_is_new(tmp_path, start):
    start(save_trained(tmp_path / "run"), tmp_path / "new", "--lr", "1e-3")
    state = weights_of(tmp_path / "new", "opt")["state"]
    assert {float(entry["step"]) for entry in state.values()} == {1.0}
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "new")
    assert any(not th.equal(before[name], after[name]) for name in before)


def test_the_same_command_continues_the_run_without_its_source(tmp_path, start, call_script):
    run, new = save_trained(tmp_path / "run"), tmp_path / "new"
    start(run, new)
    origin = read_json(new / "run.json")["origin"]
    shutil.rmtree(run)
    done = start(run, new, "--total_steps", 2, "--lr", "1e-3")
    assert "resumed step 1" in done.stdout and "starts from" not in done.stdout
    assert checkpoint.steps(str(new)) == [1, 2] and read_json(new / "run.json")["origin"] == origin
    done = start(tmp_path / "other", new, "--total_steps", 3, check=2)
    assert_one_line(done, "--init_from .*other: the run to resume was started with .*run'")
    call_script("image_train.py", "--log_dir", new, "--total_steps", 3, check=0)
    assert read_json(new / "args.json")["init_from"] == str(run)
    assert read_json(new / "run.json")["origin"] == origin
    # A run that began from nothing does not silently go on without the weights that were asked for.
    other = save_trained(tmp_path / "trained", init_from="")
    assert_one_line(start(new, other, check=2), "--init_from .*started without it")


def test_an_unfinished_run_that_took_flags_is_found(tmp_path):
    flags = {"data_dir": "builtin", "init_from": "cifar10", "total_steps": 9}
    config = TrainConfig(**flags)
    (tmp_path / "runs").mkdir()
    run = save_trained(tmp_path / "runs" / "one")
    (run / "args.json").write_text(json.dumps(TrainConfig(**flags, num_channels=32).to_dict()))
    assert runs.find_unfinished(config, str(tmp_path / "runs"), set(flags)) == (str(run), 4)
    assert runs.find_unfinished(config, str(tmp_path / "runs"), {*flags, "num_channels"}) is None


def weights(class_names=(), **flags):
    """A model with random weights, as one reads it from a run."""
    config = pick(TrainConfig, {**TINY, "diffusion_steps": 20, **flags})
    th.manual_seed(1)
    model, _ = create_from_flags(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model.eval(), Weights("there", model.state_dict(), config.to_dict(), list(class_names), 3, 24)


def started(source, class_names=(), **flags):
    """The model of a run that starts from `source`, and what is said about it."""
    config = merge_for_start(TrainConfig(**flags), set(flags), source)
    if config.class_cond and not config.num_classes:
        config = merge_for_start(
            TrainConfig(**flags, num_classes=len(class_names)), {*flags, "num_classes"}, source
        )
    model, _ = create_from_flags(config)
    return model.eval(), load_start(model, source, config, class_names)


def output(model, y=None, size=8):
    x = th.randn(2, 3, size, size, generator=th.Generator().manual_seed(3))
    with th.no_grad():
        return model(x, th.tensor([3, 700]), y=None if y is None else th.tensor(y))


def test_new_classes_begin_as_the_model_without_classes():
    theirs, source = weights()
    ours, said = started(source, ("a", "b", "c"), class_cond=True, class_dropout=0.1)
    assert ours.num_classes == 4 and "3 of 3 classes" in said["anew"] and "classes" not in said["taken"]
    for y in ([0, 1], [2, 3]):
        assert th.allclose(output(ours, y), output(theirs), atol=1e-6)


def test_classes_of_the_same_name_are_taken():
    theirs, source = weights(("cat", "dog", "ship"), class_cond=True, num_classes=3)
    ours, said = started(source, ("bird", "ship", "cat"))
    assert "2 of 3 classes" in said["taken"] and "1 of 3 classes" in said["anew"]
    rows = theirs.label_emb.weight
    assert th.equal(ours.label_emb.weight[1:], rows[[2, 0]])
    assert th.allclose(ours.label_emb.weight[0], rows.mean(0))
    same, said = started(source, ("cat", "dog", "ship"))
    assert th.equal(same.label_emb.weight, rows) and "classes" not in said["anew"]


@pytest.mark.parametrize(("count", "taken"), [(3, True), (2, False)])
def test_without_names_the_number_of_classes_decides(count, taken):
    theirs, source = weights(class_cond=True, num_classes=3)
    ours, said = started(source, tuple("abcde")[:count])
    rows = theirs.label_emb.weight
    expected = rows if taken else rows.mean(0).expand(count, -1)
    assert th.allclose(ours.label_emb.weight, expected) and ("classes" in said["taken"]) is taken


def test_a_model_that_knows_no_class_begins_as_its_source_without_one():
    theirs, source = weights(class_cond=True, num_classes=3, class_dropout=0.2)
    ours, said = started(source, class_cond=False)
    assert ours.num_classes is None and "no classes (before: 3)" in said["anew"]
    assert th.allclose(output(ours), output(theirs, [3, 3]), atol=1e-5)
    kept, _ = started(source, ("a", "b"))  # the label for "no class" stays the last one
    assert th.allclose(output(kept, [2, 2]), output(theirs, [3, 3]), atol=1e-6)


@pytest.mark.parametrize(
    ("before", "size", "levels"),
    [
        ({}, 16, ("1,2", "8")),
        ({"image_size": 32, "channel_mult": "", "attention_resolutions": "16,8"}, 64, ("1,2,2,2", "32,16")),
        ({"image_size": 32, "channel_mult": "1,1", "attention_resolutions": ""}, 16, ("1,1", "")),
        (
            {"image_size": 16, "patch_size": 2, "channel_mult": "1,1", "attention_resolutions": "4"},
            32,
            ("1,1", "8"),
        ),
    ],
)
def test_another_image_size_keeps_the_levels(before, size, levels):
    theirs, source = weights(**before)
    ours, said = started(source, image_size=size)
    config = merge_for_start(TrainConfig(image_size=size), {"image_size"}, source)
    assert (config.channel_mult, config.attention_resolutions) == levels
    assert th.equal(output(ours, size=size), output(theirs, size=size))
    assert f"--image_size {size} (before: {source.arguments['image_size']})" in said["anew"]


def test_a_size_that_the_levels_do_not_divide_is_refused(tmp_path, start):
    done = start(save_trained(tmp_path / "run"), tmp_path / "new", "--image_size", 9, check=2)
    assert_one_line(done, "--image_size 9: .* multiple of 2")
    assert not (tmp_path / "new").exists()


def test_a_model_of_another_shape_is_named_by_its_flags(tmp_path, start):
    flags = [
        "--num_channels",
        64,
        "--learn_sigma",
        "True",
        "--attention_resolutions",
        8,
        "--num_res_blocks",
        1,
    ]
    done = start(save_trained(tmp_path / "run"), tmp_path / "new", *flags, check=2)
    assert_one_line(
        done,
        r"--init_from .*is a model of another shape than .*--num_channels 64 \(it has 32\)",
        r"--attention_resolutions 8 \(it has 4\), --learn_sigma True \(it has False\); leave these flags out",
    )
    assert "num_res_blocks" not in done.stderr and not (tmp_path / "new").exists()


def test_weights_without_arguments_name_the_flags_they_need(tmp_path, start):
    run = save_trained(tmp_path / "run", use_scale_shift_norm=False, learn_sigma=True)
    shutil.copy(run / "model000004.pt", tmp_path / "bare.pt")
    done = start(tmp_path / "bare.pt", tmp_path / "new", check=2)
    assert_one_line(
        done, "need --num_channels 32 --num_res_blocks 1 --learn_sigma True --use_scale_shift_norm False"
    )
    assert "--channel_mult 1,2" in done.stderr and "patch_size" not in done.stderr
    flags = [*TINY_FLAGS, "--learn_sigma", "True", "--use_scale_shift_norm", "False"]
    assert "no arguments are stored with it" in start(tmp_path / "bare.pt", tmp_path / "new", *flags).stdout


def test_another_diffusion_is_allowed_and_said():
    _, source = weights()
    flags = {"prediction": "v", "dropout": 0.1}
    config = merge_for_start(TrainConfig(**flags), set(flags), source)
    assert (config.prediction, config.diffusion_steps, config.dropout) == ("v", 20, 0.1)
    _, said = started(source, **flags)
    assert "--prediction v (before: epsilon)" in said["anew"] and "--diffusion_steps 20" in said["taken"]


def test_the_model_decides_what_a_recipe_would_set():
    flags = {"recipe": "cifar10"}
    config = TrainConfig(**flags).completed(set(flags))
    assert (config.prediction, config.class_cond, config.lr) == ("v", True, 1.6e-3)
    merged = merge_for_start(config, set(flags), weights()[1])
    assert (merged.prediction, merged.class_cond, merged.class_dropout) == ("epsilon", False, 0.0)
    assert merged.guidance_scale == 1
    assert (merged.lr, merged.batch_size) == (config.lr, config.batch_size)
    merged = merge_for_start(config, {*flags, "class_cond"}, weights()[1])
    assert merged.class_cond and merged.class_dropout == config.class_dropout > 0


@pytest.mark.parametrize("command", ["file", "folder", "any name"])
def test_resuming_a_run_of_improved_diffusion_points_here(tmp_path, call_script, start, command):
    run, upstream = save_trained(tmp_path / "run"), tmp_path / "upstream"
    upstream.mkdir()
    for name, target in (("model000004.pt",) * 2, ("ema_0.99_000004.pt",) * 2, ("opt000004.pt",) * 2):
        shutil.copy(run / name, upstream / target)
    shutil.copy(run / "model000004.pt", tmp_path / "cifar10.pt")
    asked, named = {
        "file": (upstream / "model000004.pt", upstream / "model000004.pt"),
        "folder": (upstream, upstream / "ema_0.99_000004.pt"),
        "any name": (tmp_path / "cifar10.pt", tmp_path / "cifar10.pt"),
    }[command]
    flags = ["--log_dir", tmp_path / "new", "--data_dir", "builtin", *TINY_FLAGS]
    done = call_script("image_train.py", "--resume_checkpoint", asked, *flags)
    assert_one_line(
        done, f"--resume_checkpoint .*: --init_from {re.escape(str(named))} starts from them", "step 0"
    )
    start(named, tmp_path / "new", *TINY_FLAGS)


def test_a_damaged_checkpoint_is_not_taken_for_one_of_improved_diffusion(tmp_path, call_script):
    run = save_trained(tmp_path / "run")
    (run / "model000004.pt").write_bytes(b"damaged")
    done = call_script("image_train.py", "--resume_checkpoint", run, "--log_dir", tmp_path / "new")
    assert_one_line(done, "no intact checkpoint")
    assert "--init_from" not in done.stderr


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, start):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not a model")
    (tmp_path / "noise.pt").write_bytes(b"not a model either")
    th.save({"fc.weight": th.zeros(3, 4)}, tmp_path / "foreign.pt")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "picture.png")
    plain = save_trained(tmp_path / "plain")
    classes = save_trained(tmp_path / "classes", class_cond=True, num_classes=3)
    large = save_trained(tmp_path / "large", large_size=8, small_size=4)
    for source, flags, message in (
        (tmp_path / "absent", [], "--init_from .*absent: there is no such file"),
        (tmp_path / "empty", [], "empty: holds no complete checkpoint"),
        (tmp_path / "notes.txt", [], "--init_from .*notes.txt: is a text file"),
        (tmp_path / "noise.pt", [], "noise.pt"),
        (tmp_path / "foreign.pt", [], "--init_from .*foreign.pt: its weights do not fit"),
        (plain / "opt000004.pt", [], "--init_from .*opt000004.pt: holds no weights"),
        (
            plain,
            ["--resume_checkpoint", plain],
            "--init_from .*contradict|--init_from .*leave one of them out",
        ),
        (plain, ["--class_dropout", "0.1"], "--class_dropout 0.1: needs --class_cond True"),
        (
            classes,
            ["--data_dir", tmp_path / "pictures"],
            "--class_cond True: .*--class_cond False trains without",
        ),
        (classes, ["--num_classes", 2], "--num_classes 2: the data have 10 classes"),
        (large, [], "is a super-resolution model"),
    ):
        assert_one_line(start(source, tmp_path / "new", *flags, check=2), message)
        assert not (tmp_path / "new").exists(), message


def test_a_super_resolution_model_starts_from_one(tmp_path, start):
    source = save_trained(tmp_path / "run", large_size=8, small_size=4)
    start(source, tmp_path / "new", "--small_size", 2, script="super_res_train.py")
    assert_equal(weights_of(tmp_path / "new"), weights_of(source))
    config = merge_for_start(SuperResTrainConfig(), set(), read_weights(str(source), SuperResTrainConfig()))
    assert (config.large_size, config.small_size) == (8, 4)


def test_a_model_can_be_drawn_from_where_diffusers_saved_it(tmp_path, call_script):
    source, _, _ = make_source("diffusers", tmp_path)
    for place in (source, tmp_path / "plain"):
        flags = [
            "--num_samples",
            2,
            "--sample_steps",
            2,
            "--precision",
            "fp32",
            "--log_dir",
            tmp_path / place.name / "d",
        ]
        call_script("image_sample.py", "--model_path", place, *flags, check=0)
    drawn = [
        np.load(tmp_path / name / "d" / "samples_2x8x8x3.npz")["arr_0"] for name in ("diffusers", "plain")
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1
