#!/bin/sh
# Install what `kvferry bench transfer` and `kvferry bench pool` compare with into .venv-peers, without what they would
# pull in: Mooncake for machines without CUDA (its plain package wants libcudart), NIXL without 5 GB of CUDA, LMCache
# with just what its local CPU backend imports. Their Python parts import torch, numpy and more; the bench finds them in
# the environment that runs kvferry. System packages (Debian): libnuma1 libibverbs1 librdmacm1 for Mooncake, redis-server,
# fio.
set -eu

venv=${1:-.venv-peers}
python=${PYTHON:-python3}
pip="$venv/bin/python -m pip --disable-pip-version-check install --no-deps"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "[1/3] Mooncake, NIXL, msgpack into $venv"
$pip mooncake-transfer-engine-non-cuda==0.3.13.post1 nixl-cu12==1.5.1 msgpack

echo "[2/3] LMCache into $venv"
$pip lmcache==0.5.6 aiofile aiofiles annotated-types anyio awscrt blake3 cachetools caio certifi cffi charset_normalizer \
    cryptography fastapi h11 httpcore httpx idna importlib-metadata llvmlite numba nvtx opentelemetry-api \
    opentelemetry-exporter-prometheus opentelemetry-sdk opentelemetry-semantic-conventions prometheus_client psutil \
    py-cpuinfo pycparser pydantic pydantic-core pyyaml pyzmq requests sniffio sortedcontainers starlette \
    typing-inspection typing_extensions urllib3 zipp || echo "LMCache can't be installed here and is left out" >&2

echo "[3/3] system packages"
missing=""
for library in libnuma1:libnuma.so.1 libibverbs1:libibverbs.so.1 librdmacm1:librdmacm.so.1; do
    ldconfig -p | grep -q "${library#*:}" || missing="$missing ${library%%:*}"
done
for tool in redis-server fio; do
    command -v "$tool" >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get install -y --no-install-recommends $missing
    else
        echo "missing:$missing (Debian's names). Install them, or the bench leaves out what needs them." >&2
    fi
fi
echo "done: kvferry bench finds them in $venv"
