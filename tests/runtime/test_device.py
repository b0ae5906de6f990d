"""What a process needs around a model: its device, and a compiler where one is asked for."""

import resource
from contextlib import nullcontext

import pytest
import timm
import torch
from helpers import tiny
from presets import PRESETS
from torch.utils._python_dispatch import TorchDispatchMode

from convnn import Geometry
from convnn.config.targets import resolve_target
from convnn.errors import ConfigError
from convnn.nn.base import Site
from convnn.ops import precision
from convnn.runtime import distributed
from convnn.runtime.device import (
    check_compiler,
    device_name,
    explain_compilation,
    explain_out_of_memory,
    make_autocast,
    peak_memory,
    pick_device,
)
from convnn.train.evaluate import Meter
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


# ------------------------------------------------------------------------------ Apple's GPUs, of which none is here


@pytest.mark.parametrize(
    "built, lack", [(False, "this torch was built without Apple's Metal"), (True, "this machine has no GPU of Apple's")]
)
def test_mps_where_there_is_none_is_one_line(built, lack, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: built)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"^device=mps: {lack}.*; set device=cpu or auto$") as found:
        pick_device("mps")
    assert "\n" not in str(found.value)


def test_mps_where_there_is_some(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")
    assert pick_device("auto").type != "mps"
    assert make_autocast("auto", torch.device("mps")) is nullcontext and device_name(torch.device("mps")) == "mps"


def test_a_run_on_mps_does_not_begin(tmp_path):
    with pytest.raises(ConfigError, match="device=mps: this "):
        run(tiny("device=mps", f"run.dir={tmp_path}/r"))
    assert not (tmp_path / "r").exists()


def test_several_processes_cannot_share_mps():
    with pytest.raises(ConfigError, match="device=mps serves one process, not 2; set device=cpu"):
        distributed._takes_gpu("mps", distributed.World(size=2))


@pytest.mark.parametrize("kind, text", [("CUDA", None), ("MPS", "MPS backend out of memory (MPS allocated: 9 GB)")])
def test_a_full_gpu_names_a_smaller_batch(kind, text):
    error = torch.OutOfMemoryError("full") if text is None else RuntimeError(text)
    with (
        pytest.raises(ConfigError, match=f"out of {kind} memory; try train.batch_size=32"),
        explain_out_of_memory(64),
    ):
        raise error
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(64):
        raise RuntimeError("another")


def test_memory_is_counted_in_bytes_on_macos_too(monkeypatch):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr("sys.platform", "linux")
    assert peak_memory(torch.device("cpu")) == 1024 * usage.ru_maxrss
    monkeypatch.setattr("sys.platform", "darwin")
    assert peak_memory(torch.device("cpu")) == usage.ru_maxrss


class NoFloat64(TorchDispatchMode):
    """The meta device as one that has no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta" and tensor.dtype == torch.float64:
                raise TypeError(f"float64 by {func}")
        return found


@pytest.mark.parametrize("name", PRESETS)
def test_no_layer_needs_float64_of_its_device(name, monkeypatch):
    config = PRESETS[name]
    conv = config.kind == "conv"
    plain = torch.nn.Conv2d(4, 8, 3, padding=1) if conv else timm.layers.attention.Attention(8, 2, qkv_bias=True)
    build = resolve_target(config.target, "operator.target").from_layer
    layer = build(plain, config, "fresh", Site("layer", 1, (4, 5))).to("meta")
    x = torch.empty((2, 4, 6, 8) if conv else (2, 21, 8), device="meta")
    if any(word in name for word in ("coordinates", "acmix")):
        with pytest.raises(TypeError, match="float64"), NoFloat64():
            layer(x)
    monkeypatch.setattr(precision, "_WITHOUT_FLOAT64", {"meta"})
    with NoFloat64():
        assert layer(x).dtype == torch.float32
        Meter.new(x.device).add(
            torch.empty((), device="meta"), torch.empty(2, 7, device="meta"), torch.empty(2, device="meta")
        )


def test_positions_are_the_same_numbers_where_there_is_no_float64(monkeypatch):
    exact = Geometry(5, 7, prefix=1).positions(torch.device("cpu"))
    monkeypatch.setattr(precision, "_WITHOUT_FLOAT64", {"cpu"})
    rounded = Geometry(5, 7, prefix=1).positions(torch.device("cpu"))
    assert exact.dtype == torch.float64 and torch.equal(exact.float(), rounded)
