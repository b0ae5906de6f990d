"""What a process needs around a model: a compiler where one is asked for."""

import pytest
import torch
from helpers import tiny

from convnn.errors import ConfigError
from convnn.runtime.device import check_compiler, explain_compilation
from convnn.train.run import run


@pytest.fixture
def no_compiler(monkeypatch):
    from torch._inductor.cpp_builder import cpp_compiler_search

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    cpp_compiler_search.cache_clear()
    yield
    cpp_compiler_search.cache_clear()


@pytest.mark.parametrize("device, language", [("cpu", r"C\+\+"), ("cuda", "C")])
def test_compiling_without_a_compiler(device, language, no_compiler):
    with pytest.raises(
        ConfigError, match=rf"train\.compile=true needs a {language} compiler .* set train\.compile=fal"
    ):
        check_compiler(torch.device(device))


def test_a_run_without_a_compiler_does_not_begin(no_compiler, tmp_path):
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        run(tiny("train.compile=true", f"run.dir={tmp_path}/r"))
    assert not (tmp_path / "r").exists()


def test_a_compiler_that_the_environment_names(monkeypatch, tmp_path, no_compiler):
    (tmp_path / "mycc").touch(mode=0o755)
    monkeypatch.setenv("CC", str(tmp_path / "mycc"))
    check_compiler(torch.device("cuda"))


def test_a_failed_compilation_names_the_key():
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    for error in (TorchDynamoException("no\nmore"), InductorError(RuntimeError("no"), None)):
        with (
            pytest.raises(ConfigError, match=r"train\.compile=true: .*no.* set train\.compile=false") as found,
            explain_compilation(),
        ):
            raise error
        assert "\n" not in str(found.value)
    with pytest.raises(KeyError), explain_compilation():
        raise KeyError
