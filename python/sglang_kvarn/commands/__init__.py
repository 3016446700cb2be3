# SPDX-License-Identifier: Apache-2.0
"""What ``python -m sglang_kvarn`` runs: the self-check, a plan of memory, the table of hooks."""
