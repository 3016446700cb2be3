# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: rows, command line, models, engines and servers."""
