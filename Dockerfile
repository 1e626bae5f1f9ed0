# The proxy in a container: no compiler, no shell script, not root.
#
#   docker build -t openai-proxy .
#   docker run --rm -p 127.0.0.1:8484:8484 -e OPENAI_API_KEY -e PROXY_CLIENT_KEYS=me:choose-a-long-secret openai-proxy
#
# In a container the proxy listens on every address of the container, and it serves no address other than
# loopback without client keys: give PROXY_CLIENT_KEYS (or server.client_keys), or say PROXY__SERVER__ALLOW_ANONYMOUS=true.
# A settings file goes to /config/config.yaml. Set host and port by the file or the environment rather than by
# flags, so that the health check below asks at the same address.

ARG BASE=python:3.12-slim

FROM ${BASE} AS build
WORKDIR /src
# Every dependency by its hash, the build backend too, which stays out of the image. `.ci/lock` renews them.
COPY requirements.txt requirements-build.txt ./
RUN python3 -m venv /opt/build \
    && /opt/build/bin/python -m pip install --no-cache-dir --require-hashes -r requirements-build.txt \
    && python3 -m venv /opt/openai-proxy \
    && /opt/openai-proxy/bin/python -m pip install --no-cache-dir --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY proxy ./proxy
RUN /opt/build/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && /opt/openai-proxy/bin/python -m pip install --no-cache-dir --no-deps --no-index /dist/*.whl

FROM ${BASE}
COPY --from=build /opt/openai-proxy /opt/openai-proxy
RUN install -d -o 10001 -g 10001 /data
ENV PATH=/opt/openai-proxy/bin:$PATH \
    HOME=/data \
    PYTHONUNBUFFERED=1 \
    PROXY__SERVER__HOST=0.0.0.0
WORKDIR /config
USER 10001:10001
EXPOSE 8484
HEALTHCHECK --interval=15s --timeout=6s --start-period=10s --retries=3 CMD ["openai-proxy", "health"]
ENTRYPOINT ["openai-proxy"]
CMD ["serve"]
