"""The benchmark for a GPU, tried on the CPU in small sizes: what it records, and when it stops."""

import json

from benchmarks import gpu


def run(tmp_path, *flags):
    out = tmp_path / "gpu.json"
    results = gpu.main(["--device", "cpu", "--tiny", "--out", str(out), *flags])
    assert json.loads(out.read_text()) == results
    return {section.__name__: results.get(section.__name__) for section in gpu.SECTIONS}


def test_each_section_runs_and_says_what_needs_cuda(tmp_path):
    sections = run(tmp_path)
    assert all(sections.values())
    for figures in (figures for section in sections.values() for figures in section.values()):
        assert "error" not in figures and figures["reason"] == "needs CUDA"
        assert figures.get("launches") is None
    timed = [name for name, section in sections.items() if next(iter(section.values())).get("ms")]
    assert timed == ["steps", "graph", "evaluation", "operations", "final"]
    for figures in sections["graph"].values():  # without a GPU both runs are the same
        assert figures["largest deviation of an alpha"] == 0


def test_a_failure_is_recorded_and_does_not_stop_what_follows(tmp_path, monkeypatch):
    def first(bench):
        yield "bad", lambda: 1 / 0
        yield "good", lambda: {"ms": 1}
        raise KeyError("worse")

    def second(bench):
        yield "last", lambda: {"ms": 2}

    monkeypatch.setattr(gpu, "SECTIONS", (first, second))
    assert run(tmp_path) == {
        "first": {
            "bad": {"error": "ZeroDivisionError: division by zero"},
            "good": {"ms": 1},
            "-": {"error": "KeyError: 'worse'"},
        },
        "second": {"last": {"ms": 2}},
    }


def test_nothing_begins_after_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SECTIONS", (gpu.steps,))
    figures = run(tmp_path, "--seconds", "0")["steps"].values()
    assert figures and all(one == {"reason": "the time was over"} for one in figures)
