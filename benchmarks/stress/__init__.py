# SPDX-License-Identifier: Apache-2.0
"""Tenants, load and faults of `stress_isolation.py`."""
