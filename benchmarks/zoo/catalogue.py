"""Which networks there are in the zoo, and on which inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: The distributions that networks come from, by the name that their entries begin with.
LIBRARIES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "smp": "segmentation_models_pytorch",
    "ultralytics": "ultralytics",
}
Kind = Literal["picture", "pair", "noise"]


@dataclass(frozen=True)
class Entry:
    """A network and its input.

    Attributes:
        name: library/name, as the library's own factory takes the name; what follows is a part of the network, as in
            ``torchvision/retinanet_resnet50_fpn/backbone``.
        size: height and width of the example.
        other: another height and width that it takes; None where it takes one size only. It is checked on yet more
            samples then.
        kind: a picture, a pair of pictures as two arguments, or the noise that a generator takes.
    """

    name: str
    size: int = 64
    other: int | None = 96
    kind: Kind = "picture"

    @property
    def library(self) -> str:
        """What its name begins with."""
        return self.name.partition("/")[0]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The example's shape, and those of two other inputs: with more samples, and with larger pictures."""
        last = self._shape(3, self.size) if self.other is None else self._shape(1, self.other)
        return self._shape(1, self.size), self._shape(2, self.size), last

    def _shape(self, batch: int, size: int) -> tuple[int, ...]:
        return batch, 64 if self.kind == "noise" else 3, size, size


def _of(library: str, names: str, size: int = 64, other: int | None = 96, kind: Kind = "picture") -> list[Entry]:
    return [Entry(f"{library}/{name}", size, other, kind) for name in names.split()]


ENTRIES: tuple[Entry, ...] = (
    *_of("torchvision", "alexnet vgg11_bn resnet18 resnext50_32x4d densenet121 squeezenet1_1 googlenet mnasnet0_5"),
    *_of("torchvision", "mobilenet_v2 mobilenet_v3_small efficientnet_b0 shufflenet_v2_x0_5 regnet_y_400mf"),
    *_of("torchvision", "convnext_tiny quantized_mobilenet_v2"),
    *_of("torchvision", "inception_v3", 96, 128),
    *_of("torchvision", "maxvit_t", 224, None),
    *_of("torchvision", "fcn_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"),
    *_of("torchvision", "fasterrcnn_mobilenet_v3_large_320_fpn/backbone retinanet_resnet50_fpn/backbone", 96, 128),
    *_of("torchvision", "ssdlite320_mobilenet_v3_large/backbone", 320, 352),
    *_of("torchvision", "raft_small", 128, 160, "pair"),
    *_of("timm", "resnet26d seresnet18 ecaresnet26t resnest14d res2net50_26w_4s resnetv2_50 dla34 dpn68"),
    *_of("timm", "tf_efficientnet_lite0 tf_mobilenetv3_small_minimal_100 tf_mixnet_s mobilenetv4_conv_small"),
    *_of(
        "timm", "ghostnet_100 hardcorenas_a rexnet_100 nf_regnet_b0 nfnet_l0 hrnet_w18_small cspdarknet53 selecsls42b"
    ),
    *_of("timm", "repvgg_a0 mobileone_s0 repghostnet_050 repvit_m0_9 fastvit_t8 starnet_s1", 64, 128),
    *_of("timm", "convnext_atto convnextv2_atto edgenext_xx_small inception_next_atto poolformer_s12", 64, 128),
    *_of("timm", "resnetv2_50x1_bit xception41 inception_v4 ese_vovnet19b_dw", 96, 128),
    *_of("timm", "mobilevit_xxs mobilevitv2_050 efficientvit_b0", 64, 128),
    *_of("timm", "efficientformerv2_s0 levit_128s coat_lite_tiny", 224, None),
    *_of("smp", "unet/resnet18 unet/mobilenet_v2 unet/timm-efficientnet-b0 unetplusplus/resnet18 manet/resnet18"),
    *_of("smp", "linknet/resnet18 fpn/resnet18 pspnet/resnet18 deeplabv3plus/resnet18"),
    *_of("smp", "pan/resnet18", 128, 192),
    *_of("smp", "upernet/resnet18 segformer/mit_b0 unet/tu-convnext_atto", 64, 128),
    *_of("ultralytics", "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n"),
    *_of("ultralytics", "yolov8n-ghost yolov8n-seg yolov8n-pose yolov8n-cls yolo11n-obb"),
    Entry("own/generator", 1, None, "noise"),
)
