# Your event catalogue in the image: for a catalogue that imports other packages, or is released with its workers.
#     docker build -f catalogue.Dockerfile --build-arg BRIDGE=registry.example.com/rabbitmq-sse-bridge:0.1.0 .
# beside a folder `acme_events`, a Python package like schemas/ of the repository (several teams: one subpackage each).
# deploy/kubernetes/components/baked-catalogue uses it. Copy its imports other than pydantic to the same folder, from a
# stage with pip: `pip install --target /opt/catalogue NAME`, and COPY --from.
ARG BRIDGE=rabbitmq-sse-bridge:0.1.0
# hadolint ignore=DL3006
FROM ${BRIDGE}
COPY acme_events /opt/catalogue/acme_events
ENV PYTHONPATH=/opt/catalogue BRIDGE_SCHEMAS=acme_events
# A catalogue with a fault ends the build here, not a rollout later. The output names every fault.
RUN ["bridge", "schemas", "export"]
