# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""For mkdocstrings: docstrings without what only Hugging Face's own builder of documentation reads."""

import re
from typing import Any

import griffe


class PlainDocstrings(griffe.Extension):
    """Takes types out of `Args:` (the signature has them), and brackets off names."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^( +\w+(?:, \w+)*) \(.*?\):(?=\s)", r"\1:", obj.docstring.value, flags=re.M)
            text = re.sub(r"^( +)`([\w.\[\], ]+)`(?=: |, )", r"\1\2", text, flags=re.M)
            obj.docstring.value = re.sub(r"\[(`~?[\w.]+`)\](?![\[(])", r"\1", text)
