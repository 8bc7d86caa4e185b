# docker build --target cpu -t cmvae:cpu .       # or --target cuda, the default
# docker run --rm -v "$PWD:/work" cmvae:cpu train digits
# Files that a container writes into /work belong to user 1000.
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 1000 cmvae
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY cmvae ./cmvae
COPY configs ./configs

FROM base AS cpu
# PyTorch's builds without CUDA are a tenth of the size.
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu --constraint constraints.txt .
USER 1000
WORKDIR /work
ENTRYPOINT ["cmvae"]
CMD ["--help"]

FROM base AS cuda
# The wheels of PyPI bring CUDA; the driver is the host's. torch.compile needs a C compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --constraint constraints.txt .
USER 1000
WORKDIR /work
ENTRYPOINT ["cmvae"]
CMD ["--help"]
