"""`python -m tune --config FILE --folder DIR`: a search in a process of its own, started by the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline import EXIT_OK, EXIT_STOPPED, LoradropError, load_config, say
from tune.progress import print_summary, tell
from tune.space import ARM_TEXTS, load_arms


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of pipeline/errors.py."""
    parser = argparse.ArgumentParser(prog="python -m tune", description=__doc__)
    parser.add_argument("--config", required=True, help="a resolved config.yaml, or the name of a recipe")
    parser.add_argument("--folder", type=Path, required=True, help="the search folder; continued if it has been begun")
    parser.add_argument(
        "--trust-remote-code", action="store_true", dest="trusted",
        help="code that comes with the model may run; what the file says about it does not count",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the configuration and the space, then stop")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config).trusting(arguments.trusted)
        if arguments.dry_run:
            for arm in load_arms(config):
                tell(f"{arm.trials} trials of {ARM_TEXTS[arm.name]}")
                for key, dimension in arm.space.describe().items():
                    tell(f"  {key}: {dimension}")
            return EXIT_OK
        from tune.search import search  # imports ray

        print_summary(search(config, arguments.folder))
        return EXIT_OK
    except LoradropError as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:  # a second Ctrl-C: the ledger has all that had finished
        return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
