# SPDX-License-Identifier: Apache-2.0
"""The way of new keys and values into the cache: rotated, stored in the ring, encoded when their page is full."""
