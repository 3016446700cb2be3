# SPDX-License-Identifier: Apache-2.0
"""Parts of bench_quality: texts, caches to compare, the published method, scores."""
