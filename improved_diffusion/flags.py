"""Flags, declared as fields of frozen dataclasses. The parser, --help, the checks and defaults come from them."""

import argparse
import contextlib
import dataclasses
import difflib
import enum
import inspect
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from improved_diffusion.version import __version__


class Role(enum.Enum):
    """Where the value of a flag comes from when a run is resumed or its model is used."""

    ARCHITECTURE = "from the checkpoint, because the weights depend on it"
    PROCESS = (
        "from the checkpoint, unless --allow_changed_flags is given, because what was learned depends on it"
    )
    TRAINING = "as PROCESS in a resumed run; ignored when the model is used"
    FREE = "from the command, or else from the checkpoint"
    SESSION = "from the command only"


@dataclass(frozen=True)
class Declaration:
    """The declaration of a flag, without its name, type and default; see `flag`."""

    help: str
    low: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    check: Callable[[Any], str | None] | None = None
    role: Role = Role.FREE
    per_machine: bool = False

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, as the end of a sentence; None if it is valid."""
        if self.choices and value not in self.choices:
            near = difflib.get_close_matches(str(value), self.choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"use one of {', '.join(choice for choice in self.choices if choice)}{hint}"
        if self.low is not None:
            high = math.inf if self.high is None else self.high
            below = math.inf if self.below is None else self.below
            if not (self.low <= value <= high and value < below):
                limits = f"at least {self.low}"
                limits += f" and at most {self.high}" if self.high is not None else ""
                limits += f" and below {self.below}" if self.below is not None else ""
                return f"must be {limits}"
        return self.check(value) if self.check else None


def flag(default: Any, help: str, **declaration: Any) -> Any:
    """Declare a flag, as a field of a subclass of `Flags`. Its type is bool, int, float or str.

    :param help: the text for --help, which adds choices and default.
    :param declaration: the other fields of `Declaration`. low, high, below: the range of a number; `below` itself is
        excluded. choices: of a text. check: a function that returns what is wrong with a value, or None. role: a
        `Role`. per_machine: whether the processes of one job may have different values.
    """
    return field(default=default, metadata={"flag": Declaration(help, **declaration)})


F = TypeVar("F", bound="Flags")


@dataclass(frozen=True)
class Flags:
    """The values of a command's flags. Subclasses declare fields with `flag`, or combine other subclasses.

    :cvar TITLE: the title in --help for the flags that the class declares itself.
    :cvar FROM_CHECKPOINT: the classes whose flags the command reads from a checkpoint; --help only lists their names.
    :raises ValueError: a value is not allowed; the message names the flag.
    """

    TITLE: ClassVar[str] = ""
    FROM_CHECKPOINT: ClassVar[tuple[type, ...]] = ()

    def __post_init__(self):
        for name, declaration in declared(type(self)).items():
            value = getattr(self, name)
            if problem := declaration.problem(value):
                raise ValueError(f"--{name} {str(value)[:80]}: {problem}")

    def completed(self: F, given: set[str]) -> F:
        """A copy in which the flags that were not `given` have the values that other flags set."""
        return self

    def check(self, given: set[str]) -> None:
        """Check combinations of flags.

        :param given: the names of the flags that the user gave.
        :raises ValueError: two flags contradict each other, or one is missing; the message names them.
        """

    def to_dict(self) -> dict[str, Any]:
        """All values by name, as for `args.json`."""
        return {name: getattr(self, name) for name in declared(type(self))}


def _own(cls: type[Flags]) -> Iterator[tuple[type[Flags], dataclasses.Field]]:
    """The fields of `cls`, each with the class that declares it, in the order of the base classes."""
    present = {item.name: item for item in fields(cls)}
    for base in cls.__mro__:
        for name in inspect.get_annotations(base):
            if name in present:
                yield base, present.pop(name)


def declared(cls: type[Flags]) -> dict[str, Declaration]:
    """The declarations of the flags of `cls`, by name, in the order of --help."""
    return {item.name: item.metadata["flag"] for _, item in _own(cls)}


def defaults(cls: type[Flags]) -> dict[str, Any]:
    """The default of each flag of `cls`, by name."""
    return {item.name: item.default for _, item in _own(cls)}


def names_of(cls: type[Flags], *roles: Role) -> list[str]:
    """The flags of `cls` that have one of `roles`."""
    return [name for name, declaration in declared(cls).items() if declaration.role in roles]


def pick(cls: type[F], values: dict[str, Any]) -> F:
    """An instance of `cls` with those of `values` that are its flags. The other flags have their defaults."""
    known = declared(cls)
    return cls(**{name: value for name, value in values.items() if name in known})


def with_defaults(config: F, given: set[str], others: dict[str, Any]) -> F:
    """A copy of `config` with the values of `others` for flags that were not `given`. Unknown names are ignored."""
    changes = {name: value for name, value in others.items() if name not in given}
    return replace(config, **{name: changes[name] for name in declared(type(config)) if name in changes})


def named(error: Exception, flags: dict[str, str]) -> ValueError:
    """Turn a function's error about its arguments into one about the flags that the values came from.

    :param error: its message begins with the arguments and their values, such as "mean 1, std 0: ...".
    :param flags: the flag of each argument, by the argument's name.
    """
    start, colon, rest = str(error).partition(":")
    if colon:
        names = "|".join(map(re.escape, flags))
        start = re.sub(rf"(^|, )({names})(?=[ ,]|$)", lambda match: f"{match[1]}--{flags[match[2]]}", start)
        # In the rest, only names that are no words of a sentence.
        names = "|".join(re.escape(name) for name in flags if "_" in name)
        if names:
            rest = re.sub(rf"(?<![\w-])({names})(?!\w)", lambda match: f"--{flags[match[1]]}", rest)
    return ValueError(start + colon + rest)


@contextlib.contextmanager
def errors_about(flag_name: str) -> Iterator[None]:
    """A block whose ValueErrors have messages that begin with the flag's value. The flag's name is put before them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag_name} {error}") from None


