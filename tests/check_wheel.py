"""Run by `make wheel-test` in an environment that holds the built wheel and nothing of this repository."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import escort
from escort import report
from escort.cuda import compiler, shipped


def main() -> None:
    """Converts, saves and loads a small network, compares with the original, and tries what lies beside the code."""
    assert Path(sys.prefix) in Path(escort.__file__).parents, f"escort comes from {escort.__file__}, not from the wheel"
    assert (compiler.KERNELS / "direct.cu").is_file(), "the wheel brings the sources that are compiled on users' GPUs"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= torch.rand_like(parameter) < 0.1
    x = torch.randn(2, 3, 20, 20)
    fast = escort.convert(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        escort.save(fast, Path(folder) / "model.escort")
        back = escort.load(Path(folder) / "model.escort")
        report.write_html(
            Path(folder) / "page.html", "A page", [report.Text("From the wheel", ("Its template is there.",))]
        )
    torch.testing.assert_close(back(x), fast(x))
    commands = subprocess.run(
        [Path(sys.executable).with_name("escort"), "--help"], capture_output=True, text=True, check=True
    )
    assert all(name in commands.stdout for name in ("convert", "plan", "bench"))
    assert all(shipped.find(key) is not None for key in shipped._opened(shipped.FILE).records), (
        "what is shipped is whole"
    )
    print(f"escort {escort.__version__} converts: {', '.join(plan.method for plan in fast.plan.layers.values())}")
    print(f"kernels shipped: {shipped.archs() or 'none'}")


if __name__ == "__main__":
    main()
