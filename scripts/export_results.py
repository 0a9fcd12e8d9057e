"""Write the Excel workbook of a training run, and its page for a browser:
python export_results.py RUN_DIR [--output results.xlsx]"""

import argparse
import sys

if __name__ == "__main__":  # before the imports that take seconds
    from improved_diffusion.run import terminal

    terminal.start()

from improved_diffusion.results.export import export, export_all
from improved_diffusion.run import terminal


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the workbook and the page of a training run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory that image_train.py wrote")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write only this: a workbook (.xlsx) or a page (.html) (default: RUN_DIR/results.xlsx and index.html)",
    )
    arguments = parser.parse_args()
    terminal.clean_up_on_ctrl_c()
    try:
        if arguments.output is not None:
            print(f"wrote {export(arguments.run_dir, arguments.output)}")
        else:
            written, failed = export_all(arguments.run_dir)
            for path in written:
                print(f"wrote {path}")
            for _, error in failed:
                raise error
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        sys.exit(_fail(str(error)))
    except PermissionError as error:
        name = error.filename2 or error.filename
        close = "close it in Excel, or " if str(name).endswith(".xlsx") else ""
        sys.exit(_fail(f"{name}: permission denied; {close}name another file with --output"))
    except OSError as error:
        sys.exit(_fail(f"cannot write it ({error}); name another file with --output"))


def _fail(message: str) -> int:
    print(f"export_results.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
