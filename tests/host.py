"""Sources of kernels compiled for the CPU, where tests run them in place of a GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from escort.cuda.compiler import KERNELS


def compiled(source: str, folder: Path, macros: Mapping[str, object] | None = None) -> ctypes.CDLL:
    """A library of C++, made in a folder of its own inside that one."""
    own = Path(tempfile.mkdtemp(dir=folder))
    (own / "host.cpp").write_text(source)
    defined = [f"-D{name}={value}" for name, value in (macros or {}).items()]
    options = ["-std=c++17", "-O1", "-w", "-pthread", "-shared", "-fPIC", f"-I{KERNELS}", *defined]
    subprocess.run(["g++", *options, "host.cpp", "-o", "host.so"], cwd=own, check=True)
    return ctypes.CDLL(str(own / "host.so"))


def struct_fields(source: str, struct: str) -> list[tuple[str, str]]:
    """(type, name) of a struct's fields, in their order, in the text of a kernel's source."""
    body = re.search(rf"struct {struct} {{(.*?)}}", source, re.DOTALL)
    assert body is not None, struct
    declared = re.findall(r"^  (\w+) (\w+(?:, \w+)*);", body[1], re.MULTILINE)
    return [(kind, name) for kind, names in declared for name in names.split(", ")]
