# Seer Scale for NVIDIA GPUs, at the versions of requirements.lock. docs/containers.md says how to run
# it, and which base images and build arguments bring Apex and FairScale.
#
#   docker build -t seer-scale .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/workspace" -v /data:/data:ro seer-scale \
#     --recipe swav_in1k_regnety_16gf data.path=/data/imagenet/train \
#     --deepspeed_config ds_configs/zero1.json

# "base" has no CUDA libraries: torch's wheels bring CUDA 13, cuDNN and NCCL.
ARG BASE=nvidia/cuda:13.0.0-base-ubuntu24.04
# Where wheels are built. Apex needs nvcc: nvidia/cuda:13.0.0-devel-ubuntu24.04.
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS dependencies
# A tag of NVIDIA/apex, such as 25.05, the last one with amp; empty: no Apex.
ARG APEX=""
# A version of FairScale, such as 0.4.13; empty: no FairScale.
ARG FAIRSCALE=""
# The Makefile's.
ARG UV_VERSION=0.13.9
ENV UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1 \
    UV_PYTHON=/opt/venv/bin/python
# Ubuntu keeps one version of a package, so one that is named here would be gone tomorrow.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir uv==${UV_VERSION} \
    && python3 -m venv --without-pip /opt/venv
WORKDIR /build
COPY requirements.lock setup.py pyproject.toml README.md ./
COPY seer_scale/__init__.py seer_scale/
# What runs, without tests and linters: the lock says which version, and its hashes are checked.
RUN mkdir -p launch/recipes launch/studies ds_configs \
    && /opt/uv/bin/uv pip install --constraint requirements.lock -r setup.py --extra evaluation \
      setuptools
# By itself, so that another choice does not install torch again.
# hadolint ignore=DL3059
RUN if [ -n "${FAIRSCALE}" ]; then \
      /opt/uv/bin/uv pip install --no-build-isolation --constraint requirements.lock \
        "fairscale==${FAIRSCALE}"; \
    fi
# hadolint ignore=DL3008
RUN if [ -n "${APEX}" ]; then \
      apt-get update \
      && apt-get install -y --no-install-recommends g++ git ninja-build python3-dev \
      && rm -rf /var/lib/apt/lists/* \
      && /opt/uv/bin/uv pip install --no-build-isolation --no-deps \
        --config-settings=--build-option=--cpp_ext --config-settings=--build-option=--cuda_ext \
        "apex @ git+https://github.com/NVIDIA/apex@${APEX}"; \
    fi

FROM dependencies AS package
COPY . .
RUN /opt/uv/bin/uv pip install --no-deps --no-build-isolation --target /opt/seer-scale .

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /opt/seer-scale /opt/seer-scale
ENV PATH=/opt/venv/bin:/opt/seer-scale/bin:$PATH \
    PYTHONPATH=/opt/seer-scale \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270
# PYTHONSAFEPATH: a clone in the current folder does not take the place of the image's package.
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT: after SIGTERM, torchrun's default kills the ranks after 30 s.
RUN install -d -o 1000 -g 1000 /workspace
# Ubuntu's images come with this user.
USER 1000:1000
WORKDIR /workspace
HEALTHCHECK --interval=5m --timeout=30s --start-period=1m CMD ["seer-scale", "doctor", "--quick"]
# Not deepspeed: as process 1 it ignores SIGTERM, so `docker stop` would kill a run that has not saved.
ENTRYPOINT ["torchrun", "--nproc-per-node", "auto", "-m", "seer_scale", "pretrain"]
