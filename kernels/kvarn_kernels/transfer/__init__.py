# SPDX-License-Identifier: Apache-2.0
"""The way of whole pages to host memory and back: bytes, nothing is decoded."""
