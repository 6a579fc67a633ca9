# A Beam worker with this package installed: for --sdk_container_image on Dataflow, or any portable runner.
#   docker build --tag REGISTRY/beam-vae:0.1.0 .
#   python -m pipeline ... --sdk_container_image REGISTRY/beam-vae:0.1.0 --sdk_location container

# Python and Beam must be, to the minor version, those of the machine that launches the job.
ARG PYTHON_VERSION=3.11
ARG BEAM_VERSION=2.77.0
ARG BASE=python:${PYTHON_VERSION}-slim-bookworm
ARG BEAM_SDK=apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION}

# A stage of its own, because COPY --from takes no variables.
FROM ${BEAM_SDK} AS beam

FROM ${BASE}
ARG BEAM_VERSION

COPY . /tmp/beam-vae/
# Beam is held to the version whose boot is copied below. pip check: where two packages disagree, the
# build fails and not the job. Nothing is compiled, so a slim image does. The source goes
# again, for a folder of the same name would shadow what is installed.
RUN python3 -m pip install --no-cache-dir "apache-beam==${BEAM_VERSION}" /tmp/beam-vae/[gcp,kafka] \
    && python3 -m pip check \
    && rm -r /tmp/beam-vae

# boot starts the worker, talks to the runner and stages files; it is released with each SDK version.
COPY --from=beam /opt/apache/beam /opt/apache/beam

ENTRYPOINT ["/opt/apache/beam/boot"]
