"""The package as a whole: what importing it costs, its version, its public names."""

import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest

import convexrobust
from convexrobust.__main__ import main


def test_import_loads_no_heavy_library():
    heavy = {"cvxpy", "matplotlib", "torch"}
    code = "import json, sys, convexrobust; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heavy.isdisjoint(json.loads(run.stdout))


def test_version_is_that_of_the_installed_package():
    try:
        installed = importlib.metadata.version("convexrobust")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("convexrobust is imported from a folder, not installed")
    assert convexrobust.__version__ == installed


def test_versions_are_those_installed_and_can_be_written():
    found = convexrobust.versions()
    assert json.loads(json.dumps(found)) == found
    assert found["numpy"] == np.__version__
    assert found["scikit-learn"] == importlib.metadata.version("scikit-learn")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert int(found["cores"]) >= 1
    assert found["processor"]


@pytest.mark.parametrize("name", convexrobust.__all__)
def test_public_name_exists(name):
    assert hasattr(convexrobust, name)


def test_public_names_are_distinct_and_listed_by_dir():
    assert len(set(convexrobust.__all__)) == len(convexrobust.__all__)
    assert set(convexrobust.__all__) <= set(dir(convexrobust))


@pytest.mark.parametrize("module", ["torch", "matplotlib"])
def test_demo_without_an_extra_exits_with_the_remedy(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # importing it then fails
    remedy = rf"the demo needs {module}: pip install 'convexrobust\[torch,plot\]'"
    with pytest.raises(SystemExit, match=remedy):
        main(["demo"])


def test_network_without_torch_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    network = convexrobust.TwoLayerReLU(np.ones((3, 2)), np.ones((2, 1)))
    with pytest.raises(ImportError, match=r"to_torch needs torch: .*convexrobust\[torch\]"):
        network.to_torch()
