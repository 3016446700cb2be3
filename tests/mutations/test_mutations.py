# SPDX-License-Identifier: Apache-2.0
"""Every mutation still applies: its text occurs once, and the tests that are to catch it exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from . import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_applies_to_the_code(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new and mutation.tests
    for test in mutation.tests:
        path, _, name = test.partition("::")
        functions = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(node, "name")}
        assert not name or name.partition("[")[0] in functions, test


def test_mutations_have_names_of_their_own():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
