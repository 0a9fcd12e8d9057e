"""Write the Excel workbook of a training run: python export_results.py RUN_DIR [--output results.xlsx]"""

import argparse
import sys

if __name__ == "__main__":  # before the imports that take seconds
    from improved_diffusion.run import terminal

    terminal.start()

from improved_diffusion.results.export import export
from improved_diffusion.run import terminal


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the Excel workbook of a training run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory that image_train.py wrote")
    parser.add_argument("--output", metavar="FILE", help="workbook to write (default: RUN_DIR/results.xlsx)")
    arguments = parser.parse_args()
    terminal.clean_up_on_ctrl_c()
    try:
        print(f"wrote {export(arguments.run_dir, arguments.output)}")
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        sys.exit(_fail(str(error)))
    except PermissionError as error:
        name = error.filename2 or error.filename
        sys.exit(_fail(f"{name}: permission denied; close it in Excel, or name another file with --output"))
    except OSError as error:
        sys.exit(_fail(f"cannot write the workbook ({error}); name another file with --output"))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
