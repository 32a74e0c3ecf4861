"""The paper's 39 pruned convolutions: our table of the layers that Escort's paper measures, with their sparsities.

Networks, shapes, sparsities and batch sizes as published for CaffeNet, GoogLeNet and ResNet-50 in arXiv 1802.10280;
the paper measured its own pruned weights, of which only the sparsity of each layer is public.
"""

from __future__ import annotations

from typing import NamedTuple

from escort.problem import Problem


class PaperLayer(NamedTuple):
    """One pruned convolution; maps are height x width, filters square, `batch` is the one the paper timed."""

    network: str
    layer: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    padding: int
    height: int
    width: int
    groups: int
    sparsity: float
    batch: int

    def problem(self, batch: int) -> Problem:
        """This layer as a float32 problem on `batch` samples, without epilogue."""
        return Problem(
            batch,
            self.in_channels,
            self.height,
            self.width,
            self.out_channels,
            (self.kernel_size, self.kernel_size),
            (self.stride, self.stride),
            (self.padding,) * 4,
            groups=self.groups,
        )


# fmt: off
PAPER_LAYERS: tuple[PaperLayer, ...] = tuple(PaperLayer(*row) for row in (
    # network, layer, C, K, kernel_size, stride, pad, H, W, groups, sparsity, batch
    ("caffenet", "conv2", 96, 256, 5, 1, 2, 27, 27, 2, 0.8565, 128),
    ("caffenet", "conv3", 256, 384, 3, 1, 1, 13, 13, 1, 0.931, 128),
    ("caffenet", "conv4", 384, 384, 3, 1, 1, 13, 13, 2, 0.9181, 128),
    ("caffenet", "conv5", 384, 256, 3, 1, 1, 13, 13, 2, 0.8849, 128),
    ("googlenet", "conv2/3x3", 64, 192, 3, 1, 1, 56, 56, 1, 0.8165, 128),
    ("googlenet", "inception_3a/3x3", 96, 128, 3, 1, 1, 28, 28, 1, 0.9009, 128),
    ("googlenet", "inception_3a/5x5", 16, 32, 5, 1, 2, 28, 28, 1, 0.8456, 128),
    ("googlenet", "inception_3b/3x3", 128, 192, 3, 1, 1, 28, 28, 1, 0.9047, 128),
    ("googlenet", "inception_3b/5x5", 32, 96, 5, 1, 2, 28, 28, 1, 0.8855, 128),
    ("googlenet", "inception_4a/3x3", 96, 208, 3, 1, 1, 14, 14, 1, 0.8797, 128),
    ("googlenet", "inception_4a/5x5", 16, 48, 5, 1, 2, 14, 14, 1, 0.8376, 128),
    ("googlenet", "inception_4b/3x3", 112, 224, 3, 1, 1, 14, 14, 1, 0.9611, 128),
    ("googlenet", "inception_4b/5x5", 24, 64, 5, 1, 2, 14, 14, 1, 0.874, 128),
    ("googlenet", "inception_4c/3x3", 128, 256, 3, 1, 1, 14, 14, 1, 0.949, 128),
    ("googlenet", "inception_4c/5x5", 24, 64, 5, 1, 2, 14, 14, 1, 0.8801, 128),
    ("googlenet", "inception_4d/3x3", 144, 288, 3, 1, 1, 14, 14, 1, 0.9241, 128),
    ("googlenet", "inception_4d/5x5", 32, 64, 5, 1, 2, 14, 14, 1, 0.9039, 128),
    ("googlenet", "inception_4e/3x3", 160, 320, 3, 1, 1, 14, 14, 1, 0.987, 128),
    ("googlenet", "inception_4e/5x5", 32, 128, 5, 1, 2, 14, 14, 1, 0.9442, 128),
    ("googlenet", "inception_5a/3x3", 160, 320, 3, 1, 1, 7, 7, 1, 0.9624, 128),
    ("googlenet", "inception_5a/5x5", 32, 128, 5, 1, 2, 7, 7, 1, 0.934, 128),
    ("googlenet", "inception_5b/3x3", 192, 384, 3, 1, 1, 7, 7, 1, 0.9495, 128),
    ("googlenet", "inception_5b/5x5", 48, 128, 5, 1, 2, 7, 7, 1, 0.9487, 128),
    ("resnet50", "res2a_branch2b", 64, 64, 3, 1, 1, 56, 56, 1, 0.88, 32),
    ("resnet50", "res2b_branch2b", 64, 64, 3, 1, 1, 56, 56, 1, 0.8397, 32),
    ("resnet50", "res2c_branch2b", 64, 64, 3, 1, 1, 56, 56, 1, 0.8079, 32),
    ("resnet50", "res3a_branch2b", 128, 128, 3, 1, 1, 28, 28, 1, 0.9176, 32),
    ("resnet50", "res3b_branch2b", 128, 128, 3, 1, 1, 28, 28, 1, 0.9191, 32),
    ("resnet50", "res3c_branch2b", 128, 128, 3, 1, 1, 28, 28, 1, 0.955, 32),
    ("resnet50", "res3d_branch2b", 128, 128, 3, 1, 1, 28, 28, 1, 0.9113, 32),
    ("resnet50", "res4a_branch2b", 256, 256, 3, 1, 1, 14, 14, 1, 0.9655, 32),
    ("resnet50", "res4b_branch2b", 256, 256, 3, 1, 1, 14, 14, 1, 0.9747, 32),
    ("resnet50", "res4c_branch2b", 256, 256, 3, 1, 1, 14, 14, 1, 0.9715, 32),
    ("resnet50", "res4d_branch2b", 256, 256, 3, 1, 1, 14, 14, 1, 0.9676, 32),
    ("resnet50", "res4e_branch2b", 256, 256, 3, 1, 1, 14, 14, 1, 0.9684, 32),
    ("resnet50", "res4f_branch2b", 256, 256, 3, 1, 1, 14, 14, 1, 0.9684, 32),
    ("resnet50", "res5a_branch2b", 512, 512, 3, 1, 1, 7, 7, 1, 0.9778, 32),
    ("resnet50", "res5b_branch2b", 512, 512, 3, 1, 1, 7, 7, 1, 0.9803, 32),
    ("resnet50", "res5c_branch2b", 512, 512, 3, 1, 1, 7, 7, 1, 0.9792, 32),
))
# fmt: on

#: The same by network and name.
LAYERS = {(entry.network, entry.layer): entry for entry in PAPER_LAYERS}
#: The paper's networks, and the numbers of samples that it took for them.
PAPER_BATCH = {entry.network: entry.batch for entry in PAPER_LAYERS}
