"""A small image classifier, trained in minutes, that tells whether a drawn image is of the class asked for.

The network and its training follow Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498):
a first layer that whitens 2x2 patches, three groups of two convolutions, a high learning rate that falls in a
triangle, smoothed labels, an average of the last weights, and flips that alternate from epoch to epoch.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch as th
import torch.nn.functional as F
from torch import nn

from improved_diffusion.run.checkpoint import load_tensors
from improved_diffusion.storage import open_atomic

WIDTHS = (64, 256, 256)
LABEL_SMOOTHING = 0.2
LOGIT_SCALE = 1 / 9
MAX_SHIFT = 2  # pixels by which a training image is moved in each direction
WHITENING_EPSILON = 5e-4
MOMENTUM = 0.85
WEIGHT_DECAY = 0.015
PEAK_LR = 11.5  # for 1024 images, independent of the momentum (listing 4 of the paper)
BIAS_FACTOR = 64  # times the learning rate of the other weights
AVERAGING = 5  # steps between updates of the averaged weights


class Classifier(nn.Module):
    """Class scores of images: uint8 [N, 3, S, S] -> float32 [N, classes]; S from 16 on.

    :param classes: how many classes there are.
    :param widths: channels of the three groups of convolutions.
    """

    def __init__(self, classes: int, widths: tuple[int, int, int] = WIDTHS):
        super().__init__()
        self.register_buffer("mean", th.zeros(3, 1, 1))
        self.register_buffer("deviation", th.ones(3, 1, 1))
        self.whitening = nn.Conv2d(3, 24, 2)
        self.whitening.weight.requires_grad = False
        groups, channels = [], 24
        for width in widths:
            groups += [
                _convolution(channels, width),
                nn.MaxPool2d(2),
                _normalisation(width),
                nn.GELU(),
                _convolution(width, width),
                _normalisation(width),
                nn.GELU(),
            ]
            channels = width
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(channels, classes, bias=False)

    def forward(self, pixels: th.Tensor) -> th.Tensor:
        x = (pixels.float() / 255 - self.mean) / self.deviation
        x = self.groups(F.gelu(self.whitening(x.contiguous(memory_format=th.channels_last))))
        return self.head(x.amax(dim=(2, 3))) * LOGIT_SCALE

    @th.no_grad()
    def whiten(self, pixels: th.Tensor) -> None:
        """Let the first layer decorrelate the 2x2 patches of `pixels`, uint8 [N, 3, S, S], at variance 1.

        The 12 eigenvectors of the patches' covariance and their negatives make its 24 filters (section 3.1).
        """
        x = pixels.float() / 255
        self.mean.copy_(x.mean(dim=(0, 2, 3)).view(3, 1, 1))
        self.deviation.copy_(x.std(dim=(0, 2, 3)).view(3, 1, 1))
        patches = F.unfold((x - self.mean) / self.deviation, 2).transpose(1, 2).reshape(-1, 12)
        values, vectors = th.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + WHITENING_EPSILON).sqrt()).T.reshape(12, 3, 2, 2)
        self.whitening.weight.copy_(th.cat([filters, -filters]))
        self.whitening.bias.zero_()


def _convolution(channels: int, width: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    with th.no_grad():  # as far as it goes, the layer passes its input on
        nn.init.dirac_(layer.weight[:channels])
    return layer


def _normalisation(width: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad = False
    return layer


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    epochs: float = 10.0,
    batch_size: int = 1024,
    widths: tuple[int, int, int] = WIDTHS,
    seed: int = 0,
    precision: str = "fp32",
    log: Callable[[str], object] = print,
) -> Classifier:
    """Train a `Classifier` from nothing.

    :param images: uint8 [N, S, S, 3]. :param labels: int [N], from 0 to `classes` - 1.
    :param epochs: how often every image is seen.
    :param precision: "bf16": convolutions in 16 bits; "fp32": all in 32.
    :param log: told the loss and the training accuracy of every epoch.
    :return: the classifier in eval mode, with the average of its last weights.
    """
    th.manual_seed(seed)
    generator = th.Generator().manual_seed(seed)
    pixels = th.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    targets = th.from_numpy(np.asarray(labels, dtype=np.int64))
    model = Classifier(classes, widths)
    model.whiten(pixels[: 5 * batch_size])
    model = model.to(memory_format=th.channels_last).train()
    batch_size = min(batch_size, len(pixels))
    per_epoch = len(pixels) // batch_size
    total = max(1, round(epochs * per_epoch))

    # The learning rate is per image and does not grow with the momentum; PyTorch's is per step and does.
    lr = PEAK_LR / 1024 / (1 + 1 / (1 - MOMENTUM))
    decay = WEIGHT_DECAY * batch_size / PEAK_LR  # the loss is a sum over the batch, and so is the gradient
    biases = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("bias")]
    groups = [
        {"params": biases, "lr": BIAS_FACTOR * lr, "weight_decay": decay / BIAS_FACTOR},
        {"params": others, "lr": lr, "weight_decay": decay},
    ]
    optimizer = th.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    average = {name: value.clone() for name, value in model.state_dict().items()}

    flip_first = th.rand(len(pixels), generator=generator) < 0.5
    padded = F.pad(pixels.float(), (MAX_SHIFT,) * 4, mode="reflect").to(th.uint8)
    step = 0
    while step < total:
        epoch = step // per_epoch
        losses, hits, seen = 0.0, 0, 0
        for chosen in th.randperm(len(pixels), generator=generator).split(batch_size)[:per_epoch]:
            if step >= total:
                break
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * _triangle(step / total)
            batch = _shift(padded[chosen], pixels.shape[-1], generator)
            flipped = flip_first[chosen] ^ bool(epoch % 2)
            batch[flipped] = batch[flipped].flip(3)
            with th.autocast("cpu", dtype=th.bfloat16, enabled=precision == "bf16"):
                scores = model(batch)
            loss = F.cross_entropy(
                scores.float(), targets[chosen], label_smoothing=LABEL_SMOOTHING, reduction="sum"
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            losses += loss.item()
            hits += (scores.argmax(1) == targets[chosen]).sum().item()
            seen += len(chosen)
            if step % AVERAGING == 0 or step == total:
                _average(average, model, 0.95**AVERAGING * (step / total) ** 3 if step < total else 1.0)
        log(f"epoch {epoch + 1}: loss {losses / seen:.4f}, {hits / seen:.1%} right")
    return model.eval()


def _triangle(progress: float, start: float = 0.2, peak: float = 0.23, end: float = 0.07) -> float:
    """The learning rate as a share of its peak: up from `start` until `peak` of the run, down to `end`."""
    if progress < peak:
        return start + (1 - start) * progress / peak
    return end + (1 - end) * (1 - progress) / (1 - peak)


def _shift(padded: th.Tensor, size: int, generator: th.Generator) -> th.Tensor:
    """A crop of `size` pixels at a place of its own for each of `padded`."""
    places = padded.shape[-1] - size + 1
    rows, columns = th.randint(places, (2, len(padded)), generator=generator)
    out = padded.new_empty(len(padded), 3, size, size)
    for row in range(places):
        for column in range(places):
            here = (rows == row) & (columns == column)
            out[here] = padded[here, :, row : row + size, column : column + size]
    return out


@th.no_grad()
def _average(average: dict[str, th.Tensor], model: nn.Module, decay: float) -> None:
    """Move `average` towards the weights of `model`, and the weights onto it (Zhang et al. 2019, "Lookahead")."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
            value.copy_(average[name])


