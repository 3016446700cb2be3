# SPDX-License-Identifier: Apache-2.0
"""Attention of long extend steps: what they read is written out in 16 bits, and a library attends."""
