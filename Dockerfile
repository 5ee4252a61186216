# portero-py in a container: non-root, without a compiler, and without a default secret.
#
# The compiled build (docs/compiled.md) is installed; --build-arg COMPILED=0 installs the pure one.
#
#   docker run --stop-timeout 75 -p 443:8443 -p 127.0.0.1:18080:18080 -v ./certs:/certs:ro \
#     -e PORTERO_REGISTER_SECRET_FILE=/run/secrets/register -e PORTERO_JWT_HMAC_KEY_FILE=/run/secrets/jwt …
#
# Docker kills after 10 s by default, and what is in flight may take 30 s to end, the rest 30 s more.
#
# Two volumes: /certs, and /var/lib/portero for leases, the ACME account and its keys. Name them where ACME is
# used (-v portero-certs:/certs -v portero-state:/var/lib/portero): a container that starts without both orders
# every certificate again, and a CA issues the same one a few times a week only.
#
# Ports above 1024, because not every runtime lets an ordinary user bind 443. The registration API listens on
# all of the container's addresses: on its loopback no backend could reach it. Publish 18080 only where the
# backends are.

ARG PYTHON=3.13

FROM python:${PYTHON}-slim-bookworm AS build
ARG COMPILED=1
# No versions: a base image of another day has others, and none of this gets into the last stage.
# hadolint ignore=DL3008
RUN if [ "$COMPILED" = 1 ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
WORKDIR /source
RUN python -m venv /opt/portero-py
COPY pyproject.toml README.md LICENSE ./
COPY .ci/hatch_build.py ./.ci/
COPY portero_py ./portero_py
RUN HATCH_BUILD_HOOK_ENABLE_CUSTOM="$COMPILED" \
        /opt/portero-py/bin/pip install --no-cache-dir --disable-pip-version-check ".[dns]" \
    && /opt/portero-py/bin/pip uninstall --yes pip \
    && /opt/portero-py/bin/python -m compileall -q /opt/portero-py/lib

FROM python:${PYTHON}-slim-bookworm
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="portero-py" \
      org.opencontainers.image.description="The reverse proxy that backends join by themselves" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
RUN groupadd --system --gid 10001 portero \
    && useradd --system --uid 10001 --gid portero --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin portero \
    && install -d -o portero -g portero -m 0750 /certs \
    && install -d -o portero -g portero -m 0700 /var/lib/portero
COPY --from=build /opt/portero-py /opt/portero-py
ENV PATH=/opt/portero-py/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PORTERO_LISTEN_ADDR=[::]:8443 \
    PORTERO_REGISTER_ADDR=[::]:18080 \
    PORTERO_TLS_CERT_DIR=/certs \
    PORTERO_STATE_DIR=/var/lib/portero
# After the folders are made: a fresh volume takes owner and mode from them.
VOLUME ["/certs", "/var/lib/portero"]
USER 10001:10001
EXPOSE 8443 18080
STOPSIGNAL SIGTERM
# Whoever moves the registration API by a flag, and not by PORTERO_REGISTER_ADDR, moves it away from this check.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://localhost:' + os.environ['PORTERO_REGISTER_ADDR'].rpartition(':')[2] + '/livez', timeout=2)"]
ENTRYPOINT ["portero-py"]
