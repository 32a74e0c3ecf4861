"""Networks of other libraries, converted with sparse methods forced: they hold what tests did not think of.

They need torchvision, timm, segmentation_models_pytorch and ultralytics in an environment of their own, which `make
zoo` builds. Each runs in a process of its own; nothing is timed.
"""

from benchmarks.zoo.catalogue import ENTRIES, LIBRARIES, Entry
from benchmarks.zoo.forced import sparse_forced
from benchmarks.zoo.rows import ZOO, ZooRow, read_zoo, write_zoo

__all__ = ["ENTRIES", "LIBRARIES", "ZOO", "Entry", "ZooRow", "read_zoo", "sparse_forced", "write_zoo"]
