"""How far the drawing of images is and how long the rest takes: a bar on a terminal, elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm

SECONDS_PER_LINE = 30


class Progress:
    """Counts the steps that images have taken, and the images that are done, within a `with` block.

    :param images: how many there are to make.
    :param steps: how many each of them takes.
    :param doing: what is being done, in a word.
    :param show: whether anything is shown at all.
    """

    def __init__(self, images: int, steps: int, doing: str, show: bool = True):
        self._images = images
        self._steps = steps
        self._doing = doing
        self._done = 0
        self._taken = 0
        self._started = self._said = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._speaks = show and not on_terminal
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
        """So many images have taken one more step."""
        self._taken += images
        self._bar.update(images)
        now = time.monotonic()
        if self._speaks and now - self._said >= SECONDS_PER_LINE:
            self._said = now
            left = (now - self._started) * (self._images * self._steps / self._taken - 1)
            print(f"{self._doing}: {self._state()}, {tqdm.format_interval(round(left))} left", flush=True)

    def finish(self, images: int) -> None:
        """So many more images are done."""
        self._done += images
        self._bar.set_postfix_str(self._state())

    def _state(self) -> str:
        return f"{self._done}/{self._images} images"
