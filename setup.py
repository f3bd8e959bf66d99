"""Packaging. The model layer lives in ``model/`` and installs as ``step_kernels.model``."""

import re
from pathlib import Path

from setuptools import setup

KERNEL_FOLDERS = ("attention", "common", "cross_attention", "halting", "linear", "merge", "norm")
MODEL_WINGS = ("checkpoints", "cli", "foreign", "from_timm", "from_transformers", "graph", "heads", "policies", "train")
HERE = Path(__file__).parent
LINKED = (HERE / "step_kernels/model").is_dir()  # not where links are not supported
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "step_kernels/__init__.py").read_text(encoding="utf-8")).group(1)
README = (HERE / "README.md").read_text(encoding="utf-8")
# In an index no other file lies beside it: there pictures of the checkout go, and links into it become text.
BESIDE = r"\[([^]]*)\]\((?!https?:)[^)]*\)"
PAGE = re.sub(BESIDE, r"\1", re.sub(rf"!{BESIDE}\n*", "", README))

CHECKPOINTS = ["pyyaml>=6", "safetensors>=0.4"]
PREDICT = [*CHECKPOINTS, "pillow>=10", "tqdm>=4.60"]
TIMM = ["timm>=1.0.17"]
TRANSFORMERS = ["transformers>=5.0"]
BENCH = ["matplotlib>=3.8", "pillow>=10", "scikit-image>=0.22", "tqdm>=4.60"]
TEST = [*BENCH, *PREDICT, *TIMM, "build", "hypothesis>=6", "pytest>=8", "pytest-benchmark>=4", "setuptools>=77"]
DOCS = ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=1.0", "ruff>=0.6"]  # ruff wraps signatures
DEV = [*TEST, *DOCS, *TRANSFORMERS, "mypy>=1.11"]

setup(
    name="step-kernels",
    version=VERSION,
    description="Vision Transformers on fewer tokens: supertoken merging and early exits as fast, checked ops",
    long_description=PAGE,
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["vision transformer", "token merging", "early exit", "semantic segmentation", "triton"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # Named, not found, as step_kernels/model is a link to model/ in a checkout. With one root an editable install is a path, which
    # type checkers and editors follow as Python does; with two it would be an import hook, which they do not.
    packages=[
        "step_kernels",
        "step_kernels.reference",
        "step_kernels.triton",
        "step_kernels.tune",
        *(f"step_kernels.triton.{op}" for op in KERNEL_FOLDERS),
        "step_kernels.model",
        *(f"step_kernels.model.{wing}" for wing in MODEL_WINGS),
    ],
    py_modules=["step_kernels_cli"],
    entry_points={"console_scripts": ["step-kernels = step_kernels_cli:main"]},
    package_dir={"": "."} | ({} if LINKED else {"step_kernels.model": "model"}),
    package_data={"step_kernels": ["py.typed"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "numpy>=1.26",
        # The ranges that the tests have run with: torch 2.11, 2.13 and 2.15, Triton 3.6 and 3.9.
        "torch>=2.11,<2.16",
        'triton>=3.6,<3.10; platform_system == "Linux" and platform_machine == "x86_64"',
    ],
    extras_require={
        "bench": BENCH,
        "checkpoints": CHECKPOINTS,
        "dev": DEV,
        "docs": DOCS,
        "predict": PREDICT,
        "test": TEST,
        "timm": TIMM,
        "transformers": TRANSFORMERS,
    },
)
