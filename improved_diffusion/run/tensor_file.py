"""Reading the files of `torch.save` safely: nothing in them is executed or decompressed."""

import io
import pickle
import pickletools
import zipfile
from typing import Any, BinaryIO

import torch as th

ZIP = b"PK\x03\x04"
LEGACY_PICKLES = 5  # in a file of torch before 1.6: magic number, version, system, content, storage keys

STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# What state dicts consist of. torch's own list for `weights_only` is longer. It has functions with which a file of a
# few hundred bytes can fill any memory.
ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in STORAGES),
}
# Pickle instructions that call functions and that torch neither writes nor reads.
OTHER_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


class RefusedContent(ValueError):
    """The file would execute code or fill the memory; the message says how."""


def parse_tensors(content: bytes) -> dict[str, Any]:
    """The dictionary that `torch.save` turned into `content`: nested, with tensors, numbers and texts.

    The tensors are on the CPU. Their memory is at most a small multiple of the size of `content`.

    :raises RefusedContent: `content` holds anything else.
    :raises ValueError: `content` is damaged; the message says how.
    """
    try:
        if content.startswith(ZIP):
            _check_zip(content)
        else:
            if not content.startswith(pickle.PROTO):
                raise ValueError("neither an archive nor a pickle")
            stream = io.BytesIO(content)
            for _ in range(LEGACY_PICKLES):
                _check_pickle(stream)
        tensors = th.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except RefusedContent:
        raise
    except Exception as error:  # torch and zipfile raise almost anything for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"not a readable checkpoint, truncated or damaged ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise RefusedContent(f"holds a {type(tensors).__name__}, not a dictionary of tensors by name")
    _check_tensors(tensors, len(content))
    return tensors


def _check_zip(content: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        # torch does not compress, so a compressed member is not torch's work.
        if sum(member.file_size for member in members) > len(content):
            raise RefusedContent("it would decompress to more than its size")
        for member in members:
            if member.filename.endswith(".pkl"):
                _check_pickle(io.BytesIO(archive.read(member)))


def _check_pickle(stream: BinaryIO) -> None:
    """Read a pickle up to its end, without executing it, and check what it would call."""
    for opcode, argument, _ in pickletools.genops(stream):
        if (opcode.name == "GLOBAL" and argument not in ALLOWED) or opcode.name in OTHER_CALLS:
            name = argument.replace(" ", ".") if isinstance(argument, str) else "something to call"
            raise RefusedContent(f"it refers to {name!r}, which is more than tensors (it could execute code)")


def _check_tensors(content: dict, size: int) -> None:
    """Refuse tensors, at any depth of `content`, that are larger than the file of `size` bytes."""
    seen: set[int] = set()
    to_visit: list[Any] = [content]
    while to_visit:
        item = to_visit.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            to_visit += item.values()
        elif isinstance(item, list | tuple):
            to_visit += item
        elif isinstance(item, th.Tensor) and item.numel() * item.element_size() > size:
            raise RefusedContent(f"a tensor of shape {list(item.shape)} is larger than the file")
