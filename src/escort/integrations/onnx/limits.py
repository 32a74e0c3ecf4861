"""What an ONNX file may hold and ask for at most. No network needs more."""

#: Nodes of a file, those of its functions counted once for each call, and of what is in an If or Loop.
MAX_NODES = 1 << 15
#: Functions within functions, and graphs within nodes.
MAX_DEPTH = 16
#: Inputs and outputs of a node, and of the file.
MAX_OPERANDS = 1 << 10
#: Dimensions of a tensor.
MAX_DIMENSIONS = 16
#: Bytes of all tensors in a file and beside it, and of all constants that are computed from them.
MAX_BYTES = 1 << 33
#: Numbers in a constant that is computed.
MAX_CONSTANT = 1 << 28
#: Numbers in any other tensor, at the sizes that stand for those that the file leaves open.
MAX_NUMBERS = 1 << 36
#: Numbers that the onnx library may be given to compute a constant of: it is told nothing else, as its results have no
#: bounds of their own.
MAX_FOLDED = 1 << 10
#: Faults that one message lists.
MAX_LISTED = 20
