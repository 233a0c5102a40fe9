# syntax=docker/dockerfile:1
# Capo for CPUs (target cpu), NVIDIA GPUs (gpu) and the nodes of a Ray cluster (ray). The base is Debian 12
# (bookworm-slim), named by its digest:
#
#   docker buildx imagetools inspect debian:bookworm-slim --format '{{.Manifest.Digest}}'
#   docker build --target cpu -t capo --build-arg BASE_IMAGE=debian:bookworm-slim@sha256:... .
#
# Every step is a script of deploy/container; tests/soak/test_clean_root.py takes the steps from here and runs them in a
# clean Debian.
ARG BASE_IMAGE

# -- what stays: Python, the libraries that wheels link to, an init ------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
ARG BASE_IMAGE
COPY deploy/container/check_base_image.sh deploy/container/packages.sh /opt/build/
RUN ["/opt/build/check_base_image.sh"]
RUN ["/opt/build/packages.sh", "runtime"]

# -- what goes: compilers, pip -------------------------------------------------------------------------------------
FROM runtime AS build
RUN ["/opt/build/packages.sh", "build"]

FROM build AS dependencies-cpu
COPY deploy/container/install_dependencies.sh deploy/container/requirements-cpu.lock /opt/build/
RUN --mount=type=cache,target=/root/.cache/pip ["/opt/build/install_dependencies.sh", "cpu"]

FROM dependencies-cpu AS build-cpu
COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip ["/src/deploy/container/install_capo.sh"]

FROM dependencies-cpu AS build-ray
COPY deploy/container/requirements-ray.lock /opt/build/
RUN --mount=type=cache,target=/root/.cache/pip ["/opt/build/install_dependencies.sh", "ray"]
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
COPY deploy/container/service.sh /opt/build/
RUN ["/opt/build/service.sh"]
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
    CAPO_HOST=0.0.0.0 \
    CAPO_HEALTH_PORT=9401
WORKDIR /data
EXPOSE 8000 50051
ENTRYPOINT ["tini", "--", "capo"]
CMD ["serve"]
# The model may take minutes to load, and /livez answers from the start.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["/opt/capo/bin/python", "/opt/healthcheck.py"]
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG SOURCE=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="Capo" \
      org.opencontainers.image.description="Fine-tunes adapters for one base model and serves them from one vLLM engine" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE%@*}" \
      org.opencontainers.image.base.digest="${BASE_IMAGE#*@}"

FROM service AS gpu
COPY deploy/container/packages.sh /opt/build/
# The one exception to "no compiler", and its reason, stand in packages.sh.
RUN ["/opt/build/packages.sh", "gpu-runtime"]
COPY --from=build-gpu /opt/capo /opt/capo
USER 10001:10001

FROM service AS ray
# KubeRay starts `ray start` in it; the agent of each node answers this.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["/opt/capo/bin/python", "/opt/healthcheck.py", "52365", "/api/local_raylet_healthz"]
COPY --from=build-ray /opt/capo /opt/capo
USER 10001:10001

# Last, so that it is what `docker build .` makes.
FROM service AS cpu
COPY --from=build-cpu /opt/capo /opt/capo
USER 10001:10001
