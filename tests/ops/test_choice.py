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


def test_times_of_kernels_that_have_changed_since_are_of_others(monkeypatch):
    file = choice.cache_file("Some GPU / 80GB")
    assert choice.cache_file("Some GPU / 80GB") == file and choice.cache_file("Another") != file
    monkeypatch.setattr(choice, "_kernels", lambda: "changed")
    assert choice.cache_file("Some GPU / 80GB").name.endswith("-kernels-changed.json") and "changed" not in file.name


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


def picked(x, names=("torch", "a"), **rough):
    """Return the way that ``pick`` takes of ways with these names."""
    return choice.pick("mixing", x, "kind", {"k": 3}, {"items": x.shape[0]} | rough, ways(*names))


def test_a_graph_looks_up_what_was_measured_for_it(times, monkeypatch):
    times |= {"torch": 3.0, "a": 1.0, "b": 2.0}
    monkeypatch.setattr(choice, "measures", lambda device: not torch.compiler.is_compiling())
    monkeypatch.setattr(choice, "as_in_graphs", lambda way: way)

    def step(x):
        return x + {"b": 20, "torch": 1, "a": 10}[picked(x, ("b", "torch", "a"))]

    def compiled(count, **options):
        torch.compiler.reset()
        return torch.compile(step, backend="eager", fullgraph=True, **options)(torch.zeros(count))[0]

    assert compiled(4) == 20 and times["ran"] == []  # nothing is known: the first
    assert choice.choices() == {"mixing kind compiled k=3 items=4 float32": {"way": "b", "ms": {}}}
    assert picked(torch.zeros(4), ("torch", "a", "b")) == "a"
    assert compiled(4) == 20  # what was measured outside of graphs is no answer
    with choice.for_graphs():
        assert picked(torch.zeros(4), ("torch", "a", "b")) == "a"
    assert len(times["ran"]) == 6
    assert compiled(4) == compiled(3) == 10 and compiled(9) == 20  # the same power of two, and another
    assert compiled(4, dynamic=True) == 20  # whose sizes are not known
    assert len(times["ran"]) == 6 and "mixing kind k=3 items=4 float32" in choice.choices()


def test_compiling_for_graphs_has_an_end(times, monkeypatch):
    times |= {"torch": 3.0, "a": 1.0}
    monkeypatch.setattr(choice, "measures", lambda device: True)
    monkeypatch.setattr(choice, "GRAPH_SECONDS", -1.0)
    with choice.for_graphs():
        assert picked(torch.zeros(4)) == "torch" and times["ran"] == []
    assert picked(torch.zeros(4)) == "a"


def test_plain_torch_is_compiled_for_graphs_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda way, **options: calls.append(options) or "compiled")
    assert choice.as_in_graphs("way") == "way"
    with choice.for_graphs():
        assert choice.as_in_graphs("way") == "compiled"
    assert calls == [{"fullgraph": True, "dynamic": False}] and not choice.measures_for_graphs()


def test_a_group_chooses_by_the_table_of_one(times, monkeypatch):
    times |= {"torch": 3.0, "a": 1.0}
    monkeypatch.setattr(choice, "measures", lambda device: True)
    assert picked(torch.zeros(4)) == "a"
    (case,) = choice.table()
    choice.adopt({case: {"torch": 1.0, "a": 2.0}})
    assert picked(torch.zeros(4)) == "torch" and len(times["ran"]) == 2
