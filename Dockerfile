# Seer Scale for NVIDIA GPUs: builds the environment of requirements.lock. Not measured yet, neither
# the build nor a run; the tests run on Python 3.11, this image has Ubuntu's 3.12.
#
#   docker build -t seer-scale .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/workspace" -v /data:/data:ro seer-scale \
#     --recipe swav_in1k_regnety_16gf data.path=/data/imagenet/train \
#     --deepspeed_config /opt/seer-scale/ds_configs/zero1.json
#
# --ipc=host (or --shm-size=16g): loader workers hand over batches, and NCCL its buffers, through
# /dev/shm, of which a container has 64 MB unless told.
# Everything a run writes (runs/, mlflow.db, mlartifacts/) lands in /workspace: mount a folder there
# that user id 1000 may write to.
# Several nodes: --network=host and --entrypoint torchrun, as in the README.

# "base" has no CUDA libraries: the wheels of torch bring CUDA 13, cuDNN and NCCL. Nor has it a
# compiler, which only DeepSpeed's own kernels would need; ZeRO 0 to 3 without offload uses none.
ARG BASE=nvidia/cuda:13.0.0-base-ubuntu24.04

FROM ${BASE} AS builder
# The Makefile's.
ARG UV_VERSION=0.13.9
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir uv==${UV_VERSION} \
    && python3 -m venv --without-pip /opt/venv
COPY requirements.lock /tmp/requirements.lock
RUN /opt/uv/bin/uv pip install --no-cache --compile-bytecode \
    --python /opt/venv/bin/python -r /tmp/requirements.lock

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/venv /opt/venv
COPY . /opt/seer-scale
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/seer-scale \
    PYTHONUNBUFFERED=1
RUN install -d -o ubuntu -g ubuntu /workspace
# Id 1000, which Ubuntu's images come with.
USER ubuntu
WORKDIR /workspace
ENTRYPOINT ["deepspeed", "/opt/seer-scale/launch/pretrain.py"]
