"""Commands of the package: ``python -m ep_moe doctor``."""

from __future__ import annotations

import argparse
import sys

from ep_moe import doctor


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ep_moe")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print what this machine can run, and what to do about each gap")
    parser.parse_args(arguments)
    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
