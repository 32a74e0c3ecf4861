"""What is wrong with an ONNX file, and where."""

from __future__ import annotations


class NotSupportedError(ValueError):
    """What a node asks for has no counterpart here. Says what, and the remedy; who catches it knows the node."""


class OnnxError(ValueError):
    """A file that no network can be made of.

    Attributes:
        faults: a line for each node that cannot be mapped: its operator, its name, the problem and the remedy. Empty
            where the file as a whole is refused.
    """

    def __init__(self, message: str, faults: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults
