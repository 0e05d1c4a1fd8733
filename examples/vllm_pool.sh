#!/bin/bash
# One plain vLLM whose prefix cache outlives it: a pool node, and an instance that loads from it and saves into it.
#
#   usage: examples/vllm_pool.sh MODEL        then: curl http://127.0.0.1:8100/v1/completions -d '{"model": "m", ...}'
#
# Kill vLLM and start it again, or start another one on another port: what the first computed is found. The KV cache must
# lie in host memory (vLLM for the CPU) so far; --slab-bytes must hold a block of all layers. `pool` goes into the extra
# config of prefill and decode instances (vllm_pair.sh) in the same way.
set -euo pipefail
MODEL=${1:?usage: examples/vllm_pool.sh MODEL}
trap 'kill $(jobs -p) 2>/dev/null' EXIT

kvferry node --listen tcp://127.0.0.1:7400 --arena-bytes 4GiB --slab-bytes 16MiB &
vllm serve "$MODEL" --served-model-name m --port 8100 --kv-transfer-config '{
  "kv_connector": "KVFerryConnector", "kv_connector_module_path": "kvferry.connector.vllm",
  "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
  "kv_connector_extra_config": {"pool": "tcp://127.0.0.1:7400"}}' &
wait
