"""The demo, on a network of seconds: its files are there and its numbers agree with each other."""

import io
import json
import sys

import pytest
import torch

import escort
from escort.cli.demo import digits
from escort.report import Console


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the summary of a quick demo, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    state = torch.random.get_rng_state()
    summary = digits.run_demo(out, quick=True, console=Console(file=printed, width=100))
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers are the caller's
    return out, summary, printed.getvalue()


def test_it_writes_its_summary_report_and_model(run):
    out, summary, _ = run
    assert {path.name for path in out.iterdir()} == {"summary.json", "report.html", "model.escort"}
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_the_numbers_agree_with_each_other(run):
    _, summary, _ = run
    assert summary["accuracy_dense"] > 0.8
    assert summary["accuracy_converted"] == pytest.approx(
        summary["accuracy_pruned"], abs=1.5 / summary["digits"]["held_out"]
    )
    assert summary["rel_error"] <= 1e-5
    assert summary["layer_sparsity"][digits.FIRST_CONVOLUTION] == 0.0
    assert summary["sparsity"] == pytest.approx(digits.QUICK.sparsity, abs=1e-3)
    assert summary["history"][-1] == {"accuracy": summary["accuracy_pruned"], "sparsity": summary["sparsity"]}
    assert [row["batch"] for row in summary["times"]] == list(digits.BATCHES)
    for row in summary["times"]:
        assert row["speedup"] == row["dense_us"] / row["converted_us"]
        assert (row["speedup"] == summary["speedup"]) == (row["batch"] == summary["speedup_batch"])
    assert summary["machine"] == summary["plan"]["machine"]


def test_the_saved_model_reads_the_held_out_digits_as_well(run):
    out, summary, _ = run
    model = escort.load(out / "model.escort")
    data = digits.load_digits(digits.QUICK.size)
    with torch.inference_mode():
        right = (model(data.held_out_pictures).argmax(1) == data.held_out_labels).float().mean()
    assert float(right) == pytest.approx(summary["accuracy_converted"], abs=1.5 / len(data.held_out_labels))


def test_report_and_console_show_the_same_numbers(run):
    out, summary, printed = run
    html = (out / "report.html").read_text()
    for text in (printed, html):
        assert f"{summary['accuracy_converted']:.1%}" in text
        assert f"{summary['speedup']:.2f}x" in text
        assert all(layer in text for layer in summary["layer_sparsity"])
    assert html.count("<svg") == 3


def test_the_split_is_whole_and_follows_the_seed():
    data, same, other = (digits.load_digits(8, seed) for seed in (0, 0, 1))
    assert len(data.train_labels) + len(data.held_out_labels) == 1797
    assert torch.equal(data.held_out_pictures, same.held_out_pictures)
    assert not torch.equal(data.held_out_pictures, other.held_out_pictures)
    assert data.train_pictures.shape[1:] == (1, 8, 8)
    assert (data.train_pictures.min(), data.train_pictures.max()) == (-0.5, 0.5)


def test_a_wrong_converted_network_is_reported():
    model = digits.DigitNet(width=4).eval()
    with pytest.raises(RuntimeError, match="differs from the pruned one"):
        digits._verify(torch.nn.Sequential(model, torch.nn.Tanh()), model, torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("package", ["sklearn", "matplotlib.figure"])
def test_a_missing_package_is_named_before_anything_is_done(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install escort-sparse\[demo\]"):
        digits.run_demo(tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_raises_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        digits.run_demo(tmp_path / "file" / "out", quick=True)
