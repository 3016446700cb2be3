# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer on a GPU: the kernels against FlashAttention 3, FlashInfer and SGLang's Triton kernel."""
