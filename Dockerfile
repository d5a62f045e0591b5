# Megatron-OPDLM on NVIDIA's PyTorch container, whose PyTorch and Transformer Engine stay as they
# are: launch/setup.sh --gpu holds them and installs everything else at pinned versions.
#
#   docker build --build-arg REVISION=$(git rev-parse HEAD) -t megatron-opdlm .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -it megatron-opdlm
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

# The image holds no repository: a run's record takes the commit from here.
ARG REVISION=
ENV MEGATRON_OPDLM_REVISION=${REVISION}

LABEL org.opencontainers.image.title="Megatron-OPDLM" \
      org.opencontainers.image.description="Autoregressive language model to block-diffusion model by on-policy distillation" \
      org.opencontainers.image.revision=${REVISION} \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.documentation="https://arxiv.org/abs/2606.06712"

# The base image names its first user "ubuntu" (1000); ours is its own, so that both can exist.
ARG USER_ID=1001
RUN useradd --create-home --shell /bin/bash --uid ${USER_ID} opdlm \
    && install --directory --owner opdlm --group opdlm /opt/megatron-opdlm

# By number: a cluster that forbids root can see that it is not.
USER ${USER_ID}
WORKDIR /opt/megatron-opdlm

COPY --chown=opdlm:opdlm . .
RUN launch/setup.sh --gpu && rm -rf /home/opdlm/.cache/pip

ENV PATH=/opt/megatron-opdlm/.venv/bin:${PATH} \
    CUDA_DEVICE_MAX_CONNECTIONS=1

CMD ["bash"]
