# lora_ft on a CUDA machine: docker build -t lora_ft:0.2.0 .
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# gcc and the headers of Python: Triton compiles the launchers of its kernels.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN python3 -m venv /opt/lora_ft \
    && /opt/lora_ft/bin/pip install --no-cache-dir --constraint /src/constraints.txt '/src[cuda,metrics,tensorboard]' \
    && rm -rf /src

# /data is for a mounted volume, which keeps runs and downloaded models.
ENV PATH=/opt/lora_ft/bin:$PATH HF_HOME=/data/cache/huggingface XDG_CACHE_HOME=/data/cache
WORKDIR /data
ENTRYPOINT ["lora-ft"]
