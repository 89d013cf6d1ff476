# mmdbb with the pinned OpenMMLab packages:
#
#   docker build -t mmdbb .
#   docker run --rm -it --gpus all -v /path/of/data:/mmdbb/data mmdbb
#
# --build-arg STACK=onedl takes the forks, STACK=light compiles nothing. There
# is no nvcc here, so mmcv's operators (NMS, RoIAlign, ...) run on CPUs only;
# for detectors on GPUs build from an image with CUDA's compiler and Python
# 3.11: --build-arg BASE=...
ARG BASE=python:3.11-bookworm
FROM ${BASE}

ARG STACK=openmmlab
ENV MMDBB_CACHE=/opt/mmdbb-packages PIP_NO_CACHE_DIR=1 PYTHON=python3.11

# What OpenCV loads.
RUN apt-get update \
  && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /mmdbb
# The packages change less often than the code: a layer of their own.
COPY requirements requirements
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE model-index.yml ./
COPY mmdbb/version.py mmdbb/version.py
COPY mmdbb/__init__.py mmdbb/__init__.py
COPY mmdbb/mm/hosts.py mmdbb/mm/hosts.py
RUN requirements/install.sh $STACK

COPY . .
RUN rm -rf .venv-$STACK && requirements/install.sh $STACK
ENV PATH=/mmdbb/.venv-$STACK/bin:$PATH
CMD ["bash"]
