"""The comparison's records, its summary, and that the page in the docs is the one they make."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir() or not (ROOT / "docs").is_dir():
    pytest.skip("benchmarks and docs are not here", allow_module_level=True)


@pytest.fixture(scope="module")
def modules():
    path = list(sys.path)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "robustness")]
    try:
        yield {name: importlib.import_module(name) for name in ("results_page", "_report", "_data")}
    finally:
        sys.path[:] = path


def record(data, method, seed, exact, certified=50.0):
    setting = {"data": data, "method": method, "seed": seed, "epsilon": 0.1, "n_train": 100}
    setting["betas"] = [0.01, 0.1]
    columns = dict.fromkeys(("clean", "attacked", "lp", "undecided"), 60.0)
    costs = {"neurons": 8, "seconds": 1.0, "seconds_tuned": 5.0}
    return {"setting": setting, **columns, "exact": exact, "certified": certified, **costs}


@pytest.mark.slow
def test_page_and_pictures_are_what_the_records_make(modules, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "theory"))
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--docs", str(tmp_path)])
    modules["results_page"].main()
    text = (tmp_path / "results.rst").read_text()
    assert text == (ROOT / "docs" / "results.rst").read_text(), "run: make results"
    lines = [line for line in text.splitlines() if line.startswith(".. image::")]
    pictures = {line.split("::")[1].strip() for line in lines}
    made = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")}
    assert pictures == made
    assert all((ROOT / "docs" / picture).exists() for picture in pictures)


def test_the_critical_difference_is_that_of_the_tables(modules):
    # q of 5 methods at 5 % is 2.728 (Demsar, 2006), for 30 data sets.
    found = modules["_report"].critical_difference(np.zeros((30, 5)))
    assert found == pytest.approx(2.728 * np.sqrt(5 * 6 / (6 * 30)), rel=1e-3)


def test_wins_ties_and_goals_are_counted(modules):
    report = modules["_report"]
    exact = {"one": (80.0, 70.0), "two": (80.0, 80.5), "three": (80.0, 90.0)}
    found = [
        record(data, method, seed, value, certified)
        for data, (ours, theirs) in exact.items()
        for method, value, certified in (("convex soft", ours, 75.0), ("PGD", theirs, 60.0))
        for seed in range(2)
    ]
    text = report.report(found)
    assert next(line for line in text.splitlines() if line.startswith("PGD ")).split()
    assert "1/1/1" in text
    assert "exact, best rival (PGD): -0.2 points (goal +0): NOT met" in text
    assert "certified, best without certified training (PGD): +15.0 points (goal +10): met" in text


def test_interrupted_and_repeated_runs_are_read(modules, tmp_path):
    file = tmp_path / "one.jsonl"
    lines = [json.dumps(record("one", "PGD", seed, 50.0)) for seed in (0, 1)]
    again = json.dumps(record("one", "PGD", 1, 60.0))
    file.write_text("\n".join([*lines, again, again[:30]]))
    assert [r["exact"] for r in modules["_report"].records(file)] == [50.0, 60.0]
    assert modules["_report"].records(tmp_path / "missing.jsonl") == []


def test_failures_are_shown_and_only_complete_data_are_summed_up(modules):
    report = modules["_report"]
    failed = {"setting": record("one", "PGD", 1, 0.0)["setting"], "error": "MemoryError: no"}
    found = [record("one", "PGD", 0, 50.0), failed, record("one", "convex soft", 0, 60.0)]
    assert "1 of 2 failed" in report.report(found)
    data, methods, exact = report.means(
        report.grouped([*found, record("two", "PGD", 0, 1.0)]), "exact"
    )
    assert (data, set(methods)) == (["one"], {"PGD", "convex soft"})
    assert sorted(exact[0]) == [50.0, 60.0]


def test_fewer_splits_are_shown_and_not_summed_up(modules):
    report = modules["_report"]
    methods, exact = ("convex soft", "PGD"), {"one": 70.0, "two": 60.0, "three": 10.0}
    found = [
        record(data, method, seed, value)
        for data, value in exact.items()
        for method in methods
        for seed in range(1 if data == "three" else 2)
    ]
    found.append(record("one", "convex exchange", 0, 90.0))
    text = report.report(found)
    assert "three, epsilon 0.1, 100 training rows, 1 split(s)" in text
    row = next(line for line in text.splitlines() if line.startswith("convex exchange"))
    assert row.endswith("(1 split(s))")
    assert "Means over 2 data sets (one, two)" in text
    summed_up = text.split("Means over")[1]
    assert "65.0" in summed_up
    assert "convex exchange" not in summed_up


def test_a_method_on_few_data_is_left_out_rather_than_the_others(modules):
    report = modules["_report"]
    found = [record(d, m, 0, 50.0) for d in ("one", "two", "three") for m in ("convex soft", "PGD")]
    found.append(record("two", "convex exchange", 0, 90.0))
    data, methods, exact = report.means(report.grouped(found), "exact")
    assert (data, methods) == (["one", "two", "three"], ["convex soft", "PGD"])
    assert exact.shape == (3, 2)


def test_missing_data_are_named(modules, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pima\.csv"):
        modules["_data"].PROBLEMS["pima"].load(tmp_path)


@pytest.mark.parametrize("name", ["breast cancer", "digits 3/8", "diabetes"])
def test_splits_are_disjoint_and_of_the_sizes_asked_for(modules, name):
    data = modules["_data"]
    found = data.split(data.PROBLEMS[name], None, 0)
    assert len(found.X) == data.PROBLEMS[name].n_train
    rows = {tuple(row) for row in found.X}
    assert not rows & {tuple(row) for row in found.X_test}
