# SPDX-License-Identifier: Apache-2.0
"""Say whether this installation can serve a kvarn cache; with ``plan``, what a model and a GPU have room for."""

from __future__ import annotations

import argparse
import json
import sys

from sglang_kvarn.cpu import platform
from sglang_kvarn.refused import Refused


def main(arguments: list[str] | None = None) -> int:
    """Print the facts; return 0 if a server would start, else 1."""
    platform.prepare_environment()
    from sglang_kvarn.commands import plan, selfcheck

    parser = argparse.ArgumentParser(prog="python -m sglang_kvarn", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    commands = parser.add_subparsers(dest="command", metavar="plan")
    what = "say what a model and a GPU have room for, from the folder of the model, before any weights load"
    planned = commands.add_parser("plan", help=what, description=what.capitalize() + ".")
    planned.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_arguments(planned)
    options = parser.parse_args(arguments)
    if options.command == "plan":
        try:
            facts = plan.collect(options)
        except (Refused, ValueError) as error:
            if options.json:
                print(json.dumps({"refused": str(error)}))
            else:
                print(error, file=sys.stderr)
            return 1
        print(json.dumps(facts) if options.json else plan.report(facts))
        return 0
    facts = selfcheck.collect()
    print(json.dumps(facts) if options.json else selfcheck.report(facts))
    return 1 if facts["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
