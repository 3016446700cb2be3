# SPDX-License-Identifier: Apache-2.0
"""A two-turn chat with a stock SGLang server on a KVarN cache: `python -m sglang_kvarn.demo`."""
