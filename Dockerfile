# One image for both servers: `docker run IMAGE gateway`, `docker run IMAGE message_service`.

FROM python:3.13-slim AS packages
# hadolint ignore=DL3008  # any version of `strip` will do, and none gets into the image
RUN apt-get update -q && apt-get install -qy --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
COPY requirements/runtime.txt /
# Without the programs that packages install, and without debug information, which is half the size.
RUN python -m pip install --disable-pip-version-check --root-user-action=ignore --no-cache-dir --no-compile \
    --require-hashes --only-binary :all: --prefix /packages -r /runtime.txt && \
    rm -r /packages/bin && \
    find /packages -name "*.so" -exec strip --strip-debug {} +

FROM python:3.13-slim
LABEL org.opencontainers.image.title="messages" \
      org.opencontainers.image.description="A gateway and a message service: the first argument says which to run." \
      org.opencontainers.image.version="0.1.0"
COPY --from=packages /packages /usr/local
# The files that .dockerignore allows; readable for every user, whatever their modes in the checkout.
WORKDIR /app
COPY --chmod=644 *.py pyproject.toml index.html openapi.yaml schema.sql /app/
COPY --chmod=644 chassis/*.py /app/chassis/
# Compiles exactly the modules that the servers import, Python's own included, since the servers cannot write at run
# time.
RUN python -m gateway --version && python -m message_service --version
USER 65532:65532
# No shell: the server is process 1 and gets the signals. It exits by itself within DRAIN_SECONDS + SHUTDOWN_SECONDS.
ENTRYPOINT ["python", "-m"]
# Python handles SIGINT from its first moment. As process 1, it would not get a SIGTERM until the server handles it.
STOPSIGNAL SIGINT
