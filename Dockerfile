# The nodes of a Ray cluster (examples/clusters/kubernetes.yaml), and one machine alone:
#     docker build --tag YOUR-REGISTRY/fixstudy .                                    with CUDA, which works on CPUs too
#     docker build --tag YOUR-REGISTRY/fixstudy --build-arg UV_TORCH_BACKEND=cpu .   without, gigabytes smaller
#     docker run --gpus all --volume "$PWD:/work" --workdir /work YOUR-REGISTRY/fixstudy fixstudy run study.yaml
# CUDA comes with torch: a node needs its driver and NVIDIA's container toolkit.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# KubeRay asks nodes for their health with wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 fixstudy
RUN pip install --no-cache-dir uv==0.13.9

# One of uv's --torch-backend, such as cpu or cu128; torch as PyPI has it, with CUDA, where none is given.
ARG UV_TORCH_BACKEND
# rayVersion of the cluster: head, workers and whoever joins them must have the same.
ARG RAY=2.60.0
WORKDIR /opt/fixstudy
# What the project needs is a layer of its own: a change of code doesn't load torch again.
COPY pyproject.toml ./
RUN uv pip install --system --no-cache --compile-bytecode --requirements pyproject.toml --extra cluster "ray==${RAY}"
COPY README.md LICENSE ./
COPY analysis analysis
COPY fixers fixers
COPY orchestrator orchestrator
RUN uv pip install --system --no-cache --compile-bytecode --no-deps .

USER 1000
WORKDIR /home/fixstudy
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility RAY_USAGE_STATS_ENABLED=0
CMD ["fixstudy", "--help"]
