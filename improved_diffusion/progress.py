"""The progress of drawing images: a bar on a terminal, and elsewhere a line every `SECONDS_PER_LINE` seconds."""

import sys
import time

from tqdm import tqdm

SECONDS_PER_LINE = 30


class Progress:
    """Counts the steps and the finished images, and shows them, within a `with` block.

    :param images: the number of images to draw.
    :param steps: the number of steps of each image.
    :param doing: a word for the work, such as "drawing".
    :param show: False shows nothing.
    """

    def __init__(self, images: int, steps: int, doing: str, show: bool = True):
        self._images = images
        self._steps = steps
        self._doing = doing
        self._images_done = 0
        self._steps_done = 0
        self._started = self._last_line = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._prints_lines = show and not on_terminal
        self._bar = tqdm(
            total=images * steps,
            desc=doing,
            bar_format="{desc} |{bar}| {percentage:3.0f}%{postfix}, {elapsed} gone, {remaining} left",
            dynamic_ncols=True,
            disable=not (show and on_terminal),
        )

    def __enter__(self) -> "Progress":
        self._bar.set_postfix_str(self._state())
        return self

    def __exit__(self, *exc_info) -> None:
        self._bar.close()

    def step(self, images: int) -> None:
        """Count one more step of `images` images."""
        self._steps_done += images
        self._bar.update(images)
        now = time.monotonic()
        if self._prints_lines and now - self._last_line >= SECONDS_PER_LINE:
            self._last_line = now
            left = (now - self._started) * (self._images * self._steps / self._steps_done - 1)
            print(f"{self._doing}: {self._state()}, {tqdm.format_interval(round(left))} left", flush=True)

    def finish(self, images: int) -> None:
        """Count `images` more finished images."""
        self._images_done += images
        self._bar.set_postfix_str(self._state())

    def _state(self) -> str:
        return f"{self._images_done}/{self._images} images"