@th.no_grad()
def classify(
    model: Callable[[th.Tensor], th.Tensor], images: np.ndarray, batch_size: int = 500
) -> np.ndarray:
    """The most likely class of each of `images`, uint8 [N, S, S, 3]: int64 [N].

    The scores of an image and of its mirror image are added up.
    """
    found = []
    for start in range(0, len(images), batch_size):
        pixels = th.from_numpy(np.ascontiguousarray(images[start : start + batch_size])).permute(0, 3, 1, 2)
        scores = model(pixels) + model(pixels.flip(3))
        found.append(scores.argmax(dim=1))
    return th.cat(found).numpy() if found else np.zeros(0, dtype=np.int64)


def save_classifier(model: Classifier, path: str, class_names: Sequence[str]) -> None:
    """Write the weights and the names of the classes to `path`, for `load_classifier`."""
    with open_atomic(path) as file:
        th.save({"class_names": list(class_names), "weights": model.state_dict()}, file)


def load_classifier(path: str) -> tuple[Classifier, list[str]]:
    """The classifier of `save_classifier`, in eval mode, and the names of its classes.

    :raises ValueError: there is no such file, or it holds something else.
    """
    content = load_tensors(path)
    try:
        names, weights = content["class_names"], content["weights"]
        widths = tuple(len(weights[f"groups.{7 * group}.weight"]) for group in range(3))
        model = Classifier(len(names), widths)
        model.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise ValueError(f"{path}: holds no classifier; make one with scripts/train_classifier.py") from None
    return model.eval(), [str(name) for name in names]


def class_accuracy(found: np.ndarray, asked: np.ndarray) -> float:
    """The share of images, [N], whose class `found` is the one `asked` for."""
    assert len(found) == len(asked) > 0
    return float(np.mean(np.asarray(found) == np.asarray(asked)))


def accuracy_of_each_class(
    found: np.ndarray, asked: np.ndarray, class_names: Sequence[str]
) -> dict[str, float]:
    """`class_accuracy` of the images of each class that was asked for, by its name."""
    return {
        class_names[number]: class_accuracy(found[asked == number], asked[asked == number])
        for number in np.unique(asked)
    }
