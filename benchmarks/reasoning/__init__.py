# SPDX-License-Identifier: Apache-2.0
"""Long chains of reasoning: tasks whose every step can be checked, a model trained on them, chains with each cache."""
