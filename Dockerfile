# fastpo on a GPU machine. PyTorch's wheel brings its CUDA libraries; the image names what the driver must have, and
# Triton needs a C compiler when it starts kernels.
#     docker build -t fastpo .
#     docker run --gpus all --ipc host -v "$PWD":/work fastpo train --config run.yaml
FROM nvidia/cuda:13.0.0-base-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONSAFEPATH=1

WORKDIR /opt/fastpo
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[data,peft,quant]"

WORKDIR /work
ENTRYPOINT ["fastpo"]
CMD ["env"]
