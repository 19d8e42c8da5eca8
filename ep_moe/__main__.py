"""Commands of the package: ``python -m ep_moe doctor``, ``python -m ep_moe plan``."""

from __future__ import annotations

import argparse
import sys

from ep_moe import doctor
from ep_moe.plan import command as plan


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ep_moe")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print what this machine can run, and what to do about each gap")
    plan.add_arguments(commands.add_parser("plan", help=plan.DESCRIPTION, description=plan.DESCRIPTION))
    parsed = parser.parse_args(arguments)
    return doctor.main() if parsed.command == "doctor" else plan.main(parsed)


if __name__ == "__main__":
    sys.exit(main())
