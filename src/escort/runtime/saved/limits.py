"""What a saved program may hold and ask for at most; docs/format.md lists it. No network needs more."""

#: Bytes of a file's header, in which all but the tensors' data is.
MAX_HEADER_BYTES = 16 << 20
#: Steps of a program; layers of a network.
MAX_STEPS = 1 << 14
#: Slots and plain values among the arguments of a step, and in what a program returns.
MAX_OPERANDS = 1 << 10
#: Containers within containers in an argument or a layer's argument.
MAX_DEPTH = 8
#: Characters of a text.
MAX_TEXT = 1 << 10
#: Characters of a path, of a name in it or of an input's name.
MAX_PATH, MAX_NAME = 1 << 10, 1 << 7
#: Bits of an integer: as of torch's, sign included.
INTEGER_BITS = 64
#: Numbers, None and the like in one value that is no tensor; tensors in one value.
MAX_ITEMS = 1 << 12
#: Numbers in a tensor that a step makes of the example, or in the example.
MAX_NUMBERS = 1 << 30
#: Calls of torch's operators, those within layers counted one by one.
MAX_CALLS = 1 << 15
#: Channels, features and other counts in a layer's arguments.
MAX_COUNT = 1 << 24
#: Rows or columns of a window, its stride, padding and dilation; an output size.
MAX_WINDOW = 1 << 13
#: How many times larger a layer makes a map, per dimension.
MAX_SCALE = 1 << 6
#: Layers of a recurrent layer.
MAX_DEEP = 1 << 6
#: The exponent of a power of plain numbers.
MAX_POWER = 64
#: Weights, zeros included, of all compressed tensors of a file.
MAX_WEIGHTS = 1 << 30
#: Positions of an input or output plane of a sparse convolution.
MAX_PLANE = 1 << 26
#: Numbers of a sparse convolution's input, written out patch by patch. Beyond it no method is taken that does so.
MAX_LOWERED = 1 << 31
#: Numbers of an input channel that a sparse convolution stages at a time.
MAX_STAGE = 1 << 22
#: Pieces of rows that all sparse convolutions of a network stage, equal planes counted once.
MAX_RECORDS = 1 << 19
#: What is measured anew without being asked for: numbers in tensors at a time, numbers that are written in all,
#: multiply-adds with those of zeros.
MAX_MEASURED_NUMBERS, MAX_MEASURED_WRITES, MAX_MEASURED_MULTIPLY_ADDS = 1 << 29, 1 << 35, 1 << 42
