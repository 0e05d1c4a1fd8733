#!/bin/sh
# Install the systems that `kvferry bench transfer` compares with into .venv-peers, without what they would pull in:
#   Mooncake's transfer engine for machines without CUDA (its plain package wants libcudart), NIXL without 5 GB of CUDA.
# NIXL's Python part imports torch and numpy; the bench finds them in the environment that runs kvferry.
# System libraries of Mooncake (Debian): libnuma1 libibverbs1 librdmacm1.
set -eu

venv=${1:-.venv-peers}
python=${PYTHON:-python3}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "[1/2] Mooncake, NIXL, msgpack into $venv"
"$venv/bin/python" -m pip --disable-pip-version-check install --no-deps \
    mooncake-transfer-engine-non-cuda==0.3.13.post1 nixl-cu12==1.5.1 msgpack

echo "[2/2] system libraries"
missing=""
for library in libnuma1:libnuma.so.1 libibverbs1:libibverbs.so.1 librdmacm1:librdmacm.so.1; do
    ldconfig -p | grep -q "${library#*:}" || missing="$missing ${library%%:*}"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get install -y $missing
    else
        echo "Mooncake needs:$missing (Debian's names). Install them, or the bench leaves Mooncake out." >&2
    fi
fi
echo "done: kvferry bench transfer finds them in $venv"
