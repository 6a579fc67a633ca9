# One image for two things: the worker's container (--sdk_container_image) and the launcher of a flex template.
#   docker build --tag REGISTRY/beam-vae:0.1.0 .
#   docker build --tag REGISTRY/beam-vae:0.1.0-gpu --build-arg EXTRAS=gcp,kafka,gpu .
# docs/dataflow.md says how to use it.

# Python and Beam must be, to the minor version, those of the machine that launches the job.
ARG PYTHON_VERSION=3.11
ARG BEAM_VERSION=2.77.0
ARG BASE=python:${PYTHON_VERSION}-slim-bookworm
ARG BEAM_SDK=apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION}
ARG LAUNCHER=gcr.io/dataflow-templates-base/python311-template-launcher-base:flex_templates_base_image_release_20260112_RC00

# Stages of their own, because COPY --from takes no variables.
FROM ${BEAM_SDK} AS beam
FROM ${LAUNCHER} AS launcher

FROM ${BASE}
ARG BEAM_VERSION
ARG EXTRAS=gcp,kafka

# What the package needs, in a layer that only setup.py changes: after a change of code, a push and the workers' pull
# move the small layers below. Nothing is compiled, so a slim base does.
COPY setup.py pyproject.toml beam_vae.py /tmp/beam-vae/
RUN python3 -m pip install --no-cache-dir "apache-beam==${BEAM_VERSION}" "/tmp/beam-vae[${EXTRAS}]" \
    && rm -r /tmp/beam-vae

# boot starts the worker, talks to the runner and stages files; it is released with each SDK version.
COPY --from=beam /opt/apache/beam /opt/apache/beam
COPY --from=launcher /opt/google/dataflow/python_template_launcher /opt/google/dataflow/python_template_launcher

# The package itself. pip check: where two packages disagree, the build fails and not the job. The source goes again,
# for a folder of the same name would shadow what is installed.
COPY . /tmp/beam-vae/
RUN python3 -m pip install --no-cache-dir --no-deps --force-reinstall /tmp/beam-vae \
    && python3 -m pip check \
    && mkdir /template \
    && cp /tmp/beam-vae/pipeline/launcher.py /template/ \
    && rm -r /tmp/beam-vae \
    && useradd --create-home beam

# A file of its own folder: Python looks there first, and `pipeline/` has names such as `records`.
ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/template/launcher.py
# All is installed already, so boot need not make a virtual environment for each worker, which only root may.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
# Dataflow starts a process per core, so a thread of TensorFlow's per process is enough. The GPU driver comes from
# Dataflow, which puts it in this place.
ENV TF_CPP_MIN_LOG_LEVEL=1 \
    TF_NUM_INTRAOP_THREADS=1 \
    TF_NUM_INTEROP_THREADS=1 \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64

# Dataflow's boot and launcher write in folders of the machine that belong to root. Other engines may take
# --build-arg RUN_AS=beam.
ARG RUN_AS=root
USER ${RUN_AS}
ENTRYPOINT ["/opt/apache/beam/boot"]
