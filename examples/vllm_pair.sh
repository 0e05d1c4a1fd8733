#!/bin/bash
# One prefill and one decode instance of plain vLLM behind kvferry's router, each started by hand.
#
#   usage: examples/vllm_pair.sh MODEL         then: curl http://127.0.0.1:8000/v1/completions -d '{"model": ...}'
#
# The same on one machine in one command: kvferry up --engine vllm --model MODEL --prefill 1 --decode 1
# On several machines: start each line where it belongs, listen on an address that the others reach instead of
# 127.0.0.1, and give all of them the same KVFERRY_CLUSTER_SECRET.
set -euo pipefail
MODEL=${1:?usage: examples/vllm_pair.sh MODEL}
ROUTER=http://127.0.0.1:8000
trap 'kill $(jobs -p) 2>/dev/null' EXIT

# kv_load_failure_policy: what the decode instance does when the KV does not arrive. vLLM's default is to fail.
transfer() {  # ROLE PORT
  cat <<JSON
{"kv_connector": "KVFerryConnector", "kv_connector_module_path": "kvferry.connector.vllm",
 "kv_role": "$1", "kv_load_failure_policy": "recompute",
 "kv_connector_extra_config": {"router": "$ROUTER", "url": "http://127.0.0.1:$2", "listen": "tcp://127.0.0.1:0"}}
JSON
}

kvferry router --port 8000 &
CUDA_VISIBLE_DEVICES=0 vllm serve "$MODEL" --served-model-name m --port 8100 \
  --kv-transfer-config "$(transfer kv_producer 8100)" &
CUDA_VISIBLE_DEVICES=1 vllm serve "$MODEL" --served-model-name m --port 8200 \
  --kv-transfer-config "$(transfer kv_consumer 8200)" &
wait
