"""The public names: shown by `dir`, importable, explained, and in the API reference."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lbaccel

REFERENCE = Path(__file__).parent.parent / "docs/reference"


def test_dir_shows_the_public_names_before_any_of_them_is_used_and_imports_none():
    code = (
        "import sys, lbaccel; print(sorted(set(lbaccel.__all__) - set(dir(lbaccel)))); "
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[]", "False"]


def test_dir_keeps_what_a_module_has_anyway():
    assert {"__doc__", "__name__", "__version__"} <= set(dir(lbaccel))


@pytest.mark.parametrize("name", lbaccel.__all__)
def test_a_public_name_resolves_and_has_a_docstring_of_its_own(name):
    found = getattr(lbaccel, name)
    assert found.__name__ == name
    doc = found.__doc__ or ""
    assert doc.strip()
    assert not doc.startswith(f"{name}(")  # what a dataclass has without one: its signature


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'lbaccel' has no attribute 'big_batch'"):
        lbaccel.big_batch  # noqa: B018


def test_the_reference_has_each_public_name_once_and_no_other():
    pages = [path for path in REFERENCE.glob("*.md") if path.name != "index.md"]
    listed = [
        name
        for path in pages
        for name in re.findall(r"^::: lbaccel\.(\w+)$", path.read_text(), re.MULTILINE)
    ]
    assert sorted(listed) == sorted(lbaccel.__all__)


def test_the_reference_s_index_links_each_public_name_to_its_page():
    links = re.findall(
        r"\[`(\w+)`\]\((\w+\.md)#lbaccel\.(\w+)\)", (REFERENCE / "index.md").read_text()
    )
    assert sorted(name for name, _, _ in links) == sorted(lbaccel.__all__)
    for name, page, anchor in links:
        assert name == anchor
        assert f"::: lbaccel.{name}\n" in (REFERENCE / page).read_text()
