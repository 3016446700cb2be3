# SPDX-License-Identifier: Apache-2.0
"""Parts of bench_generation: prompts with known answers, conversations, scores, the engine's side, the report."""
