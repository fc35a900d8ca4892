# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Text that is on every machine with Python: the source of its standard library, split by file."""

from peft_spon.texts import is_held_out, stdlib_texts


__all__ = ["is_held_out", "stdlib_texts"]
