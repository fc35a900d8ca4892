# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Puts the compiled CPU kernel into wheels; without a compiler the wheel is pure Python.

An editable install compiles nothing here: its sources change, so the kernel is compiled on first use, by source.
"""

import importlib.util
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if self.target_name != "wheel" or version == "editable":
            return
        spec = importlib.util.spec_from_file_location("build", Path(self.root, "peft_spon", "kernels", "build.py"))
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        self.aside = tempfile.TemporaryDirectory()  # removed with this object, after the wheel is written
        try:
            library = build.compile_into(Path(self.aside.name))
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or "").strip()
            self.app.display_warning(f"No compiled CPU kernel in this wheel: {error} {said}".strip())
            return
        # No ABI of Python or torch in it: one library per platform.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
        build_data["force_include"][str(library)] = f"peft_spon/kernels/{library.name}"
