# SPDX-License-Identifier: Apache-2.0
"""Replay of agent sessions against stock SGLang servers: workload, client, accounting, pictures."""
