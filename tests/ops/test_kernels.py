"""Which backend computes; the checks of the Triton kernels themselves (kernel_checks.py) in a process of their own."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY
from torch.utils.flop_counter import FlopCounterMode

from convnn import ConfigError, ConvNN2d, ConvNNAttention
from convnn.config.compose import compose_config
from convnn.config.identity import fingerprint
from convnn.ops.triton import dispatch as backend
from convnn.train.run import run

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()
no_gpu = pytest.mark.skipif(GPU, reason="is about machines without a GPU")


CHECKS = {"kernel_checks.py": 50, "kernel_graph_checks.py": 15}
"""Files of tests/support, and how many checks each has at least."""


def run_checks(name, **variables):
    command = [sys.executable, "-m", "pytest", "-n0", "-m", "", "--tb=short", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | variables
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "support" / name)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= CHECKS[name] and "skipped" not in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_in_tritons_interpreter(name):
    pytest.importorskip("triton")
    # It is chosen before triton is imported, and would change triton for every other test of a process.
    run_checks(name, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_on_the_gpu(name):
    run_checks(name)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability, dtype, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from convnn.ops.triton import bucket_kernel, kernels, score_kernel, select_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    flags = dict.fromkeys(["BIASED", "LISTED", "RANGED", "MIXED", "EUCLIDEAN", "COSINE", "WIDEN"], False)
    plain = {"BQ": 32, "BM": 64, "BD": 32, "BK": 16, "SELF": 0, "DOUBTED": False} | flags
    attend = {"BQ": 32, "BD": 64, "BC": 64, "MASKED": True, "WEIGHED": True, "TEMPERED": True}
    atomic = {"BK": 16, "ORDERED": False}
    wide = {"BQ": 2, "BD": 1024, "BC": 1024, "BK": 64} | dict.fromkeys(["MASKED", "WEIGHED", "TEMPERED"], False)
    sorts = flags | {"BQ": 64, "BM": 64, "BD": 64, "NB": 64, "ONE": True, "LIST": 32, "EVEN": False, "SELF": 1}
    sorts |= {"PTX": dtype != "fp32", "COSINE": True}
    buckets = flags | {"BQ": 64, "BM": 32, "BD": 64, "ONE": True, "EVEN": True, "BITS": 5, "SELF": 1, "COSINE": True}
    by_features = {"bias", "tokens", "share", "floor", "row_steps", "column_steps", "low", "high"}
    blended = dict.fromkeys(["BIASED", "LISTED", "RANGED", "MIXED"], True) | {"ONE": False, "COSINE": False, "SELF": 0}
    edges, sums = {"weighs_of", "score_grads"}, {"dk", "dv", "dw"}
    tokens = {"BE": 16, "BD": 64, "BC": 64, "WEIGHED": True}
    near = {"tokens", "doubt"}
    far = {"inverse_q", "inverse_k", "bias", "row_steps", "column_steps"} | near
    both = dict.fromkeys(["COSINE", "LISTED", "RANGED", "MIXED", "DOUBTED"], True) | {"SELF": 1}
    cases = [
        (kernels.topk_kernel, plain, far),
        (kernels.topk_kernel, plain | both, ()),
        (kernels.topk_kernel, plain | dict.fromkeys(["BIASED", "RANGED", "MIXED", "EUCLIDEAN"], True), near),
        (select_kernel.select_kernel, sorts, by_features),
        (select_kernel.select_kernel, sorts | blended | {"BM": 32, "NB": 32, "PTX": False}, {"inverse_k"}),
        (bucket_kernel.bucket_kernel, buckets, by_features),
        (bucket_kernel.bucket_kernel, buckets | blended | {"EVEN": False}, {"inverse_k"}),
        (score_kernel.inverse_norm_kernel, {"BR": 32, "BD": 128}, ()),
        (kernels.attend_kernel, attend, ()),
        (kernels.attend_backward_kernel, attend | atomic, edges),
        (kernels.attend_backward_kernel, attend | atomic | {"ORDERED": True}, sums),
        (kernels.attend_backward_kernel, wide | {"ORDERED": False}, {"valid", "weight", "temperature", "dw"} | edges),
        (kernels.attend_tokens_kernel, tokens, ()),
        (kernels.attend_tokens_kernel, {"BE": 4, "BD": 1024, "BC": 1024, "WEIGHED": False}, {"weight"}),
        (kernels.attend_weight_kernel, {"BQ": 32, "BC": 64}, ()),
    ]
    pointers = {"index": "*i64", "own": "*i64", "tokens": "*i64", "valid": "*u8", "scale": "fp32", "alike": "fp32"}
    pointers |= dict.fromkeys(["q", "k", "v", "y", "dy"], f"*{dtype}")
    pointers |= {"edges": "*i64", "start": "*i64", "held": "*i64", "counts": "*i32", "doubt": "*i32", "x": f"*{dtype}"}
    floats = "inverse_q inverse_k bias share floor row_steps column_steps low high weight lse dq dk dv dw"
    floats += " inverse weighs_of score_grads temperature"
    pointers |= dict.fromkeys(floats.split(), "*fp32")
    for kernel, constants, absent in cases:
        constants = constants | dict.fromkeys(absent)
        signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
        places = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
        built = compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", capability, 32))
        assert len(built.asm["cubin"]) > 1000


@no_gpu
@pytest.mark.parametrize("kind", ["conv", "attention"])
def test_the_layers_ask_for_what_is_missing(kind, monkeypatch):
    layer, x = ConvNN2d(3, 4, 5, backend="triton"), torch.randn(1, 3, 4, 5)
    if kind == "attention":  # whose selection by position has no kernel, and whose softmax has
        layer, x = ConvNNAttention(8, 2, 5, blend=0.0, backend="triton"), torch.randn(1, 16, 8)
    if backend._installed():
        with pytest.raises(ConfigError, match=r"operator\.backend=triton: triton needs a CUDA device, not cpu"):
            layer(x)
    monkeypatch.setattr(backend, "_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"operator\.backend=triton: triton is not installed; install it"):
        layer(x)
    layer.backend = "torch"
    layer(x)


@no_gpu
def test_a_run_that_demands_kernels_fails_before_it_trains(tmp_path):
    config = compose_config([*TINY, "operator.backend=triton", f"run.dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"operator\.backend=triton: .*set operator\.backend=auto"):
        run(config)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_settings_without_a_kernel_are_refused_when_composed():
    refused = {
        "operator.candidates=window": "candidates=window is not served; use all, random or grid",
        "operator.k=65": "k=65 exceeds 64",
    }
    for override, message in refused.items():
        with pytest.raises(ConfigError, match=rf"operator\.backend=triton: operator\.{message}; or set operator\.back"):
            compose_config(["operator.backend=triton", override])
    softmax = {"operator.similarity=euclidean": "similarity=euclidean", "operator.straight_through=true": "straight"}
    for override, message in softmax.items():
        with pytest.raises(ConfigError, match=message):
            compose_config(["operator.backend=triton", "operator=convnn_attention", override])
        compose_config(["operator.backend=triton", "operator=convnn", override])  # mixes without softmax
    compose_config(["operator.backend=triton", "operator=neighborhood", "operator.candidates=window"])  # by position
    with pytest.raises(ConfigError, match="did you mean 'triton'"):
        compose_config(["operator.backend=tritn"])


def test_the_backend_is_no_part_of_what_a_run_is():
    assert fingerprint(compose_config(["operator.backend=torch"])) == fingerprint(compose_config([]))


def two_layers():
    torch.manual_seed(0)
    layers = [ConvNN2d(3, 4, 5, backend=name) for name in ("torch", "triton")]
    layers[1].load_state_dict(layers[0].state_dict())
    return layers, torch.randn(1, 3, 4, 5)


def test_operations_are_counted_on_the_plain_path():
    layers, x = two_layers()
    flops = []
    for layer in layers:
        with FlopCounterMode(display=False) as counter:
            layer(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    attention = ConvNNAttention(8, 2, 5, backend="triton")  # whose softmax has a kernel
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(1, 9, 8))
    assert counter.get_total_flops() > 0


def test_an_exported_graph_is_of_the_plain_path(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    layers, x = two_layers()
    assert torch.equal(layers[1](x), layers[0](x))


def test_auto_lets_kernels_be_measured_on_cuda_only(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert backend.engaged("auto", cuda) and not backend.engaged("auto", cpu) and not backend.engaged("torch", cuda)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:  # what computes must not depend on a measurement then
        assert not backend.engaged("auto", cuda) and backend.engaged("triton", cuda)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(backend, "_installed", lambda: True)
    assert backend.use_kernel("auto", cuda, None) and not backend.use_kernel("auto", cuda, "some reason")
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert not backend.use_kernel("auto", cuda, None)


def test_triton_is_imported_only_when_a_kernel_runs():
    for path in (ROOT / "convnn").rglob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {a.name for node in top for a in node.names} | {getattr(node, "module", None) for node in top}
        if path.name != "kernels.py" and not path.name.endswith("_kernel.py"):
            kernels = {name for name in names if f"{name}".startswith("convnn.ops.triton") and "kernel" in f"{name}"}
            assert not kernels and "triton" not in names, path.name


@pytest.mark.slow
def test_everything_works_without_triton():
    code = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else found(name, *rest)
import torch
from convnn import ConfigError, ConvNN2d, ConvNNAttention
ConvNN2d(3, 4, 5)(torch.randn(1, 3, 4, 5)).sum().backward()
ConvNNAttention(8, 2, 5)(torch.randn(1, 16, 8)).sum().backward()
try:
    ConvNN2d(3, 4, 5, backend="triton")(torch.randn(1, 3, 4, 5))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "triton is not installed" in done.stdout, done.stderr
