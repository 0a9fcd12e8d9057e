"""Make a small copy of a trained model to give away: the moving average of its weights in 16 bits, a fifth of a
checkpoint's weights or less, with arguments, metrics and pictures. Others draw from the folder as from a run:
image_sample.py --model_path FOLDER."""

import os

if __name__ == "__main__":  # before what takes seconds to import
    from improved_diffusion.run import terminal

    terminal.start()

from improved_diffusion.convert.publish import publish
from improved_diffusion.flags import Parser, add_dict_to_argparser
from improved_diffusion.run.checkpoint import find
from improved_diffusion.script_util import run_script

PUBLISHING = {"model_path": "", "ema_rate": "", "log_dir": ""}


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, PUBLISHING, "publishing")
    return parser


def main() -> None:
    flags, _ = create_parser().parse_flags()
    for name, what in (("model_path", "the directory of a run"), ("log_dir", "a new folder")):
        if not flags[name]:
            raise ValueError(f"--{name} is missing: give {what}")
    if not os.path.isdir(flags["model_path"]):
        raise ValueError(f"--model_path {flags['model_path']}: there is no such directory")
    rates = sorted(find(flags["model_path"]).ema_rates, key=float)
    published = publish(flags["model_path"], flags["ema_rate"] or (rates or ["none"])[-1], flags["log_dir"])
    size = sum(entry["bytes"] for entry in published.state["files"].values())
    print(f"{published.folder}: step {published.step:,}, {size / 1e6:.1f} MB of weights")
    print(f"To draw from it: python image_sample.py --model_path {published.folder}")


if __name__ == "__main__":
    run_script(main)
