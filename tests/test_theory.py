"""The theory scripts in their small size: what is proven holds, and every picture can be drawn."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
matplotlib_figure = pytest.importorskip("matplotlib.figure")

THEORY = Path(__file__).parents[1] / "benchmarks" / "theory"
if not THEORY.is_dir():  # tests of an installed package
    pytest.skip("the benchmarks are not here", allow_module_level=True)


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(THEORY))


def loaded(name):
    """Return a script as a module of its own name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, THEORY / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


SCRIPTS = sorted(f.stem for f in THEORY.glob("[!_]*.py") if f.stem != "report")


@pytest.mark.theory
@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_proven_holds(name):
    script = loaded(name)
    findings, curves = script.study(quick=True)
    assert findings
    assert [f.claim for f in findings if f.proven and not f.holds] == []
    record = json.loads(json.dumps(curves, default=loaded("_claims").plain))
    figure = matplotlib_figure.Figure()
    script.draw(figure, record)
    assert figure.axes
    assert all(
        axes.lines or axes.collections or axes.patches or axes.images for axes in figure.axes
    )


def test_the_report_runs_every_script():
    assert sorted(loaded("report").SCRIPTS) == SCRIPTS


def test_a_claim_that_does_not_hold_says_why():
    with pytest.raises(ValueError, match="remark"):
        loaded("_claims").Finding("all is well", "anywhere", "it is not", holds=False)


def test_a_failed_script_is_named_in_the_report(tmp_path, capsys):
    report = loaded("report")
    error = report.run("no_such_script", tmp_path, [])
    assert "no_such_script" in error
    assert f"failed: {error}" in report.report(tmp_path, [], {"no_such_script": error})
