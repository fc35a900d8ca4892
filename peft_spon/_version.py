# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

__version__ = "0.5.0"
