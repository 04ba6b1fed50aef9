# cwm_jax in a container. On a CPU:
#     docker build -t cwm_jax .
#     docker run --rm -p 7860:7860 cwm_jax
# With NVIDIA GPUs (the CUDA libraries come with JAX; the host needs the driver and its toolkit):
#     docker build -t cwm_jax:cuda --build-arg EXTRA=cuda13 .
#     docker run --rm --gpus all --shm-size=8g -v "$PWD/runs:/runs" cwm_jax:cuda \
#       train --config small --workdir /runs/small
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# `cpu`, `cuda12` or `cuda13`; with `,torch` and the like for further extras.
ARG EXTRA=cpu
# Further packages of Debian, such as git.
ARG PACKAGES=""

# The Python packages bring their own libraries; a font is for the words on videos.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends fonts-dejavu-core $PACKAGES \
    && rm -rf /var/lib/apt/lists/*

# Nobody in particular: caches lie in the home folder, runs wherever a volume is mounted.
RUN useradd --create-home --uid 1000 player \
    && install --directory --owner=player /opt/venv /opt/cwm_jax
USER player
WORKDIR /opt/cwm_jax
COPY --chown=player . .
RUN python3 -m venv /opt/venv \
    && extras="$(echo "$EXTRA" | sed 's/^cpu,*//')" \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".${extras:+[$extras]}"
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /home/player
EXPOSE 7860
ENTRYPOINT ["cwm"]
CMD ["play", "--host", "0.0.0.0"]
