# SPDX-License-Identifier: Apache-2.0
"""Many tenants on one server: their load, the answers that they must get, faults that a server must survive."""
