# docker build -t NAME . && docker push NAME    (it prints the digest that cluster.yaml and configs/kuberay/ want)
# On CPUs alone: --build-arg BASE=rayproject/ray:2.60.0-py311-cpu --build-arg EXTRAS=cpu,hub,lora
ARG BASE=rayproject/ray:2.60.0-py311-cu130
FROM ${BASE}
ARG EXTRAS=gpu,hub,lora

# The base image's own user; nothing here is done as root.
USER ray
WORKDIR /home/ray/app

# What seldom changes first, so that a change of our source installs nothing anew. boto3 is what the
# launcher's autoscaler asks AWS with.
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p retrieval_ray/demo retrieval_ray/stages retrieval_ray/teachers \
    && touch retrieval_ray/__init__.py \
    && pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" boto3 \
    && pip uninstall --yes retrieval-ray && rm -rf build retrieval_ray.egg-info

COPY --chown=ray:users retrieval_ray retrieval_ray
COPY --chown=ray:users jobs jobs
COPY --chown=ray:users configs configs
RUN pip install --no-cache-dir --no-deps . && rm -rf build retrieval_ray.egg-info

ENV RAY_USAGE_STATS_ENABLED=0
