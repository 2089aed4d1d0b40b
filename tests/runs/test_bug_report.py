"""What a bug report shows of this machine: all that decides a run, and nothing that is secret."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lbaccel import cli
from lbaccel.runs import bug_report as module
from lbaccel.runs.bug_report import NOT_SHOWN, bug_report, safe
from lbaccel.runs.environment import PACKAGES

SECRET = "0123456789abcdef0123456789abcdef01234567"


def reported(capsys):
    assert cli.main(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_holds_versions_processor_torch_and_variables(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = reported(capsys)
    for package in set(PACKAGES) - {"lbaccel"}:
        assert found["packages"].get(package) == (
            metadata.version(package) if package in found["packages"] else None
        )
    assert {"torch", "timm", "accelerate", "wandb", "pyarrow"} <= set(found["packages"])
    assert not {"ruff", "pyright", "mkdocs"} & set(found["packages"])
    assert found["cpu_count"] > 0 and found["memory_gib"] > 0 and found["processor"]
    assert found["python"].endswith(sys.version.split()[0])
    assert found["torch"]["threads"] > 0 and found["torch"]["devices"] == []
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert found["variables"]["CUDA_VISIBLE_DEVICES"] == ""


def test_the_text_is_a_block_of_the_same(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "```")
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "````text" and lines[-1] == "````"  # longer than any fence inside
    rows = dict(line.split(maxsplit=1) for line in lines[1:-1])
    assert rows["packages.torch"] == metadata.version("torch")
    assert rows["variables.OMP_NUM_THREADS"] == "```"
    assert rows["torch.devices"] == "none"


SECRETS = {
    "WANDB_API_KEY": "short",
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "HUGGING_FACE_HUB_TOKEN": "x",
    "WANDB_PASSWORD": "p4ss",
    "WANDB_IDENTITY_TOKEN_FILE": "/run/secrets/w",
    "WANDB_USERNAME": "somebody",
    "WANDB_ENTITY": "somebody",
    "WANDB_NOTES": SECRET,  # not a name of a secret, and looks like one
    "WANDB_BASE_URL": "https://me:p4ss@wandb.example/x",
    "HF_ENDPOINT": "https://hub.example/hf_abcdefghijklmnop",
    "MASTER_ADDR": "10.1.2.3",
}


def test_no_key_no_token_no_password_no_user_is_shown(capsys, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    variables = reported(capsys)["variables"]
    hidden = {name for name, value in variables.items() if value == NOT_SHOWN}
    assert SECRETS.keys() - hidden == {"WANDB_BASE_URL", "HF_ENDPOINT"}
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for value in ("hf_abcdefghijklmnop", "p4ss", "somebody", "10.1.2.3", SECRET, "/run/secrets"):
        assert value not in text and value not in json.dumps(variables)
    assert "WANDB_API_KEY" in text, "that it is set is worth knowing"


def test_the_home_folder_is_shortened_and_a_value_takes_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert safe("HF_HOME", f"{tmp_path}/cache:{tmp_path}/b") == "~/cache:~/b"
    assert safe("OMP_PLACES", "a\n```\x1b[2J") == "a\\n```\\x1b[2J"
    assert len(safe("LD_LIBRARY_PATH", "/a/b:" * 999)) == 300
    assert safe("WANDB_API_KEY", "") == ""


def test_the_users_name_is_in_no_other_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "jdoe"))
    monkeypatch.setenv("USER", "jane.doe")
    assert safe("HF_HOME", "/scratch/jdoe/hf:/mnt/jane.doe") == "/scratch/USER/hf:/mnt/USER"
    assert safe("HF_HOME", "/scratch/jdoes/hf") == "/scratch/jdoes/hf"


def test_variables_of_others_are_left_out(capsys, monkeypatch):
    monkeypatch.setenv("MY_OWN_VARIABLE", "private")
    assert "MY_OWN_VARIABLE" not in reported(capsys)["variables"]


def config(monkeypatch, path):
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(path))


def test_the_launchers_default_config_is_told_by_its_keys(monkeypatch, tmp_path, capsys):
    path = tmp_path / "default_config.yaml"
    config(monkeypatch, path)
    assert reported(capsys)["accelerate_config"] is None
    path.write_text(
        "num_processes: 2\nmain_process_ip: 10.1.2.3\ndeepspeed_config: {zero_stage: 3}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reported(capsys)["accelerate_config"] == {
        "file": "~/default_config.yaml",
        "num_processes": "2",
        "main_process_ip": NOT_SHOWN,
        "deepspeed_config.zero_stage": "3",
    }
    path.write_text("a: [")
    assert "error" in reported(capsys)["accelerate_config"]
    path.write_text("- a")
    assert reported(capsys)["accelerate_config"][""] == "['a']"


def test_a_torch_that_can_not_be_imported_is_a_line_of_the_report(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = bug_report()
    assert "import of torch halted" in found["torch"]["error"]
    assert found["packages"]["torch"] == metadata.version("torch")


def test_versions_are_asked_for_without_an_import():
    code = (
        "import sys; from lbaccel.runs import bug_report as b; b._of_torch = dict; "
        "b._accelerate_config = dict; found = b.bug_report(); "
        "print(found['packages']['torch'], {'torch', 'timm', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [metadata.version("torch"), "set()"]


def test_without_an_installed_package_the_usual_ones_are_named(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "requires", absent)
    assert set(bug_report()["packages"]) <= set(PACKAGES)


@pytest.mark.parametrize("system", ["Linux", "elsewhere"])
def test_a_system_without_proc_has_a_report_too(system, monkeypatch):
    if system != "Linux":
        read = Path.read_text

        def refused(path, *args, **kwargs):
            if str(path).startswith("/proc"):
                raise FileNotFoundError(2, "No such file", str(path))
            return read(path, *args, **kwargs)

        monkeypatch.setattr(Path, "read_text", refused)
    found = bug_report()
    assert found["processor"] and isinstance(found["instructions"], list)
    assert (found["driver"] is None) or system == "Linux"
