"""Classes by name and number: those that a user asks for, and those of a set of images."""

from collections.abc import Sequence

import numpy as np

from improved_diffusion.data.image_set import ImageSet


def parse_class_labels(text: str, num_classes: int, class_names: Sequence[str]) -> list[int]:
    """Class numbers from a comma-separated list of names or numbers; all classes when `text` is empty.

    :raises ValueError: there is no such class; the message lists the classes.
    """
    if not text:
        return list(range(num_classes))
    by_name = {name: number for number, name in enumerate(class_names)}
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if part in by_name:
            labels.append(by_name[part])
        elif part.isdecimal() and int(part) < num_classes:
            labels.append(int(part))
        else:
            known = ", ".join(class_names) if class_names else f"0 to {num_classes - 1}"
            raise ValueError(f"{part!r}: no such class; this model knows {known}")
    return labels


def labels_of(images: ImageSet, num_classes: int, class_names: Sequence[str]) -> np.ndarray:
    """The class of each image, int64 [N], in the numbering of a model.

    :param num_classes: the model's.
    :param class_names: the model's names of its classes. `images` are matched by name; without names, their
        numbers are taken as they are.
    :raises ValueError: `images` have no classes, or one that the model does not know.
    """
    source = images.summary["source"]
    if images.labels is None:
        raise ValueError(
            f"{source}: the model was trained with classes, and these images have none: name the files "
            "<class>_<anything>.png or put each class into a folder of its own"
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    table = np.arange(images.num_classes)
    for label in np.unique(images.labels):
        name = images.class_names[label]
        number = label
        if class_names:
            # In an .npz file, the names of the classes are numbers.
            number = numbers.get(name, int(name) if name.isdecimal() else num_classes)
        if number >= num_classes:
            known = ", ".join(class_names) if class_names else f"classes 0 to {num_classes - 1}"
            raise ValueError(f"{source}: holds images of class {name!r}, but the model knows {known}")
        table[label] = number
    return table[images.labels]
