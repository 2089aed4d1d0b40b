"""YAML and JSON from outside: read within bounds, refused with the figures, never expanded."""

from __future__ import annotations

import pytest

from lbaccel.cli import main
from lbaccel.configs.launcher import read_yaml
from lbaccel.configs.resolve import read_json
from lbaccel.documents import (
    MOST_DEPTH,
    MOST_VALUES,
    MOST_YAML_BYTES,
    Malformed,
    OutOfBounds,
    json_of,
    yaml_in,
    yaml_of,
)
from lbaccel.documents import json_in as json_of_file
from lbaccel.errors import InputError, brief
from lbaccel.noise.auto_batch import read_decisions
from lbaccel.planning.cost.devices import read_calibration
from lbaccel.runs.read import read_mapping, read_metrics


def bomb(levels: int = 9, width: int = 10) -> str:
    """`width ** levels` values in less than 1 kB."""
    lines = ["a0: &a0 [x]"]
    for level in range(1, levels + 1):
        aliases = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    return "\n".join(lines)


CHAIN = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 200))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(), ["too large", f"more than {MOST_VALUES:,} values"]),
        ("epochs: " + "[" * 5000 + "]" * 5000, ["too deep", "100 levels"]),
        ("epochs: " + "[" * 150 + "]" * 150, ["too deep", "100 levels"]),
        (CHAIN, ["too deep", "100 levels"]),
        ("a: &a {b: *a}", ["holds itself"]),
        (f"a: &a {'x' * 500_000}\nb: [{', '.join(['*a'] * 50)}]", ["too large"]),
        ("seed: " + "1" * 1001, ["a number of 1,001 digits", "1,000 digits"]),
        ("seed: 0x" + "f" * 100_000, ["a number of"]),
        ("#" * (MOST_YAML_BYTES + 1), [f"more than {MOST_YAML_BYTES:,} bytes"]),
    ],
    ids=["aliases", "nested", "levels", "chain", "itself", "text", "digits", "hex", "bytes"],
)
def test_a_yaml_without_bounds_is_refused_with_the_figures(text, words, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    for read in (yaml_in, read_yaml, read_mapping):
        with pytest.raises(OutOfBounds) as caught:
            read(path)
        said = str(caught.value)
        assert all(word in said for word in [str(path), *words])
        assert len(said) < 400


@pytest.mark.parametrize(
    "text", ["1" * 5000, "2026-13-45", "!!bool maybe", "!!timestamp x", "a: [", "a\0"]
)
def test_a_yaml_that_the_constructor_trips_over_is_malformed(text):
    with pytest.raises((Malformed, OutOfBounds)):
        yaml_of(text, "c.yaml")


def test_within_the_bounds_aliases_merges_and_depth_are_read():
    assert yaml_of("a: &a [1, 2]\nb: [*a, *a]", "c.yaml")["b"] == [[1, 2], [1, 2]]
    assert yaml_of("a: &a {x: 1}\nb: {<<: *a, y: 2}", "c.yaml")["b"] == {"x": 1, "y": 2}
    deep = MOST_DEPTH
    assert yaml_of("[" * deep + "]" * deep, "c.yaml")
    assert json_of("[" * deep + "]" * deep, "c.json")
    assert yaml_of("", "c.yaml") is None
    assert len(yaml_of(f"[{', '.join(['1'] * 20_000)}]", "c.yaml")) == 20_000


@pytest.mark.parametrize("depth", [150, 100_000])
def test_a_deep_json_is_refused_by_every_reader(depth, tmp_path):
    path = tmp_path / "c.json"
    path.write_text("[" * depth + "]" * depth + "\n")
    for read in (json_of_file, read_json, read_mapping, read_calibration, read_metrics):
        with pytest.raises(InputError, match=r"too deep|can't be read: .*too deep"):
            read(path)
    with pytest.raises(InputError, match=r"--batch-decisions .*too deep"):
        read_decisions(path, first=8)


@pytest.mark.parametrize(
    "arguments",
    [["train", "--config"], ["replicate"], ["configs", "validate"], ["doctor", "--config"]],
    ids=lambda a: " ".join(a),
)
def test_a_bomb_ends_every_command_with_one_short_sentence(arguments, tmp_path, capfd):
    path = tmp_path / "bomb.yaml"
    path.write_text(bomb())
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main([*arguments, str(path)]))
    said = capfd.readouterr().err
    assert end.value.code == 2
    assert "bomb.yaml is too large: more than 100,000 values" in said
    assert len(said) < 2000


def test_a_printed_value_is_short_whatever_it_holds():
    value: object = "x" * 10_000
    for _ in range(40):
        value = [value] * 1000  # written out, 10^124 characters
    assert len(brief(value)) <= 200
    assert len(brief({"k" * 999: value})) <= 200
    assert len(brief(10**50_000)) <= 200
    assert brief("linaer") == "'linaer'"


def test_a_long_value_is_cut_in_the_sentences_about_settings(tmp_path):
    path = tmp_path / "c.yaml"
    for text in (f"epochs: {'x' * 9999}", f"{'k' * 999}: 1", f"epochs: [{'1, ' * 9999}2]"):
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            from lbaccel.recipe.settings import read_settings

            read_settings(["--config", str(path)])
        assert len(str(caught.value)) < 600
