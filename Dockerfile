# The server in a container, for a CPU (the default) or an NVIDIA GPU:
#
#   docker build -t openpalm:cpu .
#   docker build -t openpalm:cuda --build-arg DEVICE=cuda .
#
# See docs/docker.md; compose.yaml starts it.
ARG DEVICE=cpu
ARG PYTHON=3.12-slim-bookworm

# PyTorch's wheels bring the CUDA libraries and the host brings the driver, so both need Python only.
FROM python:${PYTHON} AS base-cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM python:${PYTHON} AS base-cuda
ENV TORCH_INDEX=https://pypi.org/simple \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base-${DEVICE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/openpalm
ENV PATH=/opt/openpalm/bin:$PATH
WORKDIR /build
COPY constraints.txt ./
# Before the source, so that a change of it does not install PyTorch again.
RUN pip install -c constraints.txt --index-url "$TORCH_INDEX" torch
COPY pyproject.toml README.md LICENSE ./
COPY configs ./configs
COPY src ./src
RUN pip install -c constraints.txt '.[serve,data,deploy]'

FROM base-${DEVICE}
COPY --from=build /opt/openpalm /opt/openpalm
ENV PATH=/opt/openpalm/bin:$PATH PYTHONUNBUFFERED=1
# A number, so that Kubernetes can see that it is not root. The cache keeps models of the Hub.
RUN useradd --uid 10001 --create-home openpalm \
    && install -d -o openpalm -g openpalm /models /feedback /home/openpalm/.cache
USER 10001
WORKDIR /home/openpalm
VOLUME ["/models", "/home/openpalm/.cache"]
EXPOSE 8000
# /ready is answered once the model is loaded; a large one takes minutes.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["openpalm"]
# OPENPALM_API_KEY must be set: a server that others can reach needs a key.
CMD ["serve", "/models/model", "--host", "0.0.0.0", "--port", "8000"]
