"""The package as a whole: what importing it costs, its version, its public names."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

import convexrobust


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


@pytest.mark.parametrize("name", convexrobust.__all__)
def test_public_name_exists(name):
    assert hasattr(convexrobust, name)


def test_public_names_are_distinct_and_listed_by_dir():
    assert len(set(convexrobust.__all__)) == len(convexrobust.__all__)
    assert set(convexrobust.__all__) <= set(dir(convexrobust))
