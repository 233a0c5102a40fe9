# syntax=docker/dockerfile:1
# Capo for CPUs (target cpu) and NVIDIA GPUs (target gpu). The base is Debian 12 (bookworm-slim), named by its digest:
#
#   docker buildx imagetools inspect debian:bookworm-slim --format '{{.Manifest.Digest}}'
#   docker build --target cpu -t capo --build-arg BASE_IMAGE=debian:bookworm-slim@sha256:... .
#
# Every step is a script of deploy/container, which tests/deploy runs in a clean Debian as well.
ARG BASE_IMAGE

# -- what stays: Python, the libraries that wheels link to, an init ------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
COPY deploy/container/packages.sh /opt/build/
RUN ["/opt/build/packages.sh", "runtime"]

# -- what goes: compilers, pip -------------------------------------------------------------------------------------
FROM runtime AS build
RUN ["/opt/build/packages.sh", "build"]

FROM build AS build-cpu
COPY deploy/container/install_dependencies.sh deploy/container/requirements-cpu.lock /opt/build/
RUN --mount=type=cache,target=/root/.cache/pip ["/opt/build/install_dependencies.sh", "cpu"]
COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip ["/src/deploy/container/install_capo.sh"]

FROM build AS build-gpu
COPY deploy/container/install_dependencies.sh deploy/container/requirements-gpu.lock /opt/build/
RUN --mount=type=cache,target=/root/.cache/pip ["/opt/build/install_dependencies.sh", "gpu"]
COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip ["/src/deploy/container/install_capo.sh"]

# -- the images ----------------------------------------------------------------------------------------------------
FROM runtime AS service
COPY deploy/container/healthcheck.py /opt/healthcheck.py
RUN rm -rf /opt/build \
    && groupadd --gid 10001 capo \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin capo \
    && install -d -o 10001 -g 10001 -m 0750 /data /cache
# All that is written lies in /data, /cache, /tmp and /dev/shm; the rest may be mounted read-only.
ENV PATH=/opt/capo/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    CAPO_DATA_DIR=/data \
    CAPO_HOST=0.0.0.0
WORKDIR /data
EXPOSE 8000 50051
ENTRYPOINT ["tini", "--", "capo"]
CMD ["serve"]
# The model may take minutes to load, and /livez answers from the start.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["/opt/capo/bin/python", "/opt/healthcheck.py"]
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="Capo" \
      org.opencontainers.image.description="Fine-tunes adapters for one base model and serves them from one vLLM engine" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

FROM service AS gpu
COPY deploy/container/packages.sh /opt/build/
# The one exception to "no compiler", and its reason, stand in packages.sh.
RUN ["/opt/build/packages.sh", "gpu-runtime"]
COPY --from=build-gpu /opt/capo /opt/capo
USER 10001:10001

# Last, so that it is what `docker build .` makes.
FROM service AS cpu
COPY --from=build-cpu /opt/capo /opt/capo
USER 10001:10001
