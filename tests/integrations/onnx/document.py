"""The tables of docs/onnx.md: ``python -m tests.integrations.onnx.document`` writes them anew, in some minutes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from escort.integrations.onnx.operators import OPERATORS
from tests.integrations.onnx.networks import Row, rows
from tests.integrations.onnx.node_cases import Outcome, outcomes

DOCUMENT = Path("docs/onnx.md")
#: Operators of which the ONNX project has no test that could be a network's, or none in an opset that is read.
NO_TESTS = {"Constant", "ConstantOfShape", "GlobalLpPool", "Not", "Range"}


def operators_table(found: Iterable[Outcome]) -> str:
    """By operator: how many of ONNX's tests are right, and how many refused."""
    counts: dict[str, Counter[str]] = {operator: Counter() for operator in sorted(OPERATORS)}
    for outcome in found:
        counts[outcome.operator][outcome.result] += 1
    lines = ["| Operator | Right | Wrong | Refused |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {each['right']} | {each['wrong']} | {each['refused']} |" for name, each in counts.items()]
    total: Counter[str] = sum(counts.values(), Counter())
    return "\n".join([*lines, f"| all {len(counts)} | {total['right']} | {total['wrong']} | {total['refused']} |"])


def networks_table(found: Iterable[Row]) -> str:
    """By network and exporter: what became of its layers, and how far its outputs are from ONNX Runtime's."""
    lines = [
        "| Network | Exporter | Opset | Nodes | Layers | With their own names | Error | Error, more samples |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        errors = [f"{error:.0e}" for error in row.errors]
        cells = row.network, row.exporter, row.opset, row.nodes, row.modules[0], row.own_names, *errors
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    text = DOCUMENT.read_text()
    for name, table in (("onnx-networks", networks_table(rows())), ("onnx-operators", operators_table(outcomes()))):
        pattern = rf"(<!-- table: {name} -->\n\n).*?(\n\n<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}{found[2]}", text, flags=re.DOTALL)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
