# Your event catalogue in the image: for one that needs packages of its own, or is released together with its workers.
#     docker build -f catalogue.Dockerfile --build-arg BRIDGE=registry.example.com/rabbitmq-sse-bridge:0.1.0 .
# beside a folder `acme_events`, a Python package as schemas/ of the repository is (several teams: a package each, below that one).
# deploy/kubernetes/components/baked-catalogue uses it. What it imports beyond pydantic goes to the same place, from a stage
# with pip in it: `pip install --target /opt/catalogue NAME`, and COPY --from.
ARG BRIDGE=rabbitmq-sse-bridge:0.1.0
# hadolint ignore=DL3006
FROM ${BRIDGE}
COPY acme_events /opt/catalogue/acme_events
ENV PYTHONPATH=/opt/catalogue BRIDGE_SCHEMAS=acme_events
# A catalogue with a fault ends the build here, with every fault named, and not a rollout.
RUN ["bridge", "schemas", "export"]
