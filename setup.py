"""The C++ extension; everything else is in pyproject.toml."""

import sys

from setuptools import Extension, setup

# A square root is an instruction where it need not set errno.
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", "-g0", "-Wno-psabi"]
INCLUDED = ("tile", "attention", "attention_bf16", "layers", "adamw", "pack")

setup(
    ext_modules=[
        Extension(
            "fastpo._C",
            sources=["csrc/ext.cpp"],
            depends=[f"csrc/{name}.inc" for name in INCLUDED],
            language="c++",
            extra_compile_args=[] if sys.platform == "win32" else FLAGS,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,  # without a compiler the install succeeds, and PyTorch code does the same
        )
    ]
)
