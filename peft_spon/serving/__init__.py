# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Merged models in servers: vLLM's plug-in, and `serve`, which checks a folder and starts vLLM."""

from .folder import check_folder, serve


__all__ = ["check_folder", "serve"]
