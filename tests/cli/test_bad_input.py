"""How commands refuse bad input: one message that names the remedy, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.invoking import invoke
from tests.cli.named import TINY


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "package.module:factory"),
        ("nowhere.nets:net", "no module 'nowhere'"),
        ("tests.nowhere:net", "no module 'tests.nowhere'"),
        ("tests.cli.named:nothing", "has no 'nothing'"),
        ("tests.cli.named:number", "is of type int"),
        ("tests.cli.named:not_a_model", "returned str, not an nn.Module"),
        ("tests.cli.named:needs_width", "without arguments failed: TypeError"),
        ("tests.cli.named:broken", "KeyError: 'no such layer'; mend it, or name a function that needs none"),
        ("tests.cli.named:quits", "SystemExit: 3; mend it"),
        ("tests.cli.named:linear", "nothing to convert"),
        ("weights.safetensors", "is a checkpoint"),
        ("nowhere.pt2", "there is no such file"),
        ("tests/cli/named.py:tiny", "write tests.cli.named:tiny"),
        ("named.py:tiny", "write named:tiny"),
    ],
)
def test_bad_models(spec: str, message: str, tmp_path: Path) -> None:
    result = invoke("convert", spec, "--input", "1,3,8,8", "--output", tmp_path / "model.escort")
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", TINY, "--output", "{tmp}/m.escort"], "--input 1,3,224,224"),
        (["convert", TINY, "--input", "1,3,8,8"], "--output model.escort"),
        (["convert", "{tmp}/none.onnx"], "name an ONNX model"),
        (["prune", "net.onnx", "--sparsity", "0.9", "--output", "{tmp}/p.safetensors"], "before it is exported"),
        (["convert", TINY, "--input", "1,3,x,8", "--output", "{tmp}/m.escort"], "--input takes integers"),
        (
            ["convert", TINY, "--input", f"1,3,{1 << 31},8", "--output", "{tmp}/m.escort"],
            "integers from 1 to 2147483647",
        ),
        (["convert", TINY, "--input", "1,3,9999999,9999999", "--output", "{tmp}/m.escort"], "give smaller ones"),
        (["convert", TINY, "--input", "1,4,8,8", "--output", "{tmp}/m.escort"], "4 channels"),
        (
            ["convert", TINY, "--input", "1,8,8,3", "--mean", "0,0,0", "--output", "{tmp}/m.escort"],
            "go together: pass both",
        ),
        (["convert", TINY, "--input", "1,3,8,8", "--output", "{tmp}/nowhere/m.escort"], "there is no folder"),
        (["convert", TINY, "--input", "1,3,8,8", "--output", "{tmp}"], "is a folder"),
        (["convert", TINY, "--input", "1,3,8,8", "--output", "{tmp}/m.onnx"], "is no .onnx file; name it .escort"),
        (["convert", TINY, "--input", "1,3,8,8", "--output", "{tmp}/m.py"], "is no .py file; name it .escort"),
        (["cache", "export", "{saved}"], "the plans are written to a .json file; name it so"),
        (["prune", TINY, "--sparsity", "90", "--output", "{tmp}/p.safetensors"], "write 0.9"),
        (["prune", TINY, "--sparsity", "0.9", "--skip", "7", "--output", "{tmp}/p.safetensors"], "not a convolution"),
        (["prune", TINY, "--sparsity", "0.9", "--output", "{tmp}/p.pt"], "name it so"),
        (["prune", "net.pt2", "--sparsity", "0.9", "--output", "{tmp}/p.safetensors"], "before it is exported"),
        (
            ["convert", TINY, "--input", "1,3,8,8", "--kernels", "--output", "{tmp}/m.escort"],
            "--kernels is for GPUs; add --device cuda",
        ),
        (["plan", "{tmp}/nowhere.escort"], "there is no such file; name one that escort convert wrote"),
        (["plan", "{tmp}"], "it is a folder; name one that escort convert wrote"),
        (["plan", "{tmp}/none.onnx", "--favor", "latency"], "name an ONNX model"),
        (["plan", __file__], "it is not what escort.save wrote"),
        (
            ["convert", TINY, "--input", "1,3,8,8", "--precision", "fp16", "--output", "{tmp}/m.escort"],
            "add --device cuda",
        ),
        (
            ["convert", TINY, "--input", "1,3,8,8", "--device", "tpu", "--output", "{tmp}/m.escort"],
            "'tpu' is no device",
        ),
        (["plan", TINY, "--input", "1,3,8,8", "--device", "mps"], "not on mps"),
        (["plan", "{saved}", "--input", "1,3,8,8"], "leave out --input"),
        (["plan", "{saved}", "--device", "cuda"], "leave out --input, --checkpoint, --device, --precision"),
        (["plan", "{saved}", "--effort", "5"], "--precision, --effort, --favor and --plan"),
        (["plan", TINY, "--input", "1,3,8,8", "--favor", "speed"], "'latency', 'throughput'"),
        (["plan", TINY, "--input", "1,3,8,8", "--effort", "nan"], "--effort takes fast, best or a number of seconds"),
        (["plan", TINY, "--input", "1,3,8,8", "--effort", "much"], "--effort takes fast, best or a number of seconds"),
        (["plan", TINY, "--input", "1,3,8,8", "--effort", "-1"], "--effort takes fast, best or a number of seconds"),
        (["run", "{saved}", "{tmp}", "--device", "cuda:x"], "'cuda:x' is no device"),
        (["run", "{tmp}/nowhere.escort", "{tmp}"], "nowhere.escort"),
        (["run", "{saved}", "{tmp}/nowhere"], "no such folder"),
        (["run", "{saved}", "/dev/null"], "no such folder or file"),
        (["run", "{saved}", "{saved}"], "holds no image and is no .npy or .npz batch"),
        (["run", "{saved}", "{tmp}"], "holds no image and is no .npy or .npz batch; name images that Pillow reads"),
        (["run", "{saved}", "{tmp}", "--mean", "0.5"], "1 values of the mean"),
        (["run", "{saved}", "{tmp}", "--std", "0,1,1"], "deviations are positive"),
        (["run", "{saved}", "{tmp}", "--size", "8"], "height,width"),
        (["run", "{saved}", "{tmp}", "--output", "{tmp}/out.txt"], ".npz or .csv"),
        (["bench", TINY], "--input 1,3,224,224"),
        (
            ["bench", TINY, "--input", "1,3,8,8", "--against", "fastnet,eager"],
            "no rival fastnet; there are eager",
        ),
        (["bench", TINY, "--input", "1,3,8,8", "--precision", "fp16"], "--precision fp16 is for GPUs"),
        (["bench", TINY, "--input", "1,3,8,8", "--device", "tpu"], "'tpu' is no device"),
    ],
)
def test_bad_input(args: list[str], message: str, tmp_path: Path, saved: Path) -> None:
    result = invoke(*(arg.format(tmp=tmp_path, saved=saved) for arg in args))
    assert result.exit_code == 2, result.output
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and message in error and result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_not_overwritten(pruned: Path, saved: Path, batch: Path) -> None:
    npz, link = batch.with_suffix(".npz"), batch.with_name("link.npz")
    np.savez(npz, np.load(batch))
    link.symlink_to(npz)
    for words in (
        ("prune", TINY, "--checkpoint", pruned, "--sparsity", "0.9", "--output", pruned),
        ("convert", saved, "--input", "1,3,8,8", "--output", saved),
        ("run", saved, npz, "--output", link),
    ):
        before = words[-1].read_bytes()
        result = invoke(*words)
        assert result.exit_code == 2 and f"{words[-1]} is what is read, and would be overwritten" in result.stderr
        assert words[-1].read_bytes() == before


@pytest.mark.parametrize("command", ["convert", "plan", "run"])
def test_a_gpu_that_is_not_there(
    command: str, saved: Path, batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = ["--input", "1,3,8,8", "--precision", "fp16"]
    options = {
        "convert": [TINY, *model, "--output", tmp_path / "m.escort"],
        "plan": [TINY, *model],
        "run": [saved, batch],
    }
    result = invoke(command, *options[command], "--device", "cuda")
    assert result.exit_code == 2 and "cuda needs an NVIDIA GPU and a torch for it" in result.stderr
