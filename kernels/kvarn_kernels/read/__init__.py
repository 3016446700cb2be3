# SPDX-License-Identifier: Apache-2.0
"""Attention that reads records and rings themselves: decode steps, and extend steps of few tokens."""
