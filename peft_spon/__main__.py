# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m peft_spon`: the command line, also where the script `peft-spon` is not on the path."""

from .cli import run


if __name__ == "__main__":
    run()
