# Training and drawing on CPUs, with everything in it: at run time nothing is downloaded. docs/containers.md explains it.
FROM python:3.12-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Versions are those of the Debian release that the image names.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# The CPU build is gigabytes smaller than PyPI's. For another index: --build-arg TORCH_INDEX=URL
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch>=2.6,<2.14" --index-url "$TORCH_INDEX"
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir .
# Without compiled kernels everything works, but slowly: here that is an error, where there are any for the processor.
RUN if [ "$(uname -m)" = x86_64 ]; then ls /opt/venv/lib/python3*/site-packages/improved_diffusion/kernels/compiled*.so; fi

FROM python:3.12-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 user
COPY --from=build /opt/venv /opt/venv
# Any user may write here, so that --user can be that of the host.
RUN mkdir -p /app/runs /app/samples /app/cache \
    && chmod 1777 /app/runs /app/samples /app/cache
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    IMPROVED_DIFFUSION_CACHE=/app/cache
WORKDIR /app
USER 1000
ENTRYPOINT ["python", "-m", "improved_diffusion"]
CMD ["sample"]
