# SPDX-License-Identifier: Apache-2.0
"""SGLang on a machine without a GPU, on a platform that this plugin adds."""