READ = "read from the checkpoint"
READ_NOTE = (
    "These flags describe the model. Give them only for a file of weights without a state file beside it, such as "
    "those of improved-diffusion; image_train.py --help explains them. "
)
_METAVARS = {bool: "True|False", int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """The command line of a script.

    Errors are one line. `@args.txt` reads flags from a file.

    :param config: the class of the flags.
    :param description: what the script does, for --help.
    :param examples: commands, for the end of --help.
    :param operand: a name such as "RUN" for words that are not flags; if empty, such words are errors.
    :ivar operands: these words, after `parse_flags`.
    """

    def __init__(
        self, config: type[Flags], description: str, examples: Sequence[str] = (), operand: str = ""
    ):
        lines = "".join(f"\n  {line}" for line in examples)
        more = "@FILE reads flags from a text file, such as @args.txt."
        super().__init__(
            usage=f"%(prog)s {f'{operand} ... ' if operand else ''}[--FLAG VALUE ...] [@FILE ...]",
            description=description,
            epilog=(f"examples:{lines}\n\n" if lines else "") + more,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=_Formatter,
            fromfile_prefix_chars="@",
        )
        self.config = config
        self.operand = operand
        self.operands: list[str] = []
        self._types = {item.name: item.type for _, item in _own(config)}
        self.add_argument(
            "--version",
            action="version",
            version=f"improved_diffusion {__version__}",
            help="show the version and exit",
        )
        if operand:
            self.add_argument("operands", nargs="*", metavar=operand, help="directories, any number of them")
        groups: dict[str, Any] = {}
        read = [item.name for base, item in _own(config) if base in config.FROM_CHECKPOINT]
        for base, item in _own(config):
            title, note = base.TITLE or "flags", None
            text = _explain(item.metadata["flag"], item.default).replace("%", "%%")
            if item.name in read:
                title, note, text = (
                    READ,
                    READ_NOTE + " ".join(f"--{name}" for name in read),
                    argparse.SUPPRESS,
                )
            if title not in groups:
                groups[title] = self.add_argument_group(title, note)
            metavar = "NAME" if item.metadata["flag"].choices else _METAVARS[item.type]
            groups[title].add_argument(f"--{item.name}", metavar=metavar, help=text)

    def parse_flags(self, argv: list[str] | None = None) -> tuple[Any, set[str]]:
        """Parse and check `argv`, by default the command line. An error ends the process with exit code 2.

        :return: the flags, an instance of `config`, and the names of the flags that were given.
        """
        values, unknown = self.parse_known_args(argv)
        self.operands = vars(values).pop("operands", [])
        if self.operand:  # argparse leaves those that stand behind flags
            self.operands += [text for text in unknown if not text.startswith("--")]
            unknown = [text for text in unknown if text.startswith("--")]
        if unknown:
            self.error(self._describe_unknown(unknown[0]))
        try:
            given = {name: _convert(name, self._types[name], text) for name, text in vars(values).items()}
            config = self.config(**given).completed(set(given))
            config.check(set(given))
        except ValueError as error:
            self.error(str(error))
        return config, set(given)

    def _describe_unknown(self, text: str) -> str:
        if not text.startswith("--"):
            return f"unexpected {text!r}: flags are written --NAME VALUE"
        name = text[2:].split("=")[0]
        near = difflib.get_close_matches(name, self._types, 1)
        # A long name that was cut short is not a close match, but meant all the same.
        near = near or [known for known in self._types if name and known.startswith(name)]
        return f"--{name}: there is no such flag" + (f"; did you mean --{near[0]}?" if near else "")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """Split a line of a file into any number of flags, without its comment."""
        try:
            return shlex.split(line, comments=True, posix=os.name != "nt")
        except ValueError as error:
            self.error(f"{line.strip()}: {error}")

    def error(self, message: str):
        message = one_line(message.removeprefix("argument "))
        # What argparse says of a file @FILE that cannot be read is for programmers.
        message = re.sub(r"^\[Errno \d+\] ([^:]+): '(.*)'$", r"@\2: \1", message)
        self.exit(2, f"{self.prog}: error: {message}; --help explains every flag\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the lines of the description, but not the examples."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        if "\n  " not in text:
            fill = partial(argparse.HelpFormatter._fill_text, self)
        return "\n\n".join(fill(part, width, indent) for part in text.split("\n\n"))


def _explain(declaration: Declaration, default: Any) -> str:
    choices = f"one of {', '.join(filter(None, declaration.choices))}" if declaration.choices else ""
    known = "" if default == "" else f"default: {default}"
    remarks = "; ".join(filter(None, (choices, known)))
    return declaration.help + (f" ({remarks})" if remarks else "")


def _convert(name: str, kind: type, text: str) -> Any:
    try:
        if kind is bool:
            return str2bool(text)
        return kind(text)
    except (ValueError, argparse.ArgumentTypeError):
        expected = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"--{name} {text:.80}: expected {expected}") from None


def str2bool(text: str | bool) -> bool:
    """A Boolean from a text such as "true", "yes" or "0". :raises argparse.ArgumentTypeError: it is none."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("yes", "true", "t", "y", "1", "on"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def one_line(message: str) -> str:
    """`message` without line ends and other control characters, which file names may contain."""
    return re.sub(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]\s*", " ", message)
