# SPDX-License-Identifier: Apache-2.0
"""Say whether this installation can serve a kvarn cache: ``python -m sglang_kvarn [--json]``."""

from __future__ import annotations

import argparse
import json
import sys

from sglang_kvarn import cpu_platform


def main() -> int:
    """Print the facts; return 0 if a server would start, else 1."""
    parser = argparse.ArgumentParser(prog="python -m sglang_kvarn", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    cpu_platform.prepare_environment()
    from sglang_kvarn import selfcheck

    facts = selfcheck.collect()
    print(json.dumps(facts) if args.json else selfcheck.report(facts))
    return 1 if facts["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
