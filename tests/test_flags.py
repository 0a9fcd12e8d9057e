"""Flags as a user meets them: declared once, told apart from defaults, checked without torch, explained in --help."""

import importlib.util
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass

import pytest
from conftest import SCRIPTS

from improved_diffusion.config import MODEL_CLASSES, SampleConfig, TrainConfig
from improved_diffusion.flags import (
    Flags,
    Parser,
    Role,
    declared,
    defaults,
    errors_about,
    flag,
    named,
    names_of,
    with_defaults,
)


@dataclass(frozen=True)
class Pace(Flags):
    lr: float = flag(1e-4, "how fast it learns", low=0)
    batch_size: int = flag(8, "images", low=1, high=100)
    flip: bool = flag(False, "mirror", role=Role.TRAINING)


@dataclass(frozen=True)
class Example(Pace):
    way: str = flag("", "which way", choices=("", "left", "right"), role=Role.ARCHITECTURE)
    batch_size: int = flag(4, "pictures", low=1, high=100)


def parse(*argv):
    return Parser(Example, "test").parse_flags(list(argv))


def test_given_flags_are_told_apart_from_defaults():
    config, given = parse("--lr", "1e-4", "--flip", "yes", "--batch_size=7")
    assert config == Example(lr=1e-4, batch_size=7, flip=True) and given == {"lr", "flip", "batch_size"}
    assert config.to_dict() == {"way": "", "batch_size": 7, "lr": 1e-4, "flip": True}
    with pytest.raises(FrozenInstanceError):
        config.lr = 1.0


def test_a_subclass_redeclares_a_flag():
    assert defaults(Example)["batch_size"] == 4 and declared(Example)["batch_size"].help == "pictures"
    assert names_of(Example, Role.TRAINING, Role.ARCHITECTURE) == ["way", "flip"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lr", "abc"], "--lr abc: expected a number"),
        (["--lr", "nan"], "--lr nan: must be at least 0"),
        (["--lr", "inf"], "--lr inf: must be at least 0"),
        (["--batch_size", "1.5"], "--batch_size 1.5: expected a whole number"),
        (["--batch_size", "101"], "--batch_size 101: must be at least 1 and at most 100"),
        (["--batch_size"], "--batch_size: expected one argument"),
        (["--flip", "maybe"], "--flip maybe: expected True or False"),
        (["--way", "lefft"], "--way lefft: use one of left, right; did you mean left?"),
        (["--unknown", "1"], "--unknown: there is no such flag;"),
        (["--bach_size", "1"], "--bach_size: there is no such flag; did you mean --batch_size?"),
        (["--batch", "4"], "--batch: there is no such flag; did you mean --batch_size?"),
        (["-lr", "4"], "unexpected '-lr'"),
        (["left"], "unexpected 'left'"),
        (["@absent.txt"], "absent.txt"),
    ],
)
def test_a_mistake_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_flags_from_a_file(tmp_path, capsys):
    path = tmp_path / "args.txt"
    path.write_text("--lr 0.5 --flip True  # both\n\n# nothing here\n--way 'left'\n", encoding="utf-8")
    assert parse(f"@{path}", "--lr", "0.25") == (
        Example(lr=0.25, flip=True, way="left"),
        {"lr", "flip", "way"},
    )
    path.write_text("--way 'left\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(f"@{path}")
    assert capsys.readouterr().err.count("\n") == 1


def test_other_defaults_under_what_was_given():
    config = Example(lr=0.5)
    assert with_defaults(config, {"lr"}, {"lr": 1.0, "flip": True, "unknown": 3}) == Example(
        lr=0.5, flip=True
    )
    with pytest.raises(ValueError, match="--batch_size 0: must be at least 1"):
        with_defaults(config, set(), {"batch_size": 0})


def test_an_error_about_an_argument_names_the_flag():
    assert (
        str(named(ValueError("steps 3: too few"), {"steps": "sample_steps"})) == "--sample_steps 3: too few"
    )
    two = named(ValueError("mean 1, std 0: no steps"), {"mean": "sigma_mean", "std": "sigma_std", "no": "x"})
    assert str(two) == "--sigma_mean 1, --sigma_std 0: no steps"
    assert str(named(ValueError("steps 3: too few"), {"step": "x"})) == "steps 3: too few"
    assert str(named(ValueError("steps 3"), {"steps": "x"})) == "steps 3"
    # A name within a value is no name.
    path = named(ValueError("features /steps/my steps/x, steps 3: clash"), {"steps": "x", "features": "f"})
    assert str(path) == "--f /steps/my steps/x, --x 3: clash"


def test_errors_about_a_flag_name_it():
    with pytest.raises(ValueError, match="^--steps 3: too few$"), errors_about("steps"):
        raise ValueError("3: too few")
    with pytest.raises(OSError, match="^full$"), errors_about("steps"):
        raise OSError("full")


PROGRAMS = sorted(
    path.stem for path in SCRIPTS.glob("*.py") if "create_parser" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_script_explains_its_flags(name, capsys):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser = module.create_parser()
    assert all(len(flag.help) > 8 for flag in declared(parser.config).values())
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and f"python scripts/{name}.py" in text
    assert len(text[: text.index("\n\n")].splitlines()) <= 2, "the usage is short"
    assert all(f"--{flag}" in text for flag in declared(parser.config))
    assert "(default: )" not in text and "--version" in text and "@FILE" in text


def test_what_people_set_first_comes_first(capsys):
    Parser(TrainConfig, "").print_help()
    text = capsys.readouterr().out
    first = [
        "--data_dir",
        "--log_dir",
        "--total_steps",
        "--batch_size",
        "--lr",
        "--image_size",
        "--num_channels",
    ]
    places = [text.index(f"  {name} ") for name in first]
    assert places == sorted(places)


def test_no_class_of_a_model_is_missing_among_those_read_from_checkpoints():
    read = {name for cls in MODEL_CLASSES for name in declared(cls)}
    roles = names_of(SampleConfig, Role.ARCHITECTURE, Role.PROCESS)
    assert set(roles) <= read


@pytest.mark.parametrize("name", PROGRAMS)
def test_flags_are_checked_before_torch_is_loaded(name):
    code = f"""
import runpy, sys
sys.argv = [{name!r}, "--no_such_flag", "1"]
try:
    runpy.run_path({str(SCRIPTS / f"{name}.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 2
heavy = {{"torch", "numpy", "PIL", "blobfile"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_operands_may_stand_anywhere(capsys):
    parser = Parser(Example, "test", operand="RUN")
    assert parser.parse_flags(["a", "b", "--lr", "0.5", "c"]) == (Example(lr=0.5), {"lr"})
    assert parser.operands == ["a", "b", "c"]
    parser.parse_flags(["--lr", "0.5", "a"])
    assert parser.operands == ["a"]
    parser.parse_flags([])
    assert parser.operands == []
    with pytest.raises(SystemExit):
        parser.parse_flags(["a", "--lrs", "0.5"])
    assert "--lrs: there is no such flag; did you mean --lr?" in capsys.readouterr().err
