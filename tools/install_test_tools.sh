#!/bin/sh
# What `make test` uses when it is there, and skips tests without: a Redis server, Prometheus with promtool, network
# namespaces (Debian), Triton's interpreter and NIXL on the CPU (into .venv, which `make venv` made). CI calls it.
set -u
cd "$(dirname "$0")/.."

missing=""
for tool in redis-server:redis-server promtool:prometheus ip:iproute2; do
    command -v "${tool%%:*}" >/dev/null || missing="$missing ${tool#*:}"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "[1/2] Debian packages:$missing"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing; } >/dev/null \
            || echo "not installed:$missing; their tests are skipped" >&2
    else
        echo "install these for all tests (Debian's names):$missing" >&2
    fi
fi

# NIXL's package asks for 5 GB of CUDA; over host memory it needs none of it.
if ! .venv/bin/python -c 'import nixl_cu12, triton' 2>/dev/null; then
    echo "[2/2] Triton and NIXL into .venv"
    .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps triton==3.7.1 nixl-cu12==1.5.1 msgpack \
        || echo "Triton or NIXL can't be installed here; their tests are skipped" >&2
fi
