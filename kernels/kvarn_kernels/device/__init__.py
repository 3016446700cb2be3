# SPDX-License-Identifier: Apache-2.0
"""What knows a GPU and nothing of a cache: its properties, launching, compiling CUDA C++, exact arithmetic."""
