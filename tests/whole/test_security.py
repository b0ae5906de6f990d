"""Nothing that a file holds is executed, and nothing secret is written."""

import ast
import os
from pathlib import Path

import pytest
import torch
from helpers import tiny

from convnn.config.compose import CONF_DIR
from convnn.train.restore import evaluate_run
from convnn.train.run import run

ROOT = CONF_DIR.parent
SOURCES = [*ROOT.glob("*.py"), *sorted((ROOT / "convnn").rglob("*.py")), *(ROOT / "scripts").glob("*.py")]
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.unsafe_load", "yaml.full_load", "os.system",
    "os.popen", "eval", "exec", "marshal.loads", "joblib.load", "dill.load", "dill.loads", "torch.jit.load",
    "tempfile.mktemp",
}  # fmt: skip


def unsafe_calls(source):
    """Return the calls of a source text that execute what a file or a text says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = name in FORBIDDEN
        unsafe |= name == "torch.load" and given.get("weights_only") != "True"
        loaders = {n.id if isinstance(n, ast.Name) else getattr(n, "attr", "") for n in ast.walk(node)}
        unsafe |= name == "yaml.load" and {n for n in loaders if n.endswith("Loader")} != {"SafeLoader"}
        unsafe |= given.get("shell") == "True" or given.get("allow_pickle") == "True"
        if unsafe:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_executes_what_it_reads(path):
    assert unsafe_calls(path.read_text()) == []


def test_the_search_finds_what_it_seeks():
    for line in (
        "pickle.loads(x)", "torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(f, yaml.Loader)", "eval(x)",
        "yaml.load(f)",
        "subprocess.run(c, shell=True)", "np.load(p, allow_pickle=True)",
    ):  # fmt: skip
        assert len(unsafe_calls(line)) == 1, line
    assert unsafe_calls("torch.load(p, weights_only=True)\nyaml.safe_load(f)\nmodel.eval()") == []


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


def test_evaluation_does_not_open_files_that_a_configuration_names(tmp_path):
    """timm would unpickle ``backbone.kwargs.checkpoint_path``; the run's checkpoint has all weights."""
    config = tiny("swap.last=1", "train.epochs=1", f"run.dir={tmp_path}/r")
    run(config)
    torch.save({"state_dict": Hostile(tmp_path / "mark")}, tmp_path / "hostile.pth")
    config.backbone.kwargs["checkpoint_path"] = str(tmp_path / "hostile.pth")
    assert evaluate_run(config, tmp_path / "r", "last")["images"] == 16
    assert not (tmp_path / "mark").exists()


def test_no_secret_reaches_the_run_folder(tmp_path, monkeypatch):
    secrets = {"WANDB_API_KEY": "k3y" * 14, "HF_TOKEN": "hf_s3cr3t", "USER": "us3rname", "LOGNAME": "us3rname"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run(tiny("swap.last=1", "train.epochs=1", f"run.dir={tmp_path}/r"))
    files = [p for p in (tmp_path / "r").rglob("*") if p.is_file()]
    assert {"config.yaml", "env.json", "train.log", "result.json", "last.pt"} <= {p.name for p in files}
    for path in files:
        assert not any(value.encode() in path.read_bytes() for value in secrets.values()), path


def test_yaml_of_a_run_folder_builds_no_objects(tmp_path):
    from convnn.config.load import load_config
    from convnn.errors import ConfigError

    (tmp_path / "config.yaml").write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path}/mark']\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        load_config(tmp_path)
    assert not Path(tmp_path / "mark").exists()
