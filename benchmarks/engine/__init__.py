# SPDX-License-Identifier: Apache-2.0
"""A whole engine or server, cache against cache: speed, size of the pool, throughput."""
