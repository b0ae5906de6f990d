"""Ways of a step are timed where a case first appears; what won is remembered."""

import json
import logging

import pytest
import torch

from convnn.ops import choice

CUDA = torch.device("cuda")


@pytest.fixture
def times(monkeypatch, tmp_path):
    """Return the milliseconds that ways take, as if there were a GPU; ways that ran are in ``times["ran"]``."""
    table = {"ran": []}

    def measured(way):
        name = way()
        table["ran"].append(name)
        if isinstance(table[name], Exception):
            raise table[name]
        return table[name]

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "milliseconds", measured)
    monkeypatch.setattr(choice, "device_name", lambda device: "Some GPU / 80GB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    forget(monkeypatch)
    return table


def forget(monkeypatch):
    """Begin a process anew."""
    monkeypatch.setattr(choice, "_times", {})
    monkeypatch.setattr(choice, "_used", {})
    monkeypatch.setattr(choice, "_answers", {})
    choice._load.cache_clear()


def case(items=256, k=9, dtype=torch.float32, device=CUDA):
    return choice.Case("selection", device, dtype, choice.sized({"k": k}, items=items), "cosine")


def ways(*names):
    return {name: lambda name=name: name for name in names}


def test_the_fastest_way_is_taken_and_measured_once(times, monkeypatch):
    times |= {"torch": 3.0, "a": 1.0, "b": 2.0}
    assert choice.fastest(case(), ways("torch", "a", "b")) == "a"
    assert sorted(times["ran"]) == ["a", "b", "torch"]
    times["a"] = 9.0  # what was measured stands
    assert choice.fastest(case(), ways("torch", "a", "b")) == "a"
    assert choice.fastest(case(items=200), ways("torch", "a", "b")) == "a"  # the same power of two
    assert choice.fastest(case(), ways("torch", "b")) == "b"  # where one cannot serve
    assert len(times["ran"]) == 3
    assert choice.fastest(case(k=10), ways("torch", "a", "b")) == "b"
    assert choice.fastest(case(dtype=torch.bfloat16), ways("torch", "a", "b")) == "b"
    assert len(times["ran"]) == 9
    assert choice.choices()["selection cosine k=9 items=256 float32"] == {
        "way": "b",
        "ms": {"torch": 3, "a": 1, "b": 2},
    }


def test_the_next_process_reads_what_was_measured(times, monkeypatch, tmp_path):
    times |= {"torch": 3.0, "a": 1.0, "b": 0.5}
    choice.fastest(case(), ways("torch", "a"))
    (file,) = tmp_path.glob("convnn/*.json")
    assert file.name.startswith("Some-GPU-80GB-torch-") and torch.__version__.split("+")[0] in file.name
    forget(monkeypatch)
    assert choice.choices() == {}
    assert choice.fastest(case(), ways("torch", "a")) == "a" and len(times["ran"]) == 2
    assert choice.fastest(case(), ways("torch", "a", "b")) == "b"  # a new way is timed, the others are not again
    assert times["ran"][2:] == ["b"]
    forget(monkeypatch)
    choice.fastest(case(k=4), ways("torch", "a"))
    assert len(json.loads(file.read_text())) == 2 and list(tmp_path.glob("convnn/*")) == [file]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 3}', '{"x": {"a": "fast"}}'])
def test_a_damaged_file_is_measured_anew(text, times, tmp_path):
    times |= {"torch": 3.0, "a": 1.0}
    file = choice.cache_file("Some GPU / 80GB")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert choice.fastest(case(), ways("torch", "a")) == "a"
    assert json.loads(file.read_text())[str(case())] == {"torch": 3, "a": 1}


def test_no_place_for_the_file_costs_only_the_memory(times, tmp_path):
    times |= {"torch": 3.0, "a": 1.0}
    (tmp_path / "convnn").write_text("a file")
    assert choice.fastest(case(), ways("torch", "a")) == "a"
    assert (tmp_path / "convnn").read_text() == "a file"


def test_a_way_that_fails_is_left_out(times, caplog, tmp_path):
    times |= {"torch": 3.0, "a": RuntimeError("out of resource: shared memory\nmore"), "b": 2.0}
    with caplog.at_level(logging.WARNING, "convnn"):
        assert choice.fastest(case(), ways("torch", "a", "b")) == "b"
        assert choice.fastest(case(), ways("torch", "a", "b")) == "b"
    assert [r.getMessage() for r in caplog.records] == [
        "selection cosine k=9 items=256 float32: one way fails here and is left out: out of resource: shared memory"
    ]
    (file,) = tmp_path.glob("convnn/*.json")
    assert json.loads(file.read_text())[str(case())] == {"torch": 3, "b": 2}  # the next process tries it again
    times["torch"] = RuntimeError("none")
    assert choice.fastest(case(k=2), ways("torch", "a")) == "torch"


def test_where_nothing_is_measured_the_first_way_is_taken(times):
    both = ways("torch", "a")
    assert choice.fastest(case(device=torch.device("cpu")), both) == "torch"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert choice.fastest(case(), both) == "torch"
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.fastest(case(), ways("a")) == "a"
    assert times["ran"] == [] and choice.choices() == {}


def test_nothing_is_measured_while_a_graph_is_captured(times, monkeypatch):
    times |= {"torch": 3.0, "a": 1.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice.fastest(case(), ways("torch", "a")) == "torch" and times["ran"] == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choice.fastest(case(), ways("torch", "a")) == "a"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice.fastest(case(), ways("torch", "a")) == "a"  # what is known is used
