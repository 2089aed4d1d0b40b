"""Torch files that claim more than they hold are refused before torch reads them."""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from lbaccel import torch_files
from lbaccel.errors import InputError
from lbaccel.models import read_weights
from lbaccel.runs.checkpoints import read_state
from lbaccel.runs.folder import STATE
from lbaccel.torch_files import check_torch_file


def calls(function: str, argument: bytes) -> bytes:
    """{"a": function(argument)}, in pickle's protocol 2."""
    return b"\x80\x02}X\x01\x00\x00\x00ac" + function.encode() + b"\n" + argument + b"\x85Rs."


EIGHT_GIB = b"\x8a\x05" + (2**33).to_bytes(5, "little")


def forged(path: Path, pickled: bytes, *, method: int = zipfile.ZIP_STORED, more: int = 0) -> Path:
    """A torch file with this pickle in place of its own, and `more` zeros beside it."""
    whole = path.with_name("whole.pth")
    torch.save({"a": torch.zeros(4)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", method) as new:
        for name in old.namelist():
            inside = "/".join(["w", *name.split("/")[1:]])
            new.writestr(inside, pickled if name.endswith("data.pkl") else old.read(name))
        if more:
            new.writestr("w/data/1", bytes(more))
    return path


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("__builtin__\nbytearray", "bytearray"),
        ("builtins\nbytearray", "bytearray"),
        ("torch\nFloatTensor", "FloatTensor"),
        ("torch.sparse\nFloatTensor", "FloatTensor"),
        ("_codecs\nencode", "encode"),
        ("os\nsystem", "os.system"),
    ],
)
def test_a_pickle_that_allocates_by_itself_is_refused_before_torch_reads_it(
    function, named, tmp_path, monkeypatch
):
    path = forged(tmp_path / "w.pth", calls(function, EIGHT_GIB))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch reads it"))
    with pytest.raises(InputError, match=f"calls .*{named}, which a file of weights does not need"):
        read_weights(path)
    (tmp_path / STATE).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=named):
        read_state(tmp_path)


def test_entries_larger_than_the_file_are_refused(tmp_path):
    path = forged(tmp_path / "w.pth", calls("a\nb", b"N"), method=zipfile.ZIP_DEFLATED, more=2**24)
    with pytest.raises(InputError, match=r"entries hold 16,777,\d+ bytes, and the file has"):
        read_weights(path)


def test_a_long_pickle_is_refused(tmp_path, monkeypatch):
    torch.save({f"{n}": torch.zeros(1) for n in range(100)}, tmp_path / "w.pth")
    check_torch_file(tmp_path / "w.pth")
    monkeypatch.setattr(torch_files, "MOST_PICKLE", 1000)
    with pytest.raises(ValueError, match=r"pickle has [\d,]+ bytes; at most 1,000 are read"):
        check_torch_file(tmp_path / "w.pth")


def test_a_storage_larger_than_an_old_file_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(200)}, path, _use_new_zipfile_serialization=False)
    assert read_weights(path)["a"].shape == (200,)
    small, large = b"K\xc8", b"\x8a\x05" + (2**33).to_bytes(5, "little")
    data = path.read_bytes()
    assert small in data
    path.write_bytes(data.replace(small, large, 1))
    with pytest.raises(InputError, match=r"declares a storage of 8,589,934,592 elements"):
        read_weights(path)


def test_a_view_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1).expand(2**20, 2**12)}, path)
    with pytest.raises(InputError, match=r"'a' of shape .* claims 17,179,869,184 bytes.*holds 4 "):
        read_weights(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_and_states_as_they_are_written_are_read(zipped, tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    path = tmp_path / "w.pth"
    torch.save({"model": model.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_weights(path)["0.weight"], model.state_dict()["0.weight"])
    state = {
        "optimizer": optimizer.state_dict(),
        "schedule": scheduler.state_dict(),
        "weights": collections.OrderedDict(a=nn.Parameter(torch.ones(2, dtype=torch.bfloat16))),
        "random": torch.get_rng_state(),
        "size": torch.Size([1, 2]),
        "text": "x",
    }
    torch.save(state, tmp_path / STATE, _use_new_zipfile_serialization=zipped)
    assert read_state(tmp_path)["size"] == (1, 2)


def test_bytes_that_are_no_torch_file_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    for data in (b"", b"PK\x03\x04broken", b"nonsense", pickle.dumps({"a": 1}, protocol=4)):
        path.write_bytes(data)
        with pytest.raises(InputError, match="can't be read as weights"):
            read_weights(path)
