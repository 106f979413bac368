"""The batched attention of the CPU bridge computes what SGLang's own loop over sequences does."""

import json
import subprocess

from helpers.tiny_serving import CONFIG, ROOT

SCRIPT = """
import importlib.util, json, sys
import torch

spec = importlib.util.spec_from_file_location("bridge", sys.argv[1])
bridge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bridge)
bridge.bridge_kernels()
bridge.bridge_torchvision()
from sglang.srt.layers.attention import torch_native_backend as module

backend = module.TorchNativeAttnBackend
methods = lambda: (backend._run_sdpa_forward_extend, backend._run_sdpa_forward_decode)
loops = methods()
calls = []
batched = bridge.batched_attention
bridge.batched_attention = lambda *args: calls.append(1) or batched(*args)
bridge.replace_attention(module)

torch.manual_seed(0)
heads, key_heads, head_dim, slots = 8, 4, 16, 300
k_cache, v_cache = torch.randn(2, slots, key_heads, head_dim)
k_cache[0] = v_cache[0] = float("nan")  # a slot that no sequence has
seq_lens, prefix_lens = torch.tensor([7, 31, 1, 18]), torch.tensor([0, 30, 0, 5])
req_to_token = torch.zeros(6, 64, dtype=torch.int32)
req_pool_indices = torch.tensor([4, 0, 5, 2])
free = torch.randperm(slots - 1) + 1
for request, length in zip(req_pool_indices, seq_lens):
    req_to_token[request, :length], free = free[:length].int(), free[length:]
differences = []
for lengths, causal, more in (
    (seq_lens - prefix_lens, dict(causal=True), (prefix_lens, seq_lens - prefix_lens)),
    (torch.ones_like(seq_lens), dict(causal=False), ()),
):
    query = torch.randn(int(lengths.sum()), heads, head_dim)
    outputs = []
    for method in (loops[len(differences)], methods()[len(differences)]):
        outputs.append(torch.zeros_like(query))
        shared = query, outputs[-1], k_cache, v_cache, req_to_token, req_pool_indices, seq_lens
        method(None, *shared, *more, None, scaling=0.3, enable_gqa=True, **causal)
    differences.append(float((outputs[0] - outputs[1]).abs().max()))
print(json.dumps([differences, len(calls)]))
"""


def test_batched_attention_equals_the_loop_over_sequences():
    bridge = ROOT / "megavar" / "rollout" / "sglang_cpu_bridge.py"
    done = subprocess.run([CONFIG.python, "-W", "ignore", "-c", SCRIPT, bridge], capture_output=True, text=True)
    differences, num_calls = json.loads(done.stdout.splitlines()[-1])
    assert num_calls == 2 and max(differences) < 1e-6, done.stderr
