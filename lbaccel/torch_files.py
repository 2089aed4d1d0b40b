"""A torch file's pickle, walked before torch reads it: nothing is made that the file does not hold.

torch.load(weights_only=True) executes nothing, and still calls what it trusts with any argument: a
file of 200 bytes that says `bytearray(2**33)` or `torch.FloatTensor(10**10)` takes all memory.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO

MOST_PICKLE = (
    64 * 2**20
)  # bytes: names and shapes, not values; a network of 10,000 tensors has 3 MB
LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of the storages

_WHOLE_ROOMS = ("collections",)
_NAMES = {
    "torch._utils": (
        *("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"),
        *("_rebuild_parameter", "_rebuild_parameter_with_state"),
    ),
    "torch.nn.parameter": ("Parameter",),
    "torch.storage": ("UntypedStorage", "TypedStorage"),
    "torch.serialization": ("_get_layout",),
    "builtins": ("set", "complex"),
    "__builtin__": ("set", "complex"),
}


def check_torch_file(path: Path) -> None:
    """Stop at a torch file that would take more memory than it holds bytes.

    Its zip entries must not be larger together than the file, its pickle has at most 64 MiB, and it
    may call what rebuilds tensors, parameters and plain containers, nothing else.

    Raises:
        OSError: the system refuses.
        ValueError: what is wrong, in words.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch decides
        file.seek(0)
        if zipped:
            for pickled in _pickles(file, size):
                _walk(io.BytesIO(pickled))
        else:
            for _ in range(LEGACY_PICKLES):
                _walk(file, largest=size)


def _pickles(file: IO[bytes], size: int) -> list[bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if (total := sum(entry.file_size for entry in entries)) > size:
                raise ValueError(
                    f"its entries hold {total:,} bytes, and the file has {size:,}: torch writes "
                    "them uncompressed"
                )
            pickles = [e for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
            if (largest := max((e.file_size for e in pickles), default=0)) > MOST_PICKLE:
                raise ValueError(
                    f"its pickle has {largest:,} bytes; at most {MOST_PICKLE:,} are read"
                )
            return [archive.read(entry) for entry in pickles]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"its archive is broken ({error})") from error


def _walk(pickled: IO[bytes], *, largest: int | None = None) -> None:
    """One pickle, opcode by opcode; nothing is called.

    Args:
        pickled: stands behind its end afterwards.
        largest: of a storage, in elements; None where torch compares it with its record.
    """
    last_number: int | None = None
    start = pickled.tell()
    for code, argument, position in pickletools.genops(pickled):
        if position is not None and position - start > MOST_PICKLE:
            raise ValueError(f"its pickle is longer than the {MOST_PICKLE:,} bytes that are read")
        if code.name in ("GLOBAL", "INST"):
            _check_global(*str(argument).split(" ", 1))
        elif code.name == "STACK_GLOBAL":
            raise ValueError("it names a function by text of its own (STACK_GLOBAL)")
        elif isinstance(argument, int) and code.name.startswith(("BININT", "INT", "LONG")):
            if code.name != "LONG_BINPUT":
                last_number = argument
        elif code.name == "BINPERSID" and largest is not None and (last_number or 0) > largest:
            raise ValueError(
                f"it declares a storage of {last_number:,} elements, and the file has "
                f"{largest:,} bytes"
            )


def _check_global(module: str, name: str) -> None:
    known = (
        module in _WHOLE_ROOMS
        or name in _NAMES.get(module, ())
        or (module in ("torch", "torch.cuda") and not name.endswith("Tensor"))
    )
    if not known:
        raise ValueError(f"it calls {module}.{name}, which a file of weights does not need")
