"""The command ``convexrobust train``, and the benchmark of methods that shares its parts."""
# ruff: noqa: E402 - without torch the file is skipped before it imports what needs it

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convexrobust import LpBall, as_network, certify
from convexrobust.__main__ import main
from convexrobust.deep.catalogue import create_network, load_task
from convexrobust.deep.methods import Standard
from convexrobust.deep.methods.certified import ibp_margins
from convexrobust.deep.training import train

QUICK = ["train", "--epochs", "2", "--width", "8", "--test-rows", "40", "--rows", "200"]


def cells(line):
    """Return the percentages of a row of the table."""
    return [float(word[:-1]) for word in line.split() if word.endswith("%")]


class TestTrain:
    def test_it_prints_what_the_saved_weights_are_worth(self, tmp_path, capsys):
        weights = tmp_path / "weights.pt"
        main([*QUICK, "--data", "breast-cancer", "--epsilon", "0.2", "--save", str(weights)])
        out, err = capsys.readouterr()
        clean, fgsm, pgd, worst, certified = cells(out.splitlines()[-1])
        assert certified <= worst <= min(fgsm, pgd) <= clean
        assert err.count("epoch") == 2

        task = load_task("breast-cancer")
        model = create_network("two-layer", (30,), 1, width=8)
        model.load_state_dict(torch.load(weights))
        rows = np.random.default_rng(0).permutation(len(task.X_test))[:40]
        X, y = task.X_test[rows], task.y_test[rows]
        right = np.sign(as_network(model).predict(X)[:, 0]) == y
        proven = certify(model, X, y, LpBall(np.inf, 0.2), "interval").status == "robust"
        assert clean == pytest.approx(100 * right.mean(), abs=0.05)
        assert certified == pytest.approx(100 * proven.mean(), abs=0.05)

    def test_method_options_images_and_log(self, tmp_path, capsys):
        log = tmp_path / "log.csv"
        options = "--data digits --classes 3 5 --network cnn --augment --norm l2 --method trades"
        options += " --option weight=2.5 --option mode=train --log"
        main([*QUICK, *options.split(), str(log)])
        row = capsys.readouterr().out.splitlines()[-1]
        assert row.startswith("trades")
        assert len(cells(row)) == 4  # certified is not known for this network
        assert [figures["epoch"] for figures in csv.DictReader(log.read_text().splitlines())] == [
            "0",
            "1",
        ]

    def test_it_goes_on_from_a_checkpoint(self, tmp_path, capsys):
        arguments = [*QUICK, "--data", "digits", "--checkpoint", str(tmp_path / "state.pt")]
        main(arguments)
        first = capsys.readouterr()
        main(arguments)
        again = capsys.readouterr()
        assert cells(again.out) == cells(first.out)
        assert "epoch" not in again.err  # nothing was left to train
        with pytest.raises(SystemExit, match=r"checkpoint .* learning_rate was"):
            main([*arguments, "--learning-rate", "0.01"])
        (tmp_path / "state.pt").write_bytes(b"damaged")
        with pytest.raises(SystemExit, match="cannot be read"):
            main(arguments)

    def test_a_file_of_ones_own(self, tmp_path, capsys):
        rng = np.random.default_rng(0)
        X = rng.normal(size=(120, 4)) * [1.0, 10.0, 100.0, 0.0] + 5.0
        labels = np.where(X[:, 2] > 5.0, "large", "small")
        np.savez(tmp_path / "own.npz", X=X, y=labels)
        options = "--epsilon 0.01 --epochs 20 --batch-size 20 --data"
        main([*QUICK, *options.split(), str(tmp_path / "own.npz")])
        assert cells(capsys.readouterr().out)[0] > 80.0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "nothing"], "data must be one of .*'mnist'.* got 'nothing'"),
            (["--data", "mnist", "--folder", "nowhere"], "'nowhere' does not exist.*train-images"),
            (["--data", "digits", "--size", "4"], "size is for"),
            (["--method", "magic"], "method must be one of"),
            (["--method", "ibp", "--norm", "2"], "norm must be inf"),
            (["--norm", "3"], "norm must be 1, 2 or numpy.inf, or a name: .*; got '3'"),
            (["--option", "weight"], "--option must be NAME=VALUE"),
            (["--option", "weight=3"], "has no option"),
            (["--network", "transformer"], "network must be one of"),
            (["--network", "cnn", "--data", "breast-cancer"], "takes images"),
            (["--data", "breast-cancer", "--augment"], "augmentation is for images"),
            (["--epsilon", "-1"], "epsilon must be"),
            (["--log", "log.txt"], "log must end in"),
            (["--precision", "float8"], "precision must be"),
            (["--data", "digits", "--classes", "3"], "at least two classes"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_bad_input_ends_with_the_remedy(self, arguments, message):
        with pytest.raises(SystemExit, match=message):
            main([*QUICK, *arguments])

    def test_without_torch(self, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("convexrobust.deep")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(SystemExit, match=r"convexrobust.*torch"):
            main(QUICK)


@pytest.fixture(scope="module")
def suite():
    file = Path(__file__).parents[1] / "benchmarks" / "robustness" / "deep_methods.py"
    spec = importlib.util.spec_from_file_location("deep_methods", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestSuite:
    @staticmethod
    def run(suite, monkeypatch, tmp_path, *arguments):
        monkeypatch.setattr(sys, "argv", ["deep_methods.py", *arguments])
        options = suite.parsed()
        options.smoke, options.results = True, tmp_path / "results"
        options.epochs, options.rows, options.test_rows, options.width = 2, 100, 20, 8
        monkeypatch.setattr(suite, "parsed", lambda: options)
        suite.main()
        return [json.loads(file.read_text()) for file in (tmp_path / "results").glob("*.json")]

    def test_it_resumes_and_prints_one_table(self, suite, monkeypatch, tmp_path, capsys):
        arguments = ["--methods", "standard", "pgd", "--epsilon", "0.1"]
        first = self.run(suite, monkeypatch, tmp_path, *arguments)
        assert {run["setting"]["method"]: run["passes"] for run in first} == {
            "standard": 1.0,
            "pgd": 11.0,  # ten steps of the attack, and one of the weights
        }
        for run in first:
            assert run["certified"] <= run["worst attack"] <= run["pgd"] <= run["clean"]
            assert len(run["epochs"]) == 2
        out = capsys.readouterr().out
        assert "digits, two-layer, epsilon 0.1" in out

        def never(*_):
            raise AssertionError("ran again")

        monkeypatch.setattr(suite, "run_one", never)
        assert self.run(suite, monkeypatch, tmp_path, *arguments) == first
        assert capsys.readouterr().out == out

    def test_a_failure_is_recorded_and_the_rest_goes_on(self, suite, monkeypatch, tmp_path, capsys):
        arguments = ["--methods", "ibp", "standard", "--norm", "2", "--seeds", "2"]
        runs = self.run(suite, monkeypatch, tmp_path, *arguments)
        failed = [run["setting"]["method"] for run in runs if "error" in run]
        assert failed == ["ibp", "ibp"]
        assert len(runs) == 4
        out = capsys.readouterr().out
        assert "2 of 2 failed" in out
        assert " +- " in out

    def test_pictures(self, suite, monkeypatch, tmp_path):
        pytest.importorskip("matplotlib")
        plots = ["--plots", str(tmp_path / "plots")]
        self.run(suite, monkeypatch, tmp_path, "--methods", "standard", *plots)
        assert [file.name for file in (tmp_path / "plots").iterdir()] == [
            "digits_two-layer_0.1.png"
        ]

    def test_certified_accuracy_of_two_layers(self, suite):
        task = load_task("digits", flatten=True)
        torch.manual_seed(0)
        model = create_network("two-layer", (64,), 10)
        train(model, Standard(), task.X, task.y, n_epochs=2)
        ball, X, y = LpBall(np.inf, 0.02, task.bounds), task.X_test[:50], task.y_test[:50]
        found = suite.measure(model, ball, X, y, quick=True)
        proven = certify(model, X, y, ball, "interval").status == "robust"
        assert 0.0 < found["certified"] == proven.mean()

    def test_bound_propagation_of_other_networks(self, suite):
        task = load_task("digits")
        torch.manual_seed(0)
        model = create_network("cnn", (1, 8, 8), 10)
        ball = LpBall(np.inf, 1e-3, (0.0, 1.0))
        found = suite.measure(model, ball, task.X_test[:30], task.y_test[:30], quick=True)
        x, y = (torch.as_tensor(part[:30]) for part in (task.X_test, task.y_test))
        proven = (ibp_margins(model, x.float(), y, ball).amin(dim=1) > 0.0).double().mean()
        assert found["certified"] == pytest.approx(proven.item())
        assert found["certified"] <= found["worst attack"]
