# SPDX-License-Identifier: Apache-2.0
"""The record of a page: where its bytes are, what its codes mean, how a kernel unpacks them, and the rotation."""
